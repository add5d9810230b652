"""What must hold on every backbone; test_modeling.py and generation/ run whole on one with `--backbone`."""

from types import SimpleNamespace

import devices
import pytest
import torch
from isolation import run_isolated
from reference import BOXES, OpenReflections, Row, answer, ask, attend, decode_uncached, encode, picture
from tiny_models import make_random_model, make_stock, save_strong_backbone, save_thinking_backbone
from torch.nn.functional import log_softmax
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2Config

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.inference.encoding import answer_texts
from vreflection_training.tiny import BACKBONES, save_tiny_backbone


CLASSES = {
    "qwen2_5_vl": ("VReflectionForConditionalGeneration", "VReflectionProcessor", "modeling_vreflection"),
    "qwen3_vl": (
        "VReflectionQwen3VLForConditionalGeneration",
        "VReflectionQwen3VLProcessor",
        "modeling_qwen3_vl_vreflection",
    ),
    "qwen3_vl_moe": (
        "VReflectionQwen3VLMoeForConditionalGeneration",
        "VReflectionQwen3VLProcessor",
        "modeling_qwen3_vl_moe_vreflection",
    ),
}
NEW_TOKENS = 24
STARTS = ({0, 12}, {3}, {5})  # the first row reflects twice, the rows enter and leave at different steps


@pytest.fixture(scope="module", params=BACKBONES)
def own(request, tmp_path_factory):
    """A backbone's folder, model, processor and stock model; prompts over several pictures of several sizes."""
    folder = save_strong_backbone(tmp_path_factory.mktemp(request.param), request.param)
    model = make_random_model(folder, devices.DEVICE, patch_positions="sincos").eval()
    processor = VReflectionForConditionalGeneration.from_backbone(folder)[1]
    prompts = [
        ask("Which glyph is on the red triangle?", picture(1)),
        ask("Which glyph?", picture(3, (84, 140)), picture(4, (56, 56))),
        ask("What?", picture(2, (112, 56))),
    ]
    batch = encode(processor, *prompts)
    return SimpleNamespace(
        name=request.param,
        folder=folder,
        model=model,
        processor=processor,
        stock=make_stock(folder, model),
        prompts=prompts,
        batch=batch,
    )


@pytest.fixture(scope="module")
def taught(own):
    """Rows with answers: two segments over two pictures, one of them a path, and a row without a reflection."""
    path = {"type": "reflection", "boxes": [BOXES[1], BOXES[0], BOXES[2]], "image_index": [1, 0, 0]}
    first = answer("A", (BOXES[0], 1), "N", "Z")
    first[0]["content"].insert(3, path)
    return [
        ask("Which?", picture(1, (112, 84)), picture(2)) + first,
        ask("What is this?", picture(4, (168, 112))) + answer(BOXES[2], "Z"),
        ask("Which glyph is on the red cross?", picture(3, (84, 84))) + answer("A"),
    ]


def decode(own, **kwargs):
    """New tokens of the batch, reflections opened by `STARTS`; nothing of a picture is written, which no model would."""
    length, config = own.batch["input_ids"].shape[1], own.model.config
    options = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    return own.model.generate(
        **own.batch,
        logits_processor=[OpenReflections(config.latent_start_token_id, length, *STARTS)],
        suppress_tokens=written_by_nobody(config),
        return_dict_in_generate=True,
        **options,
        **kwargs,
    )


def written_by_nobody(config):
    return [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]


def test_the_folder_says_of_which_class_the_model_is(own):
    model_class, processor_class, _ = CLASSES[own.name]
    assert (type(own.model).__name__, type(own.processor).__name__) == (model_class, processor_class)
    assert isinstance(own.model.config, type(own.stock.config))
    ours = own.model.state_dict()
    for name, weight in own.stock.state_dict().items():
        assert torch.equal(ours[name], weight), name
    assert {name.split(".")[1] for name in ours.keys() - own.stock.state_dict().keys()} == {"bcm", "dac"}


def test_another_architecture_is_refused_by_name(tmp_path):
    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model type 'qwen2'; a backbone is one of .*qwen3_vl"):
        VReflectionForConditionalGeneration.from_backbone(tmp_path)
    save_tiny_backbone(tmp_path, model_type="qwen3_vl")
    with pytest.raises(ValueError, match="model type 'qwen3_vl'; VReflectionConfig is of 'vreflection'"):
        VReflectionForConditionalGeneration.from_pretrained(tmp_path)


def test_without_latents_it_is_the_stock_model(own):
    with torch.no_grad():
        assert torch.equal(own.model(**own.batch).logits, own.stock(**own.batch).logits)
    options = {"do_sample": False, "max_new_tokens": 8, "suppress_tokens": written_by_nobody(own.model.config)}
    ours = own.model.generate(**own.batch, latent_steps=0, **options)
    banned = options["suppress_tokens"] + list(own.model.config.latent_token_ids)
    assert torch.equal(ours, own.stock.generate(**own.batch, **options | {"suppress_tokens": banned}))


