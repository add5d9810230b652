"""The table of stages is what every other place asks; a line more is a stage more."""

import ast
import logging
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from transformers.utils import is_torch_bf16_gpu_available

import vreflection_training
from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.card.facts import options_table, training_table
from vreflection_training import VReflectionSFTConfig
from vreflection_training.run.model_card import RunOrigin
from vreflection_training.stages import SFT_STAGES, STAGES


PACKAGE = Path(vreflection_training.__file__).parent
SLOTS = [(stage, slots) for stage in SFT_STAGES for slots in STAGES[stage].slots]


def settings(folder="unused", **options):
    return VReflectionSFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", **options)


def facts(args):
    return RunOrigin(None).facts(args, steps=1, max_steps=1, versions={})


@pytest.mark.parametrize("stage", SFT_STAGES)
def test_options_of_a_stage_are_fields_of_the_configuration(stage):
    assert set(STAGES[stage].options) <= {field.name for field in fields(VReflectionSFTConfig)}
    assert set(STAGES[stage].trains) <= {"bcm", "dac"}


# design.md: what fills the slots, λ_BCM, λ_DAC, λ_feat and λ_attn, what L_attn aims at.
@pytest.mark.parametrize(
    "stage, expected",
    [
        ("path", ("bcm", 0.0, 1.0, 1.0, 0.1, "box")),
        ("1", ("bcm", 0.1, 0.0, 0.0, 0.0, None)),
        ("2", ("dac", 0.0, 0.1, 1.0, 1.0, "teacher")),
        ("joint", ("dac", 0.1, 0.1, 1.0, 1.0, "teacher")),
        ("sft", (None, 0.0, 0.0, 0.0, 0.0, None)),
    ],
)
def test_what_is_left_out_is_the_stages(stage, expected):
    args = settings(stage=stage)
    weights = args.lambda_bcm, args.lambda_dac, args.lambda_feat, args.lambda_attn
    assert (args.latent_inputs, *weights, args.attention_target) == expected
    again = replace(args)  # as `copy`s of a configuration are made, from what was filled in
    assert again.to_dict() == args.to_dict()


def test_the_default_is_path():
    assert settings().stage == "path"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lambda_bcm": 0.1}, "`stage='path'` has no loss that `lambda_bcm` weighs: leave it out, got 0.1"),
        ({"stage": "1", "lambda_attn": 1.0}, "no loss that `lambda_attn` weighs"),
        ({"stage": "sft", "lambda_dac": 0.5}, "no loss that `lambda_dac` weighs"),
        ({"stage": "1", "attention_target": "box"}, "`stage='1'` has no L_attn: leave `attention_target` out"),
        ({"attention_target": "map"}, "`attention_target` must be 'teacher' or 'box', got 'map'"),
        ({"latent_feedback": "bcm"}, "`latent_feedback` must be 'hidden' or 'dac', got 'bcm'"),
        ({"latent_inputs": "hidden"}, "In stage path `latent_inputs` must be 'bcm' or 'dac', got 'hidden'"),
        ({"latent_inputs": "dac", "dac_inputs_share": 0.0}, r"`dac_inputs_share` must lie in \(0, 1\], got 0.0"),
        ({"dac_inputs_share": 0.5}, "set `latent_inputs='dac'` there, or leave it out, got 0.5"),
        ({"stage": "2", "dac_inputs_share": 0.5}, "steps of stage 'path'"),
    ],
)
def test_what_a_stage_does_not_have_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        settings(**options)


def test_bf16_is_off_by_itself_where_no_gpu_has_it(tmp_path):
    if is_torch_bf16_gpu_available():
        pytest.skip("a GPU has it")
    assert not VReflectionSFTConfig(str(tmp_path), report_to="none").bf16
    with pytest.raises(ValueError, match="no GPU here has bfloat16: leave `bf16` out"):
        VReflectionSFTConfig(str(tmp_path), report_to="none", bf16=True)
    assert VReflectionSFTConfig(str(tmp_path), report_to="none", bf16=True, use_cpu=True).bf16


def test_a_weight_of_zero_may_be_given_anywhere():
    assert settings(lambda_bcm=0.0).lambda_bcm == 0.0


