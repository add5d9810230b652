"""Training by reward: what was sampled is what is learned from."""

import copy
import json
import signal

import devices
import pytest
import torch
from randomise import randomise
from run_helpers import gradients, moved
from tiny_models import save_strong_backbone
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.glyphsearch import glyphsearch_dataset
from vreflection_hub_card.inference.encoding import encode_prompts
from vreflection_hub_card.rows import BadRow
from vreflection_training import VReflectionGRPOConfig, VReflectionGRPOTrainer
from vreflection_training.data.prompts import prompt_rows
from vreflection_training.rewards import exact_answer, latent_use, reflection_format


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model whose every answer depends on its latents, and that opens reflections at random."""
    folder = tmp_path_factory.mktemp("strong")
    torch.manual_seed(0)
    parts = VReflectionForConditionalGeneration.from_backbone(
        save_strong_backbone(tmp_path_factory.mktemp("stock"), "qwen2_5_vl"), dtype=torch.float32, num_latent_tokens=4
    )
    model, processor = parts
    randomise(model.model.dac, 1)
    model.generation_config.latent_feedback = "dac"
    prompts = prompt_rows(glyphsearch_dataset("train", 2, "chains"), processor)[:]["prompt"]
    with torch.no_grad():  # its logit lies above most where states are like those of prompts
        mean = model(**encode_prompts(processor, prompts, "cpu"), use_cache=False).last_hidden_state.mean((0, 1))
        model.get_input_embeddings().weight[model.config.latent_start_token_id] = 5.5 * mean / mean.square().sum()
    for part in parts:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor(start):
    return AutoProcessor.from_pretrained(start)


@pytest.fixture
def model(start):
    return AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32)


def length_reward(completion_ids, **kwargs):
    """Differs between answers of a random model."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


@pytest.fixture
def make(tmp_path, processor, model):
    def make(trained=model, reward_funcs=length_reward, rows=None, peft_config=None, **options):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 1,
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 20,
            "learning_rate": 1.0,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": devices.DEVICE.type == "cpu",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "max_grad_norm": 1e9,
            "report_to": "none",
        }
        return VReflectionGRPOTrainer(
            trained,
            reward_funcs,
            VReflectionGRPOConfig(**{**defaults, **options}),
            processing_class=processor,
            train_dataset=glyphsearch_dataset("train", 8, "chains") if rows is None else rows,
            peft_config=peft_config,
        )

    return make


def roll_out(trainer, count=4):
    """A batch of sampled answers, scored, and what `generate` returned for it."""
    kept, generate = [], trainer.model.generate
    trainer.generation_config.output_logits = True

    class Recorder:
        def __call__(self, *args, **kwargs):
            kept.append(generate(*args, **kwargs))
            return kept[-1]

    trainer.model.generate = Recorder()
    try:
        batch = trainer._generate_and_score_completions([trainer.train_dataset[index // 2] for index in range(count)])
    finally:
        del trainer.model.generate
    return batch, kept[0]


def log_probs(trainer, batch):
    trainer._latents = batch["latents"]
    names = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "num_images")
    ids, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    known = {name: batch[name] for name in names if name in batch}
    return trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, batch["completion_ids"].shape[1], batch_size=3, **known
    )[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"latent_feedback": "hidden", "temperature": 1.7},
        {"generation_kwargs": {"reflect": True}, "latent_noise": 0.5},
        {"generation_kwargs": {"reflect": False}},
        {"generation_kwargs": {"latent_tolerance": 0.3}},
        {"generation_kwargs": {"reflect": "uncertain", "reflect_threshold": 4.0, "max_reflections": 2}},
    ],
    ids=str,
)
def test_replayed_log_probabilities_are_those_that_were_sampled_from(make, model, options):
    torch.manual_seed(3)
    trainer = make(**options)
    model.train()
    batch, result = roll_out(trainer)
    start, slot, end = model.config.latent_token_ids
    tokens, actions = batch["completion_ids"], batch["tool_mask"].bool() & batch["completion_mask"].bool()
    logits = torch.stack(result.logits, 1)[:, : tokens.shape[1]].clone()
    reflect = options.get("generation_kwargs", {}).get("reflect")
    barred = [
        slot,
        end,
        model.config.image_token_id,
        model.config.video_token_id,
        *([start] if reflect in (False, "uncertain") else []),
    ]
    logits[..., barred] = float("-inf")
    sampled = (logits / trainer.temperature).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    with torch.enable_grad():
        replayed = log_probs(trainer, batch)
    assert replayed.requires_grad
    torch.testing.assert_close(replayed[actions], sampled[actions], atol=1e-5, rtol=0)
    # Forced: slots, end tokens, and the start token that `reflect=True` asks for; a chosen one is an action.
    in_answer = batch["completion_mask"].bool()
    forced = (tokens == slot) | (tokens == end)
    if reflect == "uncertain":
        forced |= tokens == start
        assert (tokens == start).any()
    elif reflect:
        forced[:, 0] = True
        assert (tokens[:, 0] == start).all()
    assert torch.equal(actions, in_answer & ~forced) and not replayed[in_answer & forced].any()
    if reflect is None and "temperature" not in options:
        opened = (tokens == start) & in_answer
        assert opened.sum() > 1 and actions[opened].all()
        assert (opened.sum(1) > 1).any(), "one with several reflections"
    trained = model.model.dac.q_proj.weight.requires_grad
    assert trained == (options.get("latent_feedback") != "hidden") and not model.model.bcm.queries.requires_grad


