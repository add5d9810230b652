import json
import re
import subprocess
import sys

import pytest
import torch

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_training.cli import main, main_train
from vreflection_training.recipe import parse
from vreflection_training.recipe_files import RECIPES, find_file


def test_the_tiny_recipes_follow_one_another():
    base, first, second = (parse([name, "--use_cpu"]) for name in ("tiny_base", "tiny_stage1", "tiny_stage2"))
    assert [args.stage for *_, args in (base, first, second)] == ["sft", "1", "2"]
    assert base[0].from_scratch == "qwen2_5_vl" and not base[2].freeze_vision
    assert first[1].model_name_or_path == base[2].output_dir
    assert second[1].model_name_or_path == first[2].output_dir


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        short = "--max_steps 2 --per_device_train_batch_size 2 --dataloader_num_workers 0 --use_cpu --logging_steps 1 --report_to none"
        return main_train([*arguments, *short.split()])

    return run


def test_the_recipes_run_in_order_and_leave_checkpoints_without_pickles(run, tmp_path):
    for name in ("tiny_base", "tiny_stage1", "tiny_stage2"):
        assert run(name) == 0
        files = {path.name for path in (tmp_path / "outputs" / name).iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "modeling_vreflection.py"} <= files
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    model = VReflectionForConditionalGeneration.from_pretrained(tmp_path / "outputs" / "tiny_stage2")
    assert model.dtype == torch.bfloat16 and model.model.bcm.is_trained and model.model.dac.is_trained


def test_stage_2_of_the_base_is_refused(run, capsys):
    assert run("tiny_base") == 0
    assert run("tiny_stage2", "--model_name_or_path", "outputs/tiny_base") == 2
    assert "never trained: start from a stage 1 checkpoint" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_line(run, capsys):
    assert run("tiny_stage1", "--model_name_or_path", "no/such/model") == 2
    assert "vreflection: " in capsys.readouterr().err


def test_the_feedback_lands_in_the_generation_config_and_no_weight_in_the_config(run, tmp_path):
    assert run("tiny_base", "--latent_feedback", "dac", "--output_dir", "out") == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["latent_feedback"] == "dac"
    assert "lambda" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no_such_recipe"], "No recipe 'no_such_recipe'.*tiny_base"),
        (["tiny_base", "--stage", "4"], "invalid choice|must be one of"),
        (
            ["tiny_base", "--dataset_options", "{difficulty: mixed}"],
            "`dataset_options` must be JSON on the command line",
        ),
        (
            ["tiny_base", "--min_pixels", "9000000"],
            "must be a number above 0 and not above `max_pixels`, got 9000000 and",
        ),
        (["tiny_base", "--load_in_4bit", "true"], "set `use_peft: true`"),
        (["tiny_base", "--datasets", "[]"], "Set either `dataset_name` or `datasets`"),
        (["tiny_base", "--accelerate_config", "zero9"], "No configuration of accelerate 'zero9'.*fsdp2"),
        (["check", "no_such_recipe"], "No recipe 'no_such_recipe'"),
        (["tiny_stage1", "--from_scratch", "qwen3_vl"], "Set either `model_name_or_path` or `from_scratch`"),
    ],
)
def test_a_bad_command_line_is_one_clear_line(run, capsys, arguments, message):
    try:
        assert run(*arguments) == 2
    except SystemExit as stop:  # argparse's own refusal
        assert stop.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["ask", "--wrong"], ["nothing"], ["merge", "adapter"], ["evaluate", "--tasks", "none"], ["train", "no_such_recipe"], ["check", "no_such_recipe"]])  # fmt: skip
def test_help_and_wrong_arguments_import_neither_torch_nor_transformers(arguments):
    code = (
        "import sys; from vreflection_training.cli import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    loaded = set(ran.stdout.splitlines()[-1].split())
    assert "vreflection_training.cli" in loaded and not loaded & {"torch", "transformers", "trl", "datasets"}, (
        ran.stderr
    )


@pytest.mark.slow
def test_importing_the_trainer_prints_nothing():
    code = "from vreflection_training import VReflectionSFTTrainer"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0 and "gemm_4bit" not in ran.stderr


def test_an_unknown_key_in_a_recipe_is_refused(run, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(find_file("tiny_base", RECIPES, "recipe").read_text() + "\nlambda_bmc: 0.1\n")
    assert run(str(recipe)) == 2
    assert "lambda_bmc" in capsys.readouterr().err


def test_help_lists_the_recipes(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    assert "tiny_stage1" in capsys.readouterr().out


def test_check_reports_without_a_model(run, tmp_path, capsys):
    options = ["--sample_packing", "true", "--dataset_options", '{"split": "train", "count": 40}']
    assert run("check", "tiny_base", "--dataset_name", "glyphsearch", *options, "--histogram", "lengths.png") == 0
    said = capsys.readouterr().out
    assert re.search(r"rows +40\n", said) and "packs" in said
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG") and not (tmp_path / "outputs").exists()


def test_check_fails_on_bad_rows(run, tmp_path, capsys):
    row = {"id": "lost", "images": ["nowhere.png"], "messages": [{"role": "user", "content": [{"type": "image"}]}]}
    row["messages"].append({"role": "assistant", "content": [{"type": "text", "text": "Z"}]})
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    arguments = ["check", "tiny_base", "--dataset_name", "rows.jsonl", "--dataset_options", "{}"]
    assert run(*arguments) == 1 and "nowhere.png" in capsys.readouterr().out
    assert run(*arguments, "--on_bad_row", "skip") == 0
    evaluated = ["--eval_strategy", "steps", "--eval_steps", "1", "--eval_datasets", '[{"path": "rows.jsonl"}]']
    assert (
        run(
            "check",
            "tiny_base",
            "--dataset_name",
            "glyphsearch",
            "--dataset_options",
            '{"split": "train", "count": 2}',
            *evaluated,
        )
        == 1
    )
    assert "nowhere.png" in capsys.readouterr().out.split("Rows of the evaluation:")[1]


def test_options_of_accelerate_are_told_from_ours(monkeypatch, run):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    options = ["--accelerate_config", "ddp_8gpu", "--num_processes", "2", "--learning_rate", "0.1"]
    assert run("tiny_base", *options) == 0
    (command,) = launched
    assert command.config_file.endswith("ddp_8gpu.yaml") and command.num_processes == 2 and command.module
    assert command.training_script == "vreflection_training"
    assert command.training_script_args[:3] == ["tiny_base", "--learning_rate", "0.1"]
    assert "--num_processes" not in command.training_script_args


def test_check_wants_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["check", "qwen2_5_vl_7b_stage1"]) == 2
    assert "data/images" in capsys.readouterr().err


def test_a_configuration_of_accelerate_that_is_none(run, tmp_path, capsys):
    (tmp_path / "engine.yaml").write_text("a: [1")
    assert run("tiny_base", "--accelerate_config", str(tmp_path / "engine.yaml")) == 2
    assert "engine.yaml: no configuration of accelerate" in capsys.readouterr().err