def test_one_more_line_of_the_table_is_one_more_stage(monkeypatch, make_trainer, model):
    weights = {"lambda_bcm": 0.2, "lambda_dac": 1.0, "lambda_feat": 0.5, "lambda_attn": 0.1}
    line = replace(STAGES["joint"], title="one more", slots={"bcm": "dac"}, weights=weights)
    monkeypatch.setitem(STAGES, "more", line)
    args = settings(stage="more")
    assert args.latent_inputs == "bcm" and args.latent_feedback == "dac"
    known = facts(args)
    assert known["runs"][0]["losses"] == {"L_BCM": 0.2, "L_feat": 0.5, "L_attn": 0.1}
    assert "| one more |" in training_table(known)
    trainer = make_trainer(stage="more", max_steps=1)
    assert trainer.model.generation_config.latent_feedback == "dac"
    frozen = {name.split(".")[1] for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {"visual"}
    trainer.train()
    log = trainer.state.log_history[0]
    expected = log["loss_ce"] + 0.2 * log["loss_bcm"] + 0.5 * log["loss_feat"] + 0.1 * log["loss_attn"]
    assert log["loss"] == pytest.approx(expected, rel=1e-5) and "student_inside_box" in log


@pytest.mark.parametrize("stage, slots", SLOTS)
def test_what_is_trained_is_what_decodes(make_trainer, model, stage, slots):
    """design.md: a stage whose slots hold what DAC sees, or is taught to see, decodes with `dac`."""
    expected = "dac" if stage == "path" or slots == "dac" else "hidden"
    decoding = model.generation_config
    decoding.latent_feedback, decoding.latent_steps = "hidden" if expected == "dac" else "dac", 5
    make_trainer(stage=stage, latent_inputs=slots)
    assert (decoding.latent_feedback, decoding.latent_steps) == (expected, model.config.num_latent_tokens)


def test_plain_fine_tuning_keeps_the_decoding_that_the_model_came_with(make_trainer, model):
    decoding = model.generation_config
    decoding.latent_feedback, decoding.latent_steps = "dac", 5
    make_trainer(stage="sft")
    assert (decoding.latent_feedback, decoding.latent_steps) == ("dac", 5)


@pytest.mark.parametrize("stage, set_to, said", [("path", "hidden", "not 'dac'"), ("sft", "dac", "the model's own")])
def test_a_set_feedback_wins_and_is_told(make_trainer, model, caplog, stage, set_to, said):
    logger = logging.getLogger("vreflection_training.sft_trainer")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    try:
        trainer = make_trainer(stage=stage)
        assert not caplog.text
        trainer = make_trainer(stage=stage, latent_feedback=set_to)
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(logging.NOTSET)
    assert model.generation_config.latent_feedback == set_to
    assert f"`latent_feedback={set_to!r}`, as set" in caplog.text and said in caplog.text
    assert f"| latent_feedback | `{set_to}` |" in options_table(facts(trainer.args))


@pytest.mark.parametrize(
    "config, options, message",
    [
        ({"query_position": "at"}, {"stage": "path"}, "needs `dac_queries='states'` and `query_position='before'`"),
        ({"query_position": "at"}, {"stage": "2"}, "can't decode so"),
        ({"dac_queries": "static"}, {"stage": "joint"}, "needs `dac_queries='states'`"),
        ({"has_dac": False}, {"stage": "1", "latent_feedback": "dac"}, "needs a checkpoint with DAC"),
    ],
)
def test_a_feedback_that_the_checkpoint_cannot_decode_is_refused_at_the_start(
    make_trainer, checkpoint, config, options, message
):
    model = VReflectionForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, **config)
    with torch.no_grad():
        model.model.bcm.norm.bias.fill_(0.01)
    before = model.generation_config.to_dict()
    with pytest.raises(ValueError, match=rf"{message}(.|\n)*se `latent_feedback='hidden'`"):
        make_trainer(trained=model, **options)
    assert model.generation_config.to_dict() == before
    make_trainer(trained=model, **{**options, "latent_feedback": "hidden"})


def test_the_last_share_of_the_steps_holds_what_dac_sees():
    args = settings(latent_inputs="dac", dac_inputs_share=0.3)
    assert [args.latent_inputs_at(step, 10) for step in range(10)] == ["bcm"] * 7 + ["dac"] * 3
    assert args.latent_inputs_at(0, 1) == "dac"  # the last step always
    assert args.latent_inputs_at(0, 0) == "dac"  # an evaluation without training
    whole = settings(latent_inputs="dac")
    assert {whole.latent_inputs_at(step, 10) for step in range(10)} == {"dac"}
    assert {settings().latent_inputs_at(step, 10) for step in range(10)} == {"bcm"}
    assert {settings(stage="2").latent_inputs_at(step, 10) for step in range(10)} == {"dac"}


@pytest.mark.parametrize(
    "options, trains",
    [
        ({}, ("bcm", "dac")),
        ({"latent_inputs": "dac"}, ("dac",)),
        ({"latent_inputs": "dac", "dac_inputs_share": 0.5}, ("bcm", "dac")),
        ({"bcm_receives_ce": False}, ("dac",)),
        ({"latent_inputs": "dac", "dac_inputs_share": 0.5, "bcm_receives_ce": False}, ("dac",)),
        ({"stage": "1", "bcm_receives_ce": False}, ("bcm",)),
        ({"stage": "2", "latent_inputs": "bcm"}, ("dac",)),
        ({"stage": "joint"}, ("bcm", "dac")),
        ({"stage": "sft"}, ()),
    ],
)
def test_bcm_trains_where_a_gradient_can_reach_it(options, trains):
    args = settings(**options)
    assert args.trains == trains and args.distils_frozen_bcm == (trains == ("dac",))


def test_data_imports_nothing_above_it():
    for file in (PACKAGE / "data").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1), f"{file.name} imports {node.module}"