def test_gradients_go_through_the_latents_into_dac(make, model):
    """Where nothing before them moves: the derivative of the update's own objective, by finite differences."""
    torch.manual_seed(3)
    trainer = make(generation_kwargs={"reflect": True})
    model.train()
    batch, _ = roll_out(trainer)
    weights = torch.randn(batch["completion_ids"].shape, device=devices.DEVICE) * batch["tool_mask"]
    (log_probs(trainer, batch) * weights).sum().backward()
    bias = model.model.dac.norm.bias
    direction = torch.randn_like(bias)
    slope = float(bias.grad @ direction)
    found = []
    for step in (0.01, -0.01):  # a bias of the LayerNorm moves all latents alike
        moved_batch = {**batch, "latents": batch["latents"] + step * direction}
        with torch.no_grad():
            found.append(float((log_probs(trainer, moved_batch) * weights).sum()))
    assert slope == pytest.approx((found[0] - found[1]) / 0.02, rel=0.02) and abs(slope) > 1e-3


@pytest.mark.parametrize("feedback", ["dac", "hidden"])
def test_the_gradient_of_latents_as_actions(make, model, feedback):
    """Of log pi(z) = -|z - h|² / (2 σ²), the mean over D: (z - h) / (σ² D) at h, and none at the recorded z."""
    torch.manual_seed(3)
    trainer = make(latent_feedback=feedback, latent_sigma=0.5, generation_kwargs={"reflect": True})
    assert trainer.args.latent_noise == 0.5
    model.train()
    batch, _ = roll_out(trainer)
    slots = batch["completion_ids"] == model.config.latent_token_id
    slots[:, -1] = False  # in which an answer was cut: nothing was fed there
    assert batch["tool_mask"].bool()[slots].all()
    kept, forward = [], model.model.forward

    def keep(*args, **kwargs):
        kept.append(forward(*args, **kwargs))
        for name in ("student_latents", "latent_states"):
            if getattr(kept[-1], name) is not None and getattr(kept[-1], name).requires_grad:
                getattr(kept[-1], name).retain_grad()
        return kept[-1]

    model.model.forward = keep
    try:
        values = log_probs(trainer, batch)
    finally:
        del model.model.forward
    values[slots].sum().backward()
    for part, (first, last) in zip(kept, ((0, 3), (3, 4))):
        fed = part.student_latents if feedback == "dac" else part.latent_states
        recorded, width = batch["latents"][first:last], fed.shape[-1]
        for row in range(last - first):
            count = int(slots[first + row].sum())
            difference = recorded[row, :count] - fed[row, :count]
            noise = 0.5 * 0.6 < difference.std() < 0.5 * 1.4
            assert noise, difference.std()
            expected = -difference.square().mean(-1) / (2 * 0.5**2)
            torch.testing.assert_close(values[first + row][slots[first + row]], expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(fed.grad[row, :count], difference / (0.5**2 * width), atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_one(make, model, start, tmp_path):
    options = {"max_steps": 4, "num_iterations": 2, "learning_rate": 0.05, "latent_sigma": 0.5}
    make(output_dir=str(tmp_path / "a"), **options).train()
    saving = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "b")}
    other = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32)
    whole = make(trained=other, **options, **saving)
    whole.train()
    fresh = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32)
    resumed = make(trained=fresh, **options, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert not moved(model.state_dict(), fresh.state_dict()) and not moved(model.state_dict(), other.state_dict())
    curves = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in (whole, resumed)]
    assert curves[0] == curves[1] and len(curves[0]) == 4
    facts = json.loads((tmp_path / "b" / "checkpoint-2" / "training_facts.json").read_text())["runs"][-1]
    assert facts["stage"] == "grpo" and facts["options"]["num_generations"] == 2 and facts["tokens"] > 0
    assert facts["rewards"] == ["length_reward"]
    card = (tmp_path / "b" / "README.md").read_text()
    assert "GRPO, by `length_reward`" in card and "VReflectionSFT" not in card
    for between in (1, 0.3):
        with pytest.raises(
            ValueError, match=f"can't be resumed exactly: `save_steps` must be a multiple .* {between}"
        ):
            make(**options, **saving | {"save_steps": between})


