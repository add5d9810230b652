import copy
import importlib.util
import logging
import math

import devices
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from run_helpers import Rows, every_stage, gradients, moved, on_both_backbones
from transformers import AutoModelForImageTextToText

from vreflection_hub_card.glyphsearch import glyphsearch_dataset
from vreflection_training import VReflectionDataCollator, VReflectionSFTConfig, VReflectionSFTTrainer
from vreflection_training.collator import NON_MODEL_KEYS
from vreflection_training.losses import latent_losses, states_learn
from vreflection_training.stages import STAGES


@on_both_backbones
@pytest.mark.parametrize(
    "options, trained, frozen",
    [
        ({"stage": "sft"}, ("language_model",), ("visual", "bcm", "dac")),
        ({}, ("language_model", "bcm", "dac"), ("visual",)),
        ({"latent_inputs": "dac"}, ("language_model", "dac"), ("visual", "bcm")),
        ({"bcm_receives_ce": False}, ("language_model", "dac"), ("visual", "bcm")),
        ({"stage": "sft", "freeze_vision": False}, ("language_model", "visual"), ("bcm", "dac")),
        ({"stage": "1"}, ("language_model", "bcm"), ("visual", "dac")),
        ({"stage": "1", "latent_inputs": "hidden", "bernoulli_p": 0.0}, ("language_model", "bcm"), ("visual", "dac")),
        ({"stage": "2"}, ("language_model", "dac"), ("visual", "bcm")),
        ({"stage": "2", "latent_inputs": "bcm"}, ("language_model", "dac"), ("visual", "bcm")),
        ({"stage": "2", "latent_inputs": "hidden"}, ("language_model", "dac"), ("visual", "bcm")),
        ({"stage": "joint", "bernoulli_p": 0.0}, ("language_model", "bcm", "dac"), ("visual",)),
    ],
)
def test_every_trainable_parameter_moves_and_frozen_ones_keep_each_bit(make_trainer, model, options, trained, frozen):
    before = copy.deepcopy(model.state_dict())
    make_trainer(weight_decay=0.0, **options).train()
    changed = moved(before, model.state_dict())
    for name, parameter in model.named_parameters():
        part = name.split(".")[1]
        if part in frozen:
            assert not parameter.requires_grad and name not in changed
        else:
            assert part in trained
            # A key's bias shifts all of a query's scores alike, and softmax doesn't see it: its gradient is rounding.
            assert name in changed or name.endswith("k_proj.bias")


@pytest.mark.parametrize(
    "options, names",
    [
        ({"stage": "sft"}, set()),
        ({"stage": "path"}, {"loss_feat", "loss_attn"}),
        ({"stage": "1"}, {"loss_bcm"}),
        ({"stage": "2"}, {"loss_feat", "loss_attn"}),
        ({"stage": "joint"}, {"loss_bcm", "loss_feat", "loss_attn"}),
    ],
)
def test_the_total_is_the_weighted_sum_of_the_logged_components(make_trainer, options, names):
    weights = {"lambda_bcm": 0.3, "lambda_dac": 0.2, "lambda_feat": 0.7, "lambda_attn": 1.3}
    weights = {name: weight for name, weight in weights.items() if name in STAGES[options["stage"]].weights}
    trainer = make_trainer(max_steps=1, **options, **weights)
    trainer.train()
    log = trainer.state.log_history[0]
    assert {name for name in log if name.startswith("loss_")} == names | {"loss_ce"}
    factors = {"loss_ce": 1, "loss_bcm": 0.3, "loss_feat": 0.14, "loss_attn": 0.26}
    assert log["loss"] == pytest.approx(sum(factors[name] * log[name] for name in names | {"loss_ce"}), rel=1e-5)


