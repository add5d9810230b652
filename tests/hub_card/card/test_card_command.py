"""`vreflection card`."""

import shutil

import pytest

from vreflection_hub_card.card import TRAINING_FACTS, check_card
from vreflection_hub_card.inference.checkpoints import EMBEDDED
from vreflection_training.cli import main


def test_a_card_with_what_the_command_says(tmp_path, capsys):
    folder = tmp_path / "mine"
    shutil.copytree(EMBEDDED, folder)
    (folder / TRAINING_FACTS).unlink()
    assert main(["card", str(folder)]) == 2
    assert "base_model" in capsys.readouterr().err
    base = "Qwen/Qwen2.5-VL-7B-Instruct"
    given = ["--repo", "ann/mine", "--base-model", base, "--datasets", "ann/rows", "--tags", "reports"]
    assert main(["card", str(folder), *given]) == 0
    data = check_card(folder).data
    assert (data.base_model, data.license, data.model_name) == (base, None, "mine")
    assert data.datasets == ["ann/rows"] and "reports" in data.tags
    assert 'from_pretrained("ann/mine"' in (folder / "README.md").read_text()
    license = ["--license", "other", "--license-name", "mine", "--license-link", "https://example.org/mine"]
    assert main(["card", str(folder), *given, *license]) == 0
    assert check_card(folder).data.license_name == "mine"
    assert "[mine](https://example.org/mine)" in (folder / "README.md").read_text()


@pytest.mark.parametrize("option", ["--results", "--study"])
def test_a_device_is_no_file_of_results(tmp_path, capsys, option):
    """/dev/full never ends: it filled the memory."""
    shutil.copytree(EMBEDDED, tmp_path / "mine")
    assert main(["card", str(tmp_path / "mine"), option, "/dev/full"]) == 2
    assert "/dev/full: a pipe or a device" in capsys.readouterr().err