def test_a_signal_waits_for_the_end_of_a_rollout(make, tmp_path):
    trainer = make(output_dir=str(tmp_path), max_steps=4, num_iterations=2)
    trainer.preemption.received = signal.SIGTERM
    trainer.preemption.on_train_begin = lambda *args, **kwargs: None
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.preemption.requested == signal.SIGTERM


@pytest.mark.slow
def test_accumulation_and_checkpointing_change_nothing(make, model):
    other = copy.deepcopy(model)
    shared = {"generation_kwargs": {"reflect": True}, "latent_noise": 0.2}
    torch.manual_seed(0)
    expected = gradients(make(**shared))
    torch.manual_seed(0)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    got = gradients(make(trained=other, **shared, **options))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-3, msg=name)
    assert (
        expected["model.dac.v_proj.weight"].any()
        and expected["model.language_model.layers.0.mlp.up_proj.weight"].any()
    )


def test_the_reference_is_the_start_and_knows_latents(make, model):
    trainer = make(beta=0.5, learning_rate=0.05, max_steps=2, num_iterations=2)
    trainer.train()
    kept = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert kept[0] == pytest.approx(0, abs=1e-6) and kept[1] > 1e-6
    assert trainer.ref_model is not model and not any(
        weight.requires_grad for weight in trainer.ref_model.parameters()
    )


@pytest.mark.slow
def test_adapters_with_the_start_as_reference(make, model):
    peft = pytest.importorskip("peft")
    before = copy.deepcopy(model.state_dict())
    config = peft.LoraConfig(r=2, init_lora_weights=False)
    trainer = make(peft_config=config, beta=0.5, learning_rate=0.05)
    assert trainer.ref_model is None
    trainer.train()
    assert trainer.state.log_history[0]["kl"] > 0
    base = trainer.model.get_base_model()
    trained = {name for name, weight in base.named_parameters() if weight.requires_grad}
    assert any("lora_" in name for name in trained) and any("dac" in name for name in trained)
    assert not any("bcm" in name or "visual" in name for name in trained)
    kept = {
        name.replace("base_layer.", "").replace("original_module.", ""): value
        for name, value in base.state_dict().items()
    }
    assert torch.equal(
        kept["model.language_model.layers.0.mlp.up_proj.weight"],
        before["model.language_model.layers.0.mlp.up_proj.weight"],
    )


def test_rewards():
    said = [[{"role": "assistant", "content": text}] for text in ("A", " A ", "<think>A</think>B", "")]
    assert exact_answer(said, answer=["A", "A", "B", "A"]) == [1, 1, 1, 0]
    assert reflection_format(said, num_reflections=[1, 0, 2, 1], ended=[True, True, False, True]) == [1, 0, 0, 0]