@pytest.mark.parametrize("stage", ["path", *(pytest.param(stage, marks=pytest.mark.slow) for stage in "12")])
def test_accumulated_micro_batches_equal_one_batch(make_trainer, checkpoint, model, stage):
    # Rows of different lengths, and one without a reflection, so that micro-batches weigh differently.
    scenes = glyphsearch_dataset("train", 3)
    plain = {"id": "text", "images": [], "messages": [{"role": "user", "content": "Hello"}]}
    plain["messages"].append({"role": "assistant", "content": "Which glyph is on the red cross?"})
    data = [scenes[0], scenes[1], scenes[2], plain]
    other = copy.deepcopy(model)
    options = {"stage": stage, "optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "weight_decay": 0.0}
    whole = make_trainer(Rows(data), per_device_train_batch_size=4, **options)
    parts = make_trainer(
        Rows(data), trained=other, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options
    )
    expected, got = gradients(whole), gradients(parts)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=2e-5, msg=name)
    for name, value in whole.state.log_history[0].items():
        if name.startswith("loss"):
            assert parts.state.log_history[0][name] == pytest.approx(value, rel=1e-4), name


def test_a_zero_weight_is_the_cross_entropy_alone(make_trainer, model, processor, rows):
    other = copy.deepcopy(model)
    trainer = make_trainer(stage="1", lambda_bcm=0.0, optim="sgd", learning_rate=1.0, max_steps=1, weight_decay=0.0)
    got = gradients(trainer)
    batch = VReflectionDataCollator(processor, model.config)([rows[0], rows[1]])
    labels = batch["labels"].to(model.device)
    batch = {key: value.to(model.device) for key, value in batch.items() if key not in NON_MODEL_KEYS}
    other.model.visual.requires_grad_(False)
    logits = other(**batch, latent_inputs="bcm").logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in other.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got[name], expected, rtol=1e-3, atol=1e-5, msg=name)


def test_the_bernoulli_draw_depends_on_seed_and_step_alone():
    draws = [states_learn(3, step, 0.5) for step in range(2000)]
    assert draws == [states_learn(3, step, 0.5) for step in range(2000)]
    assert draws != [states_learn(4, step, 0.5) for step in range(2000)]
    assert 0.45 < sum(draws) / 2000 < 0.55
    assert not any(states_learn(3, step, 0.0) for step in range(100))
    assert all(states_learn(3, step, 1.0) for step in range(100))


@pytest.mark.parametrize("states, learner, frozen", [(1.0, "language_model", "bcm"), (0.0, "bcm", "language_model")])
def test_the_draw_decides_who_learns_from_the_alignment(make_trainer, model, states, learner, frozen):
    """With the cross-entropy taken away, Eq. 2 leaves one side without a gradient.

    The slots are filled with detached latents here, since Eq. 2 reaches BCM through them otherwise.
    """

    class AlignmentOnly(VReflectionSFTTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            inputs = {key: value for key, value in inputs.items() if key not in NON_MODEL_KEYS}
            outputs = model(**inputs, latent_inputs="bcm", bcm_receives_ce=False)
            return latent_losses(outputs, self.args, global_step=0, num_segments=2)[1]["L_BCM"]

    trainer = make_trainer(stage="1", bernoulli_p=states)
    trainer.__class__ = AlignmentOnly
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    trainer.compute_loss(model, trainer._prepare_inputs(batch)).backward()
    got = {
        name.split(".")[1] for name, value in model.named_parameters() if value.grad is not None and value.grad.any()
    }
    assert learner in got and frozen not in got


def test_stage_2_refuses_an_untrained_teacher_unless_allowed(make_trainer, model):
    with torch.no_grad():
        model.model.bcm.norm.bias.zero_()
    with pytest.raises(ValueError, match="never trained: start from a stage 1 checkpoint, or set"):
        make_trainer(stage="2")
    make_trainer(stage="2", allow_untrained_bcm=True, max_steps=1).train()


@pytest.mark.parametrize("latent_inputs", ["hidden", "dac"])
def test_stage_2_runs_without_any_teacher(make_trainer, checkpoint, latent_inputs):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32, has_bcm=False)
    options = {"stage": "2", "latent_inputs": latent_inputs, "allow_untrained_bcm": True, "max_steps": 1}
    # Questions of several lengths: without a teacher the states fill the slots, which then start in one column.
    rows = glyphsearch_dataset("train", 16, "mixed")
    trainer = make_trainer(rows, trained=model, per_device_train_batch_size=16, **options)
    trainer.train()
    log = trainer.state.log_history[0]
    assert "loss_attn" in log and "loss_feat" not in log
    with pytest.raises(ValueError, match="trains BCM"):
        make_trainer(trained=model, stage="1")


