"""What would be read or decoded wrongly in silence is refused in one line: typed tokens, videos, wrong decoding values."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from modeling_vreflection import VReflectionForConditionalGeneration
from modeling_vreflection.generation_vreflection import CACHE
from vreflection_hub_card.errors import InputError
from vreflection_hub_card.inference.checkpoints import EMBEDDED, load_checkpoint


OPTIONS = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
QUESTION = {
    "role": "user",
    "content": [{"type": "image", "image": Image.new("RGB", (56, 56))}, {"type": "text", "text": "?"}],
}
WRONG = [
    ("latent_steps", "8", "must be a whole number, got '8'"),
    ("latent_steps", 2.5, "must be a whole number, got 2.5"),
    ("latent_steps", True, "must be a whole number, got True"),
    ("latent_tolerance", "0.1", r"must be a number in \[0, 1\], got '0.1'"),
    ("latent_feedback", "hiden", "must be one of hidden, dac, got 'hiden'"),
    ("reflect", "yes", "must be True, False, None or 'uncertain', got 'yes'"),
    ("reflect", 1, "must be True, False, None or 'uncertain', got 1"),
    ("reflect", "uncertain", "needs a `reflect_threshold` from 0 on, in nats, got None"),
]


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copytree(EMBEDDED, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def embedded():
    return load_checkpoint(EMBEDDED, "cpu")


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|video_pad|>", "<|vision_start|>", "<|endoftext|>"])
def test_special_tokens_typed_in_a_text_are_refused(embedded, token):
    _, processor = embedded
    # A name may be spread over parts, which are joined.
    parts = [{"type": "text", "text": "K" + token[:4]}, {"type": "text", "text": token[4:]}]
    for messages in (
        [{"role": "user", "content": f"a{token}"}],
        [QUESTION, {"role": "assistant", "content": parts}],
    ):
        number, role = len(messages) - 1, messages[-1]["role"]
        with pytest.raises(ValueError) as error:
            processor.apply_chat_template(messages, tokenize=False)
        assert f"Message {number} ({role}) holds {token} at character 1" in str(error.value)


@pytest.mark.parametrize("name, value, problem", WRONG)
def test_wrong_decoding_values_are_refused_where_they_come_in(embedded, checkpoint, name, value, problem):
    model, processor = embedded
    inputs = processor.apply_chat_template([QUESTION], add_generation_prompt=True, **OPTIONS)
    with pytest.raises(ValueError, match=problem):
        model.generate(**inputs, max_new_tokens=16, **{name: value})
    saved = model.generation_config
    try:
        model.generation_config = GenerationConfig(**{**saved.to_dict(), name: value})
        with pytest.raises(ValueError, match=problem):
            model.save_pretrained(checkpoint)
    finally:
        model.generation_config = saved
    file = checkpoint / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(InputError, match=f"checkpoint: can't be loaded .*{problem}"):
        load_checkpoint(checkpoint, "cpu")


def test_without_a_generation_config_the_cache_is_on(checkpoint):
    (checkpoint / "generation_config.json").unlink()
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["use_cache"] = config["use_cache"] = False  # as training leaves it
    file.write_text(json.dumps(config))
    model, processor = load_checkpoint(checkpoint, "cpu")
    chosen = model.generation_config
    assert (chosen.use_cache, chosen.latent_steps, chosen.latent_feedback) == (True, 8, "hidden")
    inputs = processor.apply_chat_template([QUESTION], add_generation_prompt=True, **OPTIONS)
    sequences = model.generate(**inputs, max_new_tokens=16, reflect=True)
    assert (sequences == model.config.latent_token_id).sum() == 8
    model.save_pretrained(checkpoint)
    again = VReflectionForConditionalGeneration.from_pretrained(checkpoint)
    assert again.generation_config.latent_feedback == "hidden" and again.generation_config.use_cache


@pytest.mark.parametrize("latent_inputs", [None, "hidden", "bcm"])
@pytest.mark.parametrize(
    "given", [{"pixel_values_videos": torch.zeros(16, 1176)}, {"video_grid_thw": torch.ones(1, 3)}, {}]
)
def test_videos_are_refused_by_forward_and_generate(embedded, latent_inputs, given):
    model, processor = embedded
    answer = [{"type": "reflection", "box": [0, 0, 1, 1]}, {"type": "text", "text": "K"}]
    messages = [QUESTION, {"role": "assistant", "content": answer}][: 1 if latent_inputs is None else 2]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=latent_inputs is None, **OPTIONS)
    tokens = torch.full((1, 4), model.config.video_token_id)
    inputs["input_ids"] = torch.cat([tokens, inputs["input_ids"]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    types = (inputs["input_ids"] == model.config.image_token_id).int()
    inputs["mm_token_type_ids"] = types + 2 * (inputs["input_ids"] == model.config.video_token_id).int()
    with pytest.raises(ValueError, match="V-Reflection looks at pictures"):
        model(**inputs, **given, latent_inputs=latent_inputs)
    if latent_inputs is None:
        with pytest.raises(ValueError, match="V-Reflection looks at pictures"):
            model.generate(**inputs, **given, max_new_tokens=4)


VIDEO = {
    "pixel_values_videos": torch.zeros(16, 1176),
    "video_grid_thw": torch.tensor([[1, 4, 4]]),
    "second_per_grid_ts": torch.ones(1),
    "mm_encoder_outputs": {"video": torch.zeros(4, 192)},
}


@pytest.mark.parametrize("latent_inputs", [None, "hidden", "dac"])
@pytest.mark.parametrize("name", VIDEO)
def test_what_comes_with_a_video_is_refused_without_its_tokens(embedded, latent_inputs, name):
    model, processor = embedded
    answer = [{"type": "reflection", "box": [0, 0, 1, 1]}, {"type": "text", "text": "K"}]
    messages = [QUESTION, {"role": "assistant", "content": answer}][: 1 if latent_inputs is None else 2]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=latent_inputs is None, **OPTIONS)
    if name == "mm_encoder_outputs":
        inputs.pop("pixel_values")
    for call in (model, model.model):  # trl calls the inner one
        with pytest.raises(ValueError, match="pass `images`, not `videos`"):
            call(**inputs, latent_inputs=latent_inputs, **{name: VIDEO[name]})
    if latent_inputs is None and name != "mm_encoder_outputs":
        with pytest.raises(ValueError, match="pass `images`, not `videos`"):
            model.generate(**inputs, max_new_tokens=16, **{name: VIDEO[name]})


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("kind", ["video", "video_url", "audio", "input_audio"])
def test_videos_and_audio_in_messages_are_refused_before_they_are_fetched(embedded, monkeypatch, role, kind):
    _, processor = embedded
    fetched = []
    for loader in ("load_video", "load_audio"):
        monkeypatch.setattr(
            f"transformers.processing_utils.{loader}", lambda *_, **__: fetched.append(1), raising=False
        )
    messages = [QUESTION, {"role": role, "content": [{"type": kind, "url": "http://localhost:9/a.mp4"}]}]
    for conversation in (messages, [messages, messages]):
        for options in ({"tokenize": False}, OPTIONS):
            with pytest.raises(ValueError) as error:
                processor.apply_chat_template(conversation, **options)
            assert f"Message 1 ({role}) holds a part of type '{kind}'" in str(error.value)
            assert "pass a video's frames as pictures" in str(error.value)
    assert not fetched


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_for_inference(checkpoint, value):
    model = VReflectionForConditionalGeneration.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight[3, 5] = value
    model.save_pretrained(checkpoint)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        load_checkpoint(checkpoint, "cpu")


def test_packed_rows_with_a_mask_are_refused(embedded):
    model, processor = embedded
    ids = processor.tokenizer("Which glyph is on the red circle?", return_tensors="pt").input_ids
    places = torch.arange(ids.shape[1])[None]
    packed = {"input_ids": torch.cat([ids, ids], 1), "position_ids": torch.cat([places, places], 1)}
    with pytest.raises(ValueError, match="need `attention_mask=None`"):
        model(**packed, attention_mask=torch.ones_like(packed["input_ids"]), use_cache=False)
    # What pads a row on the left begins no sample.
    padded = {"input_ids": torch.cat([ids[:, :3], ids], 1), "position_ids": torch.cat([places[:, 3:6], places], 1)}
    mask = torch.ones_like(padded["input_ids"])
    mask[:, :3] = 0
    torch.testing.assert_close(
        model(**padded, attention_mask=mask).logits[:, 3:], model(ids).logits, atol=1e-4, rtol=1e-4
    )
    # With a cache the mask is longer than the positions.
    begun = model(ids[:, :-2], use_cache=True)
    cache = begun[CACHE]
    rest = {"input_ids": ids[:, -2:], "position_ids": places[:, -2:], "attention_mask": torch.ones_like(ids)}
    logits = model(**rest, **{CACHE: cache}).logits
    torch.testing.assert_close(logits, model(ids).logits[:, -2:], atol=1e-4, rtol=1e-4)


def test_an_answer_may_have_no_content(embedded):
    _, processor = embedded
    empty, none = (
        processor.apply_chat_template([QUESTION, {"role": "assistant", **content}])
        for content in ({"content": ""}, {"content": None})
    )
    assert empty == none


def test_prompts_padded_on_the_right_are_refused(embedded):
    model, processor = embedded
    inputs = processor.apply_chat_template([QUESTION], add_generation_prompt=True, **OPTIONS)
    grown = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}
    for name, value in grown.items():
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, 2), value=value)
    with pytest.raises(ValueError, match="padded on the right"):
        model.generate(**inputs, max_new_tokens=1)


def test_a_stored_reflection_of_no_steps_is_refused(checkpoint):
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reflect": True, "latent_steps": 0}))
    with pytest.raises(InputError, match="contradict each other"):
        load_checkpoint(checkpoint, "cpu")