def test_latent_use_is_the_drop_of_the_right_answers_log_probability(make, model, processor):
    torch.manual_seed(3)
    trainer = make(reward_funcs=[latent_use, exact_answer])
    batch, _ = roll_out(trainer)
    values = [float(value) for value in trainer._logs["rewards"]["latent_use"]]
    _, slot, end = model.config.latent_token_ids
    inputs = trainer.rollouts.inputs
    images = inputs["image_grid_thw"].prod(-1).cumsum(0).tolist()
    assert sum(value != 0 for value in values) > 1
    for row, value in enumerate(values):
        answer = batch["completion_ids"][row].tolist()
        if end not in answer:
            assert value == 0
            continue
        right = processor.tokenizer(trainer.train_dataset[row // 2]["answer"]).input_ids + [
            processor.tokenizer.eos_token_id
        ]
        prompt = inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].argmax() :]
        tokens = prompt.new_tensor([answer[: len(answer) - answer[::-1].index(end)] + right])
        pixels = inputs["pixel_values"][images[row] - int(inputs["image_grid_thw"][row].prod()) : images[row]]
        ids = torch.cat([prompt, tokens], 1)
        sums = []
        for latents in (batch["latents"][row : row + 1], torch.zeros_like(batch["latents"][row : row + 1])):
            with torch.no_grad():
                logits = model(
                    input_ids=ids,
                    mm_token_type_ids=(ids == model.config.image_token_id).int(),
                    pixel_values=pixels,
                    image_grid_thw=inputs["image_grid_thw"][row : row + 1],
                    latents=latents,
                ).logits[0, -len(right) - 1 : -1]
            logits[:, [slot, end, model.config.image_token_id, model.config.video_token_id]] = float("-inf")
            sums.append(logits.log_softmax(-1).gather(1, ids[0, -len(right) :, None]).sum().item())
        assert value == pytest.approx(sums[0] - sums[1], abs=1e-4)


def test_rows_become_questions_whose_boxes_nobody_reads(processor):
    rows = prompt_rows(glyphsearch_dataset("train", 2, "chains", questions_per_scene=2), processor)
    row = rows[0]
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"] and len(row["answer"]) == 1
    assert not any(part["type"] == "reflection" for message in row["prompt"] for part in message["content"])
    listed = prompt_rows([{"id": "x", "question": "Which?", "answer": "A"}], processor)[0]
    assert listed["prompt"][0]["content"] == [{"type": "text", "text": "Which?"}] and listed["answer"] == "A"
    asked = [{"role": "user", "content": "Which?"}]
    for messages, message in (
        ([*asked, {"role": "assistant", "content": ""}], "holds no text"),
        (
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}, *asked],
            "must be the assistant's",
        ),
    ):
        with pytest.raises(BadRow, match=message):
            prompt_rows([{"id": "x", "messages": messages}], processor)[0]


def test_rows_with_and_without_pictures_go_together(make, model):
    scene = dict(glyphsearch_dataset("train", 1, "chains")[0])
    trainer = make(rows=[scene, {"id": "text", "question": "Which glyph?", "answer": "A"}], shuffle_dataset=False)
    batch, _ = roll_out(trainer)
    assert batch["num_images"] == [1, 1, 0, 0]
    assert not (batch["completion_ids"][2:] == model.config.latent_token_id).any()  # DAC has nothing to look at
    trainer.train()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_vllm": True}, "vLLM doesn't return the latents"),
        ({"use_transformers_continuous_batching": True}, "can't carry latents from step to step"),
        ({"latent_sigma": 0.0}, "`latent_sigma` must be above 0"),
        ({"latent_noise": -1.0}, "`latent_noise` must not be negative"),
        ({"latent_feedback": "bcm"}, "`latent_feedback` must be 'hidden' or 'dac'"),
        ({"generation_kwargs": {"latent_feedback": "dac"}}, "Set `latent_feedback` itself"),
        ({"stage": "path"}, "`stage` must be 'grpo'"),
        ({"beta": 0.1, "sync_ref_model": True}, "doesn't support `sync_ref_model=True`"),
        ({"train_sampling_strategy": "sequential"}, "doesn't support `train_sampling_strategy"),
    ],
)
def test_what_latents_leave_no_place_for_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_an_answer_has_room_behind_its_reflection(make):
    with pytest.raises(ValueError, match="`max_completion_length=6` leaves no room .* 4 latent steps takes 6 tokens"):
        make(max_completion_length=6)
    make(max_completion_length=6, generation_kwargs={"latent_steps": 0})
