"""`vreflection space`, as it is typed, and the folder that it writes for the Hub."""

import json
import socket
import sys
import urllib.request

import pytest

from vreflection_training.cli import main


# What this package installs beyond a Space's requirements.txt.
NOT_ON_A_SPACE = ("accelerate", "datasets", "trl")


def fails(capsys, arguments, *fragments):
    assert main(["space", *map(str, arguments)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("vreflection: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for fragment in fragments:
        assert fragment in err


def test_without_gradio_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vreflection_hub_card.space.page", raising=False)
    fails(capsys, [], 'pip install "vreflection[space]"')


def test_a_port_that_is_taken(capsys):
    pytest.importorskip("gradio", reason='needs pip install "vreflection[space]"')
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        fails(capsys, ["--port", taken.getsockname()[1]], "--port")


def test_mistakes(capsys, tmp_path):
    fails(capsys, ["--export", tmp_path / "new", "--model", "x"], "--export")
    (tmp_path / "file").write_text("")
    fails(capsys, ["--export", tmp_path / "file"], "is there already")
    fails(capsys, ["--export", tmp_path], "is there already")


@pytest.mark.slow
def test_an_exported_space_runs_by_itself(capsys, tmp_path, served, free_port):
    pytest.importorskip("gradio", reason='needs pip install "vreflection[space]"')
    folder, port = tmp_path / "space", free_port()
    assert main(["space", "--export", str(folder)]) == 0
    assert str(folder) in capsys.readouterr().out
    assert not list(folder.rglob("__pycache__"))
    texts = folder / "vreflection_hub_card" / "space" / "texts.py"
    texts.write_text(texts.read_text().replace("<h1>V-Reflection</h1>", "<h1>From the folder</h1>"))
    address = f"http://127.0.0.1:{port}/"
    blocked = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({NOT_ON_A_SPACE})); sys.path.insert(0, {str(folder)!r})"
    )
    run = f"runpy.run_path({str(folder / 'app.py')!r}, run_name='__main__')"
    command = [sys.executable, "-c", f"{blocked}; {run}"]
    with served(command, address, tmp_path / "log", GRADIO_SERVER_PORT=str(port), GRADIO_ANALYTICS_ENABLED="True"):
        with urllib.request.urlopen(f"{address}config") as answer:
            config = json.load(answer)
    assert "From the folder" in json.dumps(config["components"])  # not what is installed
    assert config["analytics_enabled"] is False


def test_the_spaces_settings(tmp_path):
    assert main(["space", "--export", str(tmp_path / "space")]) == 0
    front = (tmp_path / "space" / "README.md").read_text().split("---")[1]
    for line in ("sdk: gradio", "app_file: app.py", "license: apache-2.0"):
        assert f"\n{line}\n" in front
    requirements = (tmp_path / "space" / "requirements.txt").read_text().splitlines()
    assert "torch < 2.12" in requirements and "spaces" in requirements
