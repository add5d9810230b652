"""The table of stages is what every other place asks; a line more is a stage more."""

import ast
from dataclasses import fields, replace
from pathlib import Path

import pytest

import vreflection_training
from vreflection_hub_card.card.facts import training_table
from vreflection_training import VReflectionSFTConfig
from vreflection_training.run.model_card import RunOrigin
from vreflection_training.stages import STAGES


PACKAGE = Path(vreflection_training.__file__).parent
# The table's next line, as design.md has it.
PATH = replace(
    STAGES["joint"], title="a path", latent_inputs=("bcm",), losses=("L_feat", "L_attn"), latent_feedback="dac"
)


@pytest.fixture
def path(monkeypatch):
    monkeypatch.setitem(STAGES, "path", PATH)


def settings(folder, **options):
    return VReflectionSFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", **options)


@pytest.mark.parametrize("stage", STAGES)
def test_options_of_a_stage_are_fields_of_the_configuration(stage):
    assert set(STAGES[stage].options) <= {field.name for field in fields(VReflectionSFTConfig)}
    assert set(STAGES[stage].trains) <= {"bcm", "dac"}


def test_one_more_line_of_the_table_is_one_more_stage(path, make_trainer, model, tmp_path):
    args = settings(tmp_path, stage="path", lambda_dac=1.0, lambda_attn=0.1)
    assert args.latent_inputs == "bcm"
    with pytest.raises(ValueError, match="In stage path `latent_inputs` must be 'bcm', got 'dac'"):
        settings(tmp_path, stage="path", latent_inputs="dac")
    facts = RunOrigin(None).facts(args, steps=1, max_steps=1, versions={})
    assert facts["runs"][0]["losses"] == {"L_feat": 1.0, "L_attn": 0.1} and "| a path |" in training_table(facts)
    model.generation_config.latent_feedback = "hidden"
    trainer = make_trainer(stage="path", max_steps=1, lambda_dac=1.0, lambda_attn=0.1)
    assert trainer.model.generation_config.latent_feedback == "dac"
    frozen = {name.split(".")[1] for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {"visual"}
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["loss_ce"] + log["loss_feat"] + 0.1 * log["loss_attn"], rel=1e-5)
    assert "loss_bcm" not in log and "student_inside_box" in log


def test_a_stage_keeps_the_feedback_that_the_model_came_with(make_trainer, model):
    model.generation_config.latent_feedback = "dac"
    make_trainer(stage="1")
    assert model.generation_config.latent_feedback == "dac"


def test_data_imports_nothing_above_it():
    for file in (PACKAGE / "data").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1), f"{file.name} imports {node.module}"