def test_a_batch_without_any_reflection_trains(make_trainer):
    rows = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Which glyph"}]
    data = Dataset.from_list([{"id": str(number), "messages": rows} for number in range(4)])
    trainer = make_trainer(data, stage="1")
    trainer.train()
    assert "loss_bcm" not in trainer.state.log_history[0]


@pytest.mark.parametrize("where, name", [("lm_head", "loss"), ("bcm", "Z_T"), ("norm", "H")])
def test_a_non_finite_loss_stops_the_run_with_the_samples(make_trainer, model, where, name):
    parameter = {
        "lm_head": model.model.language_model.embed_tokens.weight[5:6],
        "bcm": model.model.bcm.norm.weight,
        "norm": model.model.language_model.norm.weight,
    }[where]
    with torch.no_grad():
        parameter.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match=f"^{name} is not finite; the batch's samples: glyphsearch-train-0, gl"
    ):
        make_trainer(stage="1").train()


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_vision_encoder_is_not_run_backwards(make_trainer, model, frozen):
    """Gradient checkpointing lets its input require gradients, and so its output would."""
    graphs = []
    hook = model.model.visual.register_forward_hook(lambda module, args, out: graphs.append(out.pooler_output))
    make_trainer(stage="1", max_steps=1, gradient_checkpointing=True, freeze_vision=frozen).train()
    hook.remove()
    assert [features.requires_grad for features in graphs] == [not frozen]


@on_both_backbones
@every_stage
def test_gradient_checkpointing_changes_nothing(make_trainer, model, stage):
    other = copy.deepcopy(model)
    options = {"stage": stage, "optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "weight_decay": 0.0}
    expected = gradients(make_trainer(**options))
    got = gradients(make_trainer(trained=other, **{**options, "gradient_checkpointing": True}))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_evaluation_logs_the_components(make_trainer, rows):
    trainer = make_trainer(stage="joint")
    metrics = trainer.evaluate(rows.select(range(3)))
    assert metrics["eval_loss"] > 0
    log = trainer.state.log_history[-1]
    assert {"eval_loss_ce", "eval_loss_bcm", "eval_loss_feat", "eval_loss_attn"} <= set(log)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stage": 3}, "`stage` must be one of path, 1, 2, joint, sft"),
        ({"alignment": "both"}, "`alignment` must be one of"),
        ({"latent_loss": "l2"}, "`latent_loss`"),
        ({"latent_inputs": "teacher"}, "`latent_inputs`"),
        ({"stage": "1", "bernoulli_p": 1.5}, "`bernoulli_p` must lie in"),
        ({"lambda_bcm": -1.0}, "`lambda_bcm` must not be negative"),
        ({"attention_temperature": 0.0}, "`attention_temperature` must be above 0"),
        ({"stage": "sft", "latent_inputs": "bcm"}, "no slots to fill"),
        ({"stage": "1", "latent_inputs": "dac"}, "In stage 1 `latent_inputs` must be 'bcm' or 'hidden', got 'dac'"),
        (
            {"stage": "2", "latent_inputs": "hidden", "gradient_checkpointing": True},
            "set `gradient_checkpointing=False`",
        ),
        ({"packing": True}, "set `sample_packing=True` instead"),
        ({"stage": "1", "sample_packing": True, "latent_inputs": "hidden"}, "set `sample_packing=False`"),
        ({"sample_packing": True, "train_sampling_strategy": "group_by_length"}, "must be 'random' or 'sequential'"),
        ({"max_samples_per_pack": 0}, "`max_samples_per_pack` must be at least 1, got 0"),
        ({"on_bad_row": "warn"}, "`on_bad_row` must be one of error, skip"),
        ({"sample_every": -1}, "`sample_every` must not be negative"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"shuffle_dataset": True}, "shuffle_dataset"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of"),
        ({"dataset_text_field": "caption"}, "dataset_text_field"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
    ],
)
def test_wrong_settings_raise(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        VReflectionSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize("name", ["formatting_func", "compute_loss_func"])
def test_functions_that_would_never_be_called_are_refused(model, processor, rows, name, tmp_path):
    args = VReflectionSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match=name):
        VReflectionSFTTrainer(model, args, processing_class=processor, train_dataset=rows, **{name: print})


