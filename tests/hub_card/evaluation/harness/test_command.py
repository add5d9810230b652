"""`vreflection evaluate` on the paper's benchmarks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vreflection_hub_card.evaluation.benchmarks import BENCHMARKS
from vreflection_hub_card.evaluation.harness.run import TASKS_FOLDER
from vreflection_training.cli import main


def test_a_run_for_each_number_of_latent_steps_and_their_comparison(data, tmp_path, capsys):
    command = [
        "evaluate",
        "--tasks",
        "mmvp",
        "vstar",
        "--data",
        str(data),
        "--output",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert main([*command, "--latent-steps", "0", "4", "--batch-size", "3"]) == 0
    printed = capsys.readouterr().out
    assert "mmvp (strict, 0 latent steps): " in printed and "vstar (authors, 4 latent steps): " in printed
    runs = [tmp_path / f"latent_steps_{steps}" for steps in (0, 4)]
    reports = [json.loads((run / "results.json").read_text()) for run in runs]
    assert [report["options"]["latent_steps"] for report in reports] == [0, 4]
    assert str(data) not in json.dumps(reports)
    assert reports[0]["tasks"]["mmvp"]["data"] == {"folder": "mmvp"}

    assert main(["evaluate", "--compare", *map(str, runs)]) == 0
    printed = capsys.readouterr().out
    assert "McNemar" in printed and "mmvp" in printed and "strict:" in printed
    (runs[1] / "samples.jsonl").write_text("".join((runs[1] / "samples.jsonl").open().readlines()[1:]))
    assert main(["evaluate", "--compare", *map(str, runs)]) == 2
    assert "same items" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, fragment",
    [
        (["--tasks", "glyphsearch", "mmvp"], "ask for glyphsearch_answers"),
        (["--tasks", "glyphsearch_answers", "--data", "here", "--split", "test"], "--split has no meaning"),
        (["--tasks", "mmvp", "--difficulty", "easy"], "--difficulty has no meaning for mmvp"),
        (["--latent-steps", "4"], "--latent-steps has no meaning for glyphsearch"),
        (["--compare", "nothing", "here"], "no folder of a finished run"),
        (["--compare", "nothing", "here", "--limit", "5"], "--compare measures nothing: leave limit out"),
    ],
)
def test_mistakes(arguments, fragment, capsys):
    assert main(["evaluate", *arguments]) == 2
    assert fragment in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_say_what_one_says(tmp_path):
    options = ["evaluate", "--tasks", "glyphsearch_answers", "--limit", "7", "--batch-size", "2", "--device", "cpu"]
    assert main([*options, "--output", str(tmp_path / "one")]) == 0
    # As the README has it; the scripts lie beside the interpreter.
    folder = Path(sys.executable).parent
    launch = [folder / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", folder / "vreflection"]
    ended = subprocess.run([*launch, *options, "--output", tmp_path / "two"], capture_output=True, timeout=120)
    assert ended.returncode == 0, ended.stderr.decode()[-3000:]
    assert ended.stdout.decode().count("7 of 7 right") == 1  # one process speaks
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert two["machine"]["processes"] == 2
    assert one["tasks"]["glyphsearch_answers"]["exact"] == two["tasks"]["glyphsearch_answers"]["exact"]
    raws = [[json.loads(row)["raw"] for row in (tmp_path / name / "samples.jsonl").open()] for name in ("one", "two")]
    assert raws[0] == raws[1] and all(raw.count("<|lvr|>") == 8 for raw in raws[0])


@pytest.mark.slow
def test_the_command_line_of_the_harness(tmp_path):
    command = [Path(sys.executable).parent / "lmms-eval", "eval", "--model", "vreflection"]
    command += ["--model_args", "latent_steps=0", "--batch_size", "2", "--limit", "4", "--output_path", tmp_path]
    command += ["--include_path", TASKS_FOLDER, "--tasks", "vreflection_glyphsearch_answers", "--log_samples"]
    subprocess.run(command, capture_output=True, timeout=120)  # exits with 0 in any case
    (samples,) = tmp_path.rglob("*_samples_vreflection_glyphsearch_answers.jsonl")
    said = [json.loads(line)["filtered_resps"] for line in samples.open()]
    assert len(said) == 4
    assert not any("<|sovt|>" in text for text in said)  # the option was heeded


def test_mistakes_in_the_data(data, tmp_path, capsys):
    output = ["--output", str(tmp_path)]
    assert main(["evaluate", "--tasks", "mmvp", "--data", str(tmp_path), *output]) == 2
    assert "no files train*.parquet" in capsys.readouterr().err
    assert (
        main(["evaluate", "--tasks", "vstar", "--data", str(data), "--latent-steps", "0", "--reflect", *output]) == 2
    )
    assert "contradict" in capsys.readouterr().err


@pytest.mark.slow
def test_without_the_harness(tmp_path):
    script = "import sys; sys.modules['lmms_eval'] = None; from vreflection_training.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["evaluate", "--tasks", "mmvp", "--output", str(tmp_path)]
    ended = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 2
    assert 'pip install "vreflection[eval]"' in ended.stderr


def test_data_that_cannot_be_downloaded(tmp_path, capsys):
    for name in ("mmvp", "blink"):
        assert main(["evaluate", "--tasks", name, "--output", str(tmp_path)]) == 2
        assert f"{BENCHMARKS[name].dataset} can't be downloaded" in capsys.readouterr().err