@pytest.mark.parametrize("feedback", ["hidden", "dac"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 16}], ids=["whole", "chunked"])
def test_greedy_batch_equals_uncached_decoding(own, feedback, options):
    result = decode(own, latent_feedback=feedback, **options)
    eos, config = own.model.generation_config.eos_token_id, own.model.config
    for index, starts in enumerate(STARTS):
        row = Row(own.stock, own.batch, index)
        features = torch.cat(own.model.model.looked_at(row.features, row.grids))[None]

        def look(state, features=features):
            return attend(own.model.model.dac, state[None, None], features)[0][0, 0]

        expected, _ = decode_uncached(
            row,
            config.latent_token_ids,
            NEW_TOKENS,
            starts,
            feedback=None if feedback == "hidden" else look,
            banned=[*eos, *written_by_nobody(config)],
        )
        assert result.sequences[index, own.batch["input_ids"].shape[1] :].tolist() == expected
        fed = torch.stack(row.fed)
        torch.testing.assert_close(result.latents[index, : len(fed)], fed, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("latent_inputs", ["bcm", "dac", "hidden"])
def test_training_passes_equal_stock_passes_over_the_same_latents(own, taught, latent_inputs):
    samples = taught if latent_inputs != "hidden" else taught[1:2] * 2
    inputs = encode(own.processor, *samples)
    with torch.no_grad():
        outputs = own.model(**inputs, latent_inputs=latent_inputs)
    filled = {"bcm": outputs.teacher_latents, "dac": outputs.student_latents, "hidden": outputs.latent_states}
    segments = iter(filled[latent_inputs])
    for index in range(len(samples)):
        row = Row(own.stock, inputs, index)
        for columns in (row.ids == own.model.config.latent_token_id).nonzero().flatten().view(-1, 8):
            row.fill(columns, next(segments))
        torch.testing.assert_close(outputs.last_hidden_state[index, row.kept], row.run(), atol=5e-4, rtol=5e-4)
    assert next(segments, None) is None


def test_the_reference_has_what_the_layers_add_to_images(own):
    """Without DeepStack's features the passes above would differ."""
    row = Row(own.stock, own.batch)
    assert bool(row.levels) == (own.name != "qwen2_5_vl")
    states = row.run()
    row.levels = [torch.zeros_like(level) for level in row.levels]
    assert torch.equal(row.run(), states) == (own.name == "qwen2_5_vl")


@pytest.mark.parametrize("latent_inputs", ["bcm", "dac"])
def test_packed_rows_equal_separate_ones(own, taught, latent_inputs):
    apart = [encode(own.processor, sample) for sample in taught]
    together = {name: torch.cat([row[name] for row in apart], 1) for name in ("input_ids", "mm_token_type_ids")}
    together |= {name: torch.cat([row[name] for row in apart]) for name in ("pixel_values", "image_grid_thw")}
    positions = [torch.arange(row["input_ids"].shape[1], device=devices.DEVICE) for row in apart]
    together["position_ids"] = torch.cat(positions)[None]
    boxes = [apart[0]["boxes"], apart[1]["boxes"].clone()]
    boxes[1][..., 4] += 2  # two pictures come before the second row's
    options = {"latent_inputs": latent_inputs, "use_cache": False}
    with torch.no_grad():
        packed = own.model(**together, boxes=torch.cat(boxes), attention_mask=None, **options)
        rows = [own.model(**row, **options) for row in apart]
    expected = torch.cat([row.last_hidden_state for row in rows], 1)
    torch.testing.assert_close(packed.last_hidden_state, expected, atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("feedback", ["hidden", "dac"])
def test_recorded_latents_replay(own, feedback):
    result = decode(own, latent_feedback=feedback, output_logits=True)
    length = own.batch["input_ids"].shape[1]
    new = result.sequences[:, length:]
    inputs = {**own.batch, "input_ids": result.sequences}
    inputs["attention_mask"] = torch.cat([own.batch["attention_mask"], torch.ones_like(new)], 1)
    inputs["mm_token_type_ids"] = torch.cat([own.batch["mm_token_type_ids"], torch.zeros_like(new)], 1)
    with torch.no_grad():
        logits = own.model(**inputs, latents=result.latents).logits[:, length - 1 : -1]
    free = torch.isin(new, new.new_tensor(own.model.config.latent_token_ids[1:]), invert=True)
    expected = torch.stack(result.logits, 1)
    torch.testing.assert_close(log_softmax(logits, -1)[free], log_softmax(expected, -1)[free], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["pixel_values_videos", "input_ids"])
def test_videos_are_refused(own, name):
    inputs = dict(own.batch)
    if name == "input_ids":
        inputs[name] = inputs[name].index_fill(1, inputs[name].new_tensor([0]), own.model.config.video_token_id)
    else:
        inputs |= {name: torch.zeros(4, 8), "video_grid_thw": torch.tensor([[1, 2, 2]])}
    for call in (own.model, own.model.generate):
        with pytest.raises(ValueError, match="looks at pictures"):
            call(**inputs)
    with pytest.raises(ValueError, match="looks at pictures"):
        own.processor(text="<|vision_start|><|video_pad|><|vision_end|>", videos=[torch.zeros(4, 3, 28, 28)])


def test_a_folder_holds_no_other_backbone(own, tmp_path):
    folder = tmp_path / "folder"
    own.model.save_pretrained(folder)
    own.processor.save_pretrained(folder)
    file = CLASSES[own.name][2]
    carried = {path.stem for path in folder.glob("*.py")}
    assert {name for name in carried if name.startswith("modeling_")} == {file}
    assert {reference.partition(".")[0] for reference in own.model.config.auto_map.values()} <= carried
    loaded = AutoModelForImageTextToText.from_pretrained(folder).to(devices.DEVICE)
    assert type(loaded) is type(own.model) and type(AutoProcessor.from_pretrained(folder)) is type(own.processor)
    for name, weight in own.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


@pytest.mark.slow  # Qwen2.5-VL's in test_loading.py isn't
def test_a_folder_alone_is_enough(own, tmp_path):
    own.model.save_pretrained(tmp_path / "folder")
    own.processor.save_pretrained(tmp_path / "folder")
    run_isolated(own.model, tmp_path / "folder", tmp_path)


def test_prompts_have_the_backbones_own_format(own):
    text = own.processor.apply_chat_template(ask("Hi"), add_generation_prompt=True, tokenize=False)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" if own.name == "qwen2_5_vl" else ""
    assert text == system + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """A model of a backbone that thinks in words, whose stock template opens the thoughts, and its processor."""
    folder = save_thinking_backbone(tmp_path_factory.mktemp("thinking"))
    model, processor = VReflectionForConditionalGeneration.from_backbone(folder, dtype=torch.float32)
    return model.to(devices.DEVICE), processor


def test_thoughts_are_kept_and_the_reflection_is_where_the_answer_is(thinking):
    _, processor = thinking
    question = ask("Which?", picture(1))
    prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    taught = answer(BOXES[0], "K")
    segment = "<|sovt|>" + "<|lvr|>" * 8 + "<|eovt|>"
    for thoughts, rendered in ((None, ""), ("It is red.", "It is red.\n")):
        taught[0]["reasoning_content"] = thoughts
        whole = processor.apply_chat_template(question + taught, tokenize=False)
        assert whole == prompt + rendered + "</think>\n\n" + segment + "K<|im_end|>\n"
    earlier = processor.apply_chat_template(
        question + taught + ask("And?"), add_generation_prompt=True, tokenize=False
    )
    assert "assistant\nK<|im_end|>" in earlier and "It is red" not in earlier and segment not in earlier
    taught[0]["content"][1]["text"] = "K</think>"
    with pytest.raises(ValueError, match="</think>"):
        processor.apply_chat_template(question + taught, tokenize=False)


def test_an_answer_is_what_comes_behind_the_thoughts(thinking, processor):
    said = "It is red.\n</think>\n\n<|sovt|><|lvr|><|eovt|> K<|im_end|>"
    tokens = thinking[1].tokenizer(said, return_tensors="pt")["input_ids"]
    assert answer_texts(thinking[1], tokens) == ["K"]
    assert answer_texts(thinking[1], tokens[:, :3]) == [""], "the thoughts didn't end"
    assert answer_texts(processor, processor.tokenizer(" K.", return_tensors="pt")["input_ids"]) == ["K."]


def test_thoughts_given_to_a_model_without_any_are_refused(processor):
    taught = answer("K")
    taught[0]["reasoning_content"] = "It is red."
    with pytest.raises(Exception, match="has not learned to think in words"):
        processor.apply_chat_template(ask("Which?") + taught, tokenize=False)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("asked", [{"reflect": True}, {"reflect": "uncertain", "reflect_threshold": 0}])
def test_an_asked_for_reflection_opens_behind_the_thoughts(thinking, tmp_path, saved, asked):
    model, processor = thinking
    if saved:
        for part in (model, processor):
            part.save_pretrained(tmp_path)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path).to(devices.DEVICE)
        processor = AutoProcessor.from_pretrained(tmp_path)
    start, slot, end = model.config.latent_token_ids
    close = processor.tokenizer.convert_tokens_to_ids("</think>")
    assert model.config.think_end_token_id == processor.think_end_token_id == close
    inputs = encode(processor, ask("Which?", picture(1)), ask("What is it?", picture(2)))
    length = inputs["input_ids"].shape[1]
    # The first row closes its thoughts after two tokens, the second after five; both write another end later on.
    closing = OpenReflections(close, length, {2, 17}, {5, 17})
    options = {"do_sample": False, "min_new_tokens": 20, "max_new_tokens": 20, "suppress_tokens": [start, close]}
    options |= {"return_dict_in_generate": True, "output_logits": True, **asked}
    result = model.generate(**inputs, logits_processor=[closing], **options)
    for row, logits, ends in zip(result.sequences[:, length:].tolist(), torch.stack(result.logits, 1), (2, 5)):
        assert row[ends + 2 : ends + 12] == [start, *[slot] * 8, end]
        assert row.count(start) == 1 and slot not in row[: ends + 2]
        forced = log_softmax(logits, -1)[range(20), row] == 0
        assert forced.nonzero().flatten().tolist() == list(range(ends + 2, ends + 12))