def test_the_processor_is_found_from_the_model(model, checkpoint, processor, rows, tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    for given in (model, str(checkpoint), checkpoint):
        trainer = VReflectionSFTTrainer(given, VReflectionSFTConfig(stage="1", **options), train_dataset=rows)
        for found in (trainer.processing_class, trainer.data_collator.processor):
            assert found.chat_template == processor.chat_template and found.num_latent_tokens == 8
    model.name_or_path = ""
    with pytest.raises(ValueError, match="not loaded from a checkpoint.*give a `processing_class`"):
        VReflectionSFTTrainer(model, VReflectionSFTConfig(**options), train_dataset=rows)


@pytest.mark.parametrize("packing", [False, True])
def test_a_plain_list_trains_like_a_data_set(make_trainer, model, rows, packing):
    """Its rows may have other keys each, and their pictures are the objects that the user has."""
    text = {"id": "text", "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "red"}]}
    stored = [rows[0], rows[1], {**text, "images": []}, rows[2]]
    listed = [{name: rows[0][name] for name in ("images", "messages")}, {**rows[1], "source": "x"}, text, rows[2]]
    other = copy.deepcopy(model)
    options = {"sample_packing": packing, "max_steps": 1, "per_device_train_batch_size": 1 if packing else 4}
    options |= {"optim": "sgd", "weight_decay": 0.0}
    expected = gradients(make_trainer(Rows(stored), **options))
    trainer = make_trainer(listed, trained=other, eval_dataset=listed[:1], **options)
    assert trainer.eval_dataset[0]["images"] is listed[0]["images"] and trainer.eval_dataset[0]["id"] == "row 0"
    got = gradients(trainer)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in got)


@pytest.mark.parametrize(
    "rows, error, message",
    [
        ([], ValueError, "`train_dataset` is an empty list"),
        ([{"messages": []}, "row"], TypeError, r"`train_dataset\[1\]` must be a row.*got `str`"),
        ((row for row in ()), TypeError, "must be a `Dataset` or `IterableDataset`, got `generator`"),
    ],
)
def test_what_is_no_list_of_rows_is_refused(make_trainer, rows, error, message):
    with pytest.raises(error, match=message):
        make_trainer(rows)


@on_both_backbones
@every_stage
def test_a_pack_trains_like_its_samples(make_trainer, model, rows, stage):
    other = copy.deepcopy(model)
    plain = {"id": "text", "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "red"}]}
    data = Rows([rows[0], {"images": [], **plain}, rows[1], rows[2]])
    options = {"stage": stage, "optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "weight_decay": 0.0}
    padded = make_trainer(data, per_device_train_batch_size=4, **options)
    packed = make_trainer(data, trained=other, per_device_train_batch_size=1, sample_packing=True, **options)
    expected, got = gradients(padded), gradients(packed)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=2e-5, msg=name)
    (one, *_), (two, *_) = padded.state.log_history, packed.state.log_history
    for name in ("loss", "loss_ce", "loss_bcm", "loss_attn", "reflections", "num_tokens", "student_inside_box"):
        assert (name in one) == (name in two)
        assert name not in one or two[name] == pytest.approx(one[name], rel=1e-4), name
    assert one["padding"] > 0 and two["padding"] == 0
    assert one["reflections"] == (0.75 if stage != "sft" else 0.0)


@on_both_backbones
@pytest.mark.parametrize("region_pooling", ["patch", "roi_align"])
def test_both_poolings_train(make_trainer, checkpoint, region_pooling):
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float32, region_pooling=region_pooling, patch_positions="none"
    ).to(devices.DEVICE)
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(
        trained=model, sample_packing=True, per_device_train_batch_size=1, gradient_checkpointing=True
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    changed = {name.split(".")[1] for name in moved(before, model.state_dict()) if name != "lm_head.weight"}
    assert changed == {"language_model", "bcm", "dac"}


@pytest.mark.parametrize("training", [True, False])
def test_no_logits_of_whole_sequences(make_trainer, model, rows, training):
    """Of 156 tokens a scene, four or so are the assistant's."""
    positions = []
    trainer = make_trainer(stage="2", max_steps=1)
    trainer.eval_dataset = rows
    hook = model.lm_head.register_forward_hook(lambda module, args, out: positions.append(out.shape[1]))
    trainer.train() if training else trainer.evaluate()
    hook.remove()
    assert positions and max(positions) < 10


@pytest.mark.slow
def test_every_sample_every_steps_there_is_a_picture(make_trainer, tmp_path):
    make_trainer(stage="2", max_steps=5, sample_every=2, gradient_accumulation_steps=2, sample_packing=True).train()
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        f"step-{step}-row-{row}.png" for step in (2, 4) for row in (1, 2)
    ]


def test_collapsed_latents_are_said(make_trainer, model, caplog):
    assert "latent_spread" in run_log(make_trainer(stage="1"))[-1] and "nearly equal" not in caplog.text
    with torch.no_grad():  # the states of all samples become the norm's bias
        model.model.language_model.norm.weight.zero_()
    logger = logging.getLogger("vreflection_training.run.trainer_mixin")
    logger.addHandler(caplog.handler)
    try:
        trainer = make_trainer(stage="1", learning_rate=0.0)
        hook = model.model.language_model.norm.register_forward_hook(lambda module, args, out: out + 1)
        log = run_log(trainer)
    finally:
        hook.remove()
        logger.removeHandler(caplog.handler)
    assert log[-1]["latent_spread"] < 1e-3 and "latents of different samples are nearly equal" in caplog.text


def run_log(trainer):
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def test_metrics_against_a_computation_by_hand(make_trainer, model, processor, rows):
    log = run_log(make_trainer(stage="1", max_steps=1, learning_rate=0.0))[0]
    batch = VReflectionDataCollator(processor, model.config)([rows[0], rows[1]])
    batch = {key: value.to(model.device) for key, value in batch.items() if key not in NON_MODEL_KEYS}
    outputs = model(**batch, latent_inputs="bcm")
    distance = (outputs.latent_states - outputs.teacher_latents).abs().mean().item()
    assert log["latent_distance"] == pytest.approx(distance, rel=1e-5)
    h = outputs.latent_states.double()  # two segments: one minus their inner product over their mean square
    spread = ((1 - (h[0] * h[1]).sum(1) / ((h[0] ** 2).sum(1) + (h[1] ** 2).sum(1)) * 2).mean() ** 0.5).item()
    assert log["latent_spread"] == pytest.approx(spread, rel=1e-4)
    assert log["teacher_inside_box"] == pytest.approx(1)
    assert "student_inside_box" not in log  # as it was drawn: it says nothing
    assert log["tokens_per_second"] > 0


def test_several_gpus_in_one_process_are_refused(make_trainer, monkeypatch):
    monkeypatch.setattr(VReflectionSFTConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="One process sees 2 GPUs.*--accelerate_config ddp_8gpu"):
        make_trainer(stage="1")


def test_trackio_is_the_default_where_it_is_installed(tmp_path):
    installed = importlib.util.find_spec("trackio") is not None
    args = VReflectionSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert args.report_to == (["trackio"] if installed else [])
    args = VReflectionSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="tensorboard")
    assert args.report_to == ["tensorboard"]


def test_packs_of_one_batch_and_flash_attention_are_refused(make_trainer, model):
    model.config.get_text_config()._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="set `per_device_train_batch_size=1`"):
        make_trainer(stage="1", sample_packing=True, per_device_train_batch_size=2)
