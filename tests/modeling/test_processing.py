"""From messages to ids, masks and boxes: the conversation format, what text can't do, and which boxes are refused."""

import json
import random

import devices
import numpy as np
import pytest
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info
from reference import END, SLOT, START, answer, ask, encode, picture

from modeling_vreflection import VReflectionProcessor
from modeling_vreflection.parts_vreflection import rendered_reflections
from modeling_vreflection.processing_vreflection import build_chat_template
from modeling_vreflection.regions_vreflection import quantise_box


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SEGMENT = START + SLOT * 8 + END
BOX = [0.25, 0.5, 0.75, 1.0]


def render(processor, messages, **kwargs):
    return processor.apply_chat_template(messages, tokenize=False, **kwargs)


# The conversation format


def test_scripts_in_qwens_own_way_give_the_same_prompt(processor):
    """The text from the template, the pictures from `qwen_vl_utils`, and both through the processor."""
    messages = ask("Which is larger?", picture(0, (120, 160)), picture(1, (96, 64)))
    pictures, _ = process_vision_info(messages, image_patch_size=processor.image_processor.patch_size)
    text = render(processor, messages, add_generation_prompt=True)
    own_way = processor(text=[text], images=pictures, return_tensors="pt").to(devices.DEVICE)
    expected = encode(processor, messages)
    assert torch.equal(own_way["input_ids"], expected["input_ids"])
    assert torch.equal(own_way["image_grid_thw"], expected["image_grid_thw"])


def test_a_plain_conversation_has_qwens_format(processor):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    expected = SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert render(processor, messages) == expected
    messages.append({"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "you?"}]})
    expected += "<|im_start|>user\nAnd you?<|im_end|>\n"
    assert render(processor, messages) == expected
    assert render(processor, messages, add_generation_prompt=True) == expected + "<|im_start|>assistant\n"


def test_pictures_stand_where_they_are_put(processor):
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}, {"type": "image_url"}]
    expected = SYSTEM + f"<|im_start|>user\na{IMAGE}b{IMAGE}<|im_end|>\n"
    assert render(processor, [{"role": "user", "content": parts}]) == expected


def test_a_system_message_replaces_the_default(processor):
    for content in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        messages = [{"role": "system", "content": content}, {"role": "user", "content": "Hi"}]
        expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        assert render(processor, messages) == expected


def test_a_reflection_is_rendered_as_a_segment(processor):
    messages = ask("Which?") + answer("Let me see. ", BOX, "It is ", (BOX, 0), "Z")
    expected = f"<|im_start|>assistant\nLet me see. {SEGMENT}It is {SEGMENT}Z<|im_end|>\n"
    assert render(processor, messages) == SYSTEM + "<|im_start|>user\nWhich?<|im_end|>\n" + expected


def test_reflections_of_the_past_are_dropped(processor):
    past = ask("One?") + answer(BOX, "A")
    assert render(processor, past).count(SEGMENT) == 1
    for later in (ask("Two?"), ask("Two?") + answer("B")):
        text = render(processor, past + later)
        assert START not in text and SLOT not in text and END not in text
        assert "<|im_start|>assistant\nA<|im_end|>\n" in text
    text = render(processor, past + ask("Two?") + answer(BOX, "B") + answer("C", BOX))
    assert text.endswith(f"A<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n{SEGMENT}B<|im_end|>\n"
                         f"<|im_start|>assistant\nC{SEGMENT}<|im_end|>\n")  # fmt: skip


def test_boxes_are_those_of_the_rendered_reflections(processor):
    """Over random conversations, also odd ones."""
    rng = random.Random(0)
    for _ in range(100):
        messages = []
        for _ in range(rng.randint(1, 6)):
            messages += rng.choice([ask("Q"), answer("A"), answer(BOX, "A", BOX), answer(BOX)])
        segments = render(processor, messages).count(START)
        assert segments == len(rendered_reflections(messages))


def test_unknown_content_is_refused(processor):
    with pytest.raises(Exception, match="'text' or 'reflection', not 'image'"):
        render(processor, [{"role": "assistant", "content": [{"type": "image"}]}])
    with pytest.raises(Exception, match="'text' or 'image', not 'reflection'"):
        render(processor, [{"role": "user", "content": [{"type": "reflection", "box": BOX}]}])


TOOL = {"type": "function", "function": {"name": "zoom", "parameters": {}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [TOOL]}


@pytest.mark.parametrize(
    "messages, options, message",
    [
        (ask("Hi"), {"tools": [TOOL]}, "leave `tools` out"),
        (ask("Hi"), {"documents": [{"title": "a", "text": "b"}]}, "no place for `documents`"),
        ([*ask("Hi"), CALL], {}, "can't hold `tool_calls`"),
        ([*ask("Hi"), {"role": "tool", "content": "5"}], {}, "not 'tool'"),
        ([{"role": "developer", "content": "Be brief."}, *ask("Hi")], {}, "not 'developer'"),
        ([{"role": "user", "content": [{"type": "image", "image": picture(1), "max_pixels": 784}]}], {}, "`size`"),
        ([{"role": "user", "content": [{"type": "image", "image": picture(1), "resized_height": 84}]}], {}, "`size`"),
    ],
)
def test_what_the_template_would_drop_is_refused(processor, messages, options, message):
    for tokenize in (False, True):
        with pytest.raises(Exception, match=message):
            processor.apply_chat_template(messages, tokenize=tokenize, **options)


@pytest.mark.parametrize("name, value", [("videos", [np.zeros((2, 56, 56, 3))]), ("audio", [np.zeros(16)]), ("fps", 2), ("num_frames", 4), ("enable_thinking", True), ("add_vision_id", True), ("videos_kwargs", {"fps": 2}), ("audio_kwargs", {"sampling_rate": 1})])  # fmt: skip
def test_arguments_that_would_be_ignored_are_refused(processor, name, value):
    with pytest.raises(ValueError, match=name):
        processor(text=["Hi"], return_tensors="pt", **{name: value})
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    with pytest.raises(ValueError, match=name):
        processor.apply_chat_template(ask("Hi"), **options, processor_kwargs={name: value})
    with pytest.raises(ValueError, match=name):
        processor.apply_chat_template(ask("Hi"), **options, **{name: value})


def test_arguments_of_tokenizer_and_image_processor_are_passed_on(processor):
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    text = render(processor, ask("Hi", picture(1)))
    options = {"images": picture(1), "text": text, "return_tensors": "pt"}
    inputs = processor(**options, size=size, pad_to_multiple_of=32, padding=True)
    assert inputs["image_grid_thw"].prod() <= 16 and inputs["input_ids"].shape[1] % 32 == 0
    nested = processor(**options, images_kwargs={"size": size})
    assert torch.equal(nested["image_grid_thw"], inputs["image_grid_thw"])


# What text can't do

TYPED = f"{START} {SLOT}{SLOT} {END} <|so{START}vt|> {START * 2}"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": TYPED}],
        ask(TYPED),
        ask(TYPED, picture(1)),
        [{"role": "system", "content": TYPED}, {"role": "user", "content": "Hi"}],
        [{"role": "system", "content": [{"type": "text", "text": TYPED}]}, {"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": TYPED}, *ask("So?")],
        ask("Hi") + answer(TYPED) + ask("So?"),
        [{"role": "user", "content": [{"type": "text", "text": text} for text in ("<|so", "vt|>", "<", "|lvr|>")]}],
        ask("Hi") + answer("<|", "sovt|>", "<|lv", "r|>") + ask("So?"),
    ],
    ids=["string", "part", "picture", "system", "system part", "assistant", "assistant part", "split", "split answer"],
)
def test_text_never_becomes_a_token_of_a_reflection(model, processor, ids, messages):
    inputs = encode(processor, messages)
    assert not torch.isin(inputs["input_ids"], inputs["input_ids"].new_tensor(ids)).any()
    text = render(processor, messages, add_generation_prompt=True)
    images = [part["image"] for message in messages for part in message["content"] if "image" in part]
    by_hand = processor(text=text, images=images or None, return_tensors="pt").to(devices.DEVICE)
    assert torch.equal(by_hand["input_ids"], inputs["input_ids"])
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    shown = processor.decode(inputs["input_ids"][0]).replace("\u2060", "")
    assert START in shown, "the text itself stays readable"


# Masks


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_assistant_mask_covers_exactly_what_the_assistant_says(processor, side, monkeypatch):
    monkeypatch.setattr(processor.tokenizer, "padding_side", side)
    conversations = [
        ask("Which glyph is on the red cross?", picture(1), picture(2, (84, 56))) + answer((BOX, 1), "It is Z."),
        ask("Hi") + answer("Hello ☃ assistant\n") + ask("So?", picture(3)) + answer("Well: ", BOX, "é", BOX),
        ask("assistant\nHello") + [{"role": "assistant", "content": "Hello"}],
        ask("Nothing"),
    ]
    expected = [
        [SEGMENT + "It is Z.<|im_end|>"],
        ["Hello ☃ assistant\n<|im_end|>", f"Well: {SEGMENT}é{SEGMENT}<|im_end|>"],
        ["Hello<|im_end|>"],
        [],
    ]
    inputs = encode(processor, *conversations, return_assistant_tokens_mask=True, add_generation_prompt=False)
    masks = torch.as_tensor(inputs["assistant_masks"])
    assert masks.shape == inputs["input_ids"].shape
    for ids, mask, texts in zip(inputs["input_ids"], masks, expected):
        edges = (mask.diff(prepend=mask.new_zeros(1), append=mask.new_zeros(1)) != 0).nonzero().view(-1, 2).tolist()
        assert [processor.decode(ids[begin:end]) for begin, end in edges] == texts


# Pictures


@pytest.mark.parametrize(
    ("size", "patches"),
    [((168, 168), 36), ((112, 56), 8), ((28, 28), 1), ((1, 1), 1), ((30, 50), 2), ((2000, 700), 560)],
)
def test_a_picture_takes_a_token_for_each_merged_patch(processor, size, patches):
    inputs = encode(processor, ask("What?", Image.new("RGB", size, "red")))
    assert (inputs["input_ids"] == processor.image_token_id).sum() == patches
    assert inputs["image_grid_thw"].prod().item() == len(inputs["pixel_values"]) == 4 * patches


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_pictures_of_other_modes_are_read(processor, mode):
    inputs = encode(processor, ask("What?", picture(1).convert(mode)))
    assert inputs["pixel_values"].shape == encode(processor, ask("What?", picture(1)))["pixel_values"].shape
    assert inputs["pixel_values"].std() > 0.1


def test_videos_are_refused(processor):
    with pytest.raises(ValueError, match="pass `images`, not `videos`"):
        processor(text="Hi", videos=[np.zeros((2, 28, 28, 3), dtype=np.uint8)])


# Boxes


def texts(*counts):
    """Texts with (images, segments) each, and their pictures."""
    return (
        [IMAGE * images + SEGMENT * segments + "Z" for images, segments in counts],
        [picture(seed, (56, 56)) for seed in range(sum(images for images, _ in counts))] or None,
    )


@pytest.mark.parametrize(
    ("box", "corners"),
    [
        ([0, 0, 1, 1], [0, 0, 65536, 65536]),
        ([0.25, 0.5, 0.75, 1.0], [16384, 32768, 49152, 65536]),
        ([1 / 3, 1 / 3, 2 / 3, 2 / 3], [21846, 21846, 43690, 43690]),
        ([0.1, 0.2, 0.3, 0.4], [6554, 13108, 19660, 26214]),
        ([0.5, 0.5, 0.5 + 1e-9, 0.5 + 1e-9], [32768, 32768, 32768, 32768]),
        ([1 - 1e-9, 0.0, 1.0, 1e-9], [65536, 0, 65536, 0]),
    ],
)
def test_corners_are_rounded_inwards(box, corners):
    assert quantise_box(box) == quantise_box(np.array(box)) == quantise_box(tuple(box)) == corners


def test_boxes_of_a_batch_count_images_through(processor):
    """Samples with two, no and three images."""
    conversations = [
        ask("Q", picture(1), picture(2)) + answer((BOX, 1), "A", (BOX, 0)),
        ask("Q") + answer("A"),
        ask("Q", picture(3), picture(4), picture(5, (56, 84))) + answer((BOX, 2), BOX, "A"),
    ]
    boxes = encode(processor, *conversations)["boxes"]
    assert boxes.dtype == torch.int64
    corners = [16384, 32768, 49152, 65536]
    assert boxes.tolist() == [[[*corners, image]] * 8 for image in (1, 0, 4, 2)]


def test_boxes_may_come_beside_the_text(processor):
    text, images = texts((1, 1), (0, 0), (2, 2))
    boxes = [[BOX], [], [{"box": BOX, "image_index": 1}, BOX]]
    found = processor(text=text, images=images, boxes=boxes, padding=True, return_tensors="pt")["boxes"]
    assert found[:, 0, 4].tolist() == [0, 2, 1]
    as_arrays = processor(text=text, images=images, boxes=boxes, padding=True, return_tensors="np")["boxes"]
    assert isinstance(as_arrays, np.ndarray) and as_arrays.tolist() == found.tolist()
    one = processor(text=text[0], images=images[:1], boxes=[BOX], return_tensors="pt")["boxes"]
    assert one.tolist() == found[:1].tolist()


def test_no_reflection_no_boxes(processor):
    assert "boxes" not in encode(processor, ask("Q", picture(1)) + answer("A"))
    text, images = texts((1, 0), (0, 0))
    inputs = processor(text=text, images=images, boxes=[[], []], padding=True, return_tensors="pt")
    assert inputs["boxes"].shape == (0, 8, 5)


# Paths

PATH = [[0.0, 0.0, 0.25, 0.25], [0.25, 0.5, 0.75, 1.0], [0.25, 0.5, 0.75, 1.0], [0.5, 0.5, 1.0, 1.0]]
CORNERS = [
    [0, 0, 16384, 16384],
    [16384, 32768, 49152, 65536],
    [16384, 32768, 49152, 65536],
    [32768, 32768, 65536, 65536],
]


def path(boxes, **keys):
    return {"type": "reflection", "boxes": boxes, **keys}


def reflect(*parts):
    return [{"role": "assistant", "content": [*parts, {"type": "text", "text": "A"}]}]


@pytest.mark.parametrize("count", [1, 3, 4])
def test_each_step_has_its_box_and_the_last_one_repeats(processor, count):
    found = encode(processor, ask("Q", picture(1)) + reflect(path(PATH[:count])))["boxes"]
    assert found.dtype == torch.int64
    assert found.tolist() == [[[*CORNERS[min(step, count - 1)], 0] for step in range(8)]]


def test_a_path_may_have_as_many_boxes_as_there_are_steps(processor):
    found = encode(processor, ask("Q", picture(1)) + reflect(path(PATH * 2)))["boxes"]
    assert found.tolist() == [[[*corners, 0] for corners in CORNERS * 2]]


def test_a_path_leads_through_several_pictures_of_its_sample(processor):
    """One image for all boxes, or one for each; next to single boxes, in a batch."""
    conversations = [
        ask("Q", picture(1)) + answer(BOX, "A"),
        ask("Q", picture(2), picture(3))
        + reflect(path(PATH[:3], image_index=[1, 0, 1]), path(PATH[:2], image_index=1), path(PATH[:2])),
    ]
    images = encode(processor, *conversations)["boxes"][..., 4]
    assert images.tolist() == [[0] * 8, [2, 1] + [2] * 6, [2] * 8, [1] * 8]


def test_paths_may_come_beside_the_text_and_with_the_keys_that_arrow_fills(processor):
    text, images = texts((2, 2))
    parts = [
        {"boxes": np.array(PATH[:2]), "image_index": np.array([0, 1])},
        {"type": "reflection", "text": None, "box": BOX, "boxes": None, "image_index": None},
    ]
    found = processor(text=text, images=images, boxes=[parts], return_tensors="pt")["boxes"]
    assert found[0].tolist() == [[*CORNERS[0], 0]] + [[*CORNERS[1], 1]] * 7
    assert found[1].tolist() == [[*CORNERS[1], 0]] * 8


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"boxes": PATH[:1] * 9}, "Reflection 1 of sample 1 has 9 boxes, but only 8 latent steps"),
        ({"boxes": []}, "Reflection 1 of sample 1 must have as `boxes` at least one"),
        ({"boxes": "all"}, "Reflection 1 of sample 1 must have as `boxes` .* got 'all'"),
        ({"boxes": BOX}, "Box 0 of reflection 1 of sample 1 must be .* got 0.25"),
        ({"boxes": PATH, "box": BOX}, "Reflection 1 of sample 1 has both `box` and `boxes`"),
        ({}, "Box 1 of sample 1 must be .* got None"),
        ({"boxes": [BOX, [0.5, 0, 0.1, 1]]}, r"Box 1 of reflection 1 of sample 1 must have x0 < x1.*\[0.5, 0.0, 0.1, 1.0\]"),
        ({"boxes": PATH, "image_index": [0, 0]}, "Reflection 1 of sample 1 has 4 boxes, but 2 numbers in `image_index`"),
        ({"boxes": PATH[:2], "image_index": [0, 2]}, "Box 1 of reflection 1 of sample 1 has `image_index` 2, but the sample has 2"),
        ({"boxes": PATH[:2], "image_index": [0, None]}, "Box 1 of reflection 1 of sample 1 has `image_index` None"),
        ({"boxes": PATH[:2], "image_index": -1}, "Box 0 of reflection 1 of sample 1 has `image_index` -1"),
        ({"box": BOX, "image_index": [1]}, r"Box 1 of sample 1 has `image_index` \[1\]: of a single `box`"),
        ({"box": BOX, "boxs": PATH}, "Reflection 1 of sample 1 has the key 'boxs', which nothing reads"),
    ],
)  # fmt: skip
def test_what_is_no_path_is_refused_by_name(processor, part, message):
    before = ask("Q", picture(1)) + answer(BOX)
    conversation = ask("Q", picture(2), picture(3)) + reflect(path([BOX]), {"type": "reflection", **part})
    with pytest.raises(ValueError, match=message):
        encode(processor, before, conversation)
    text, images = texts((1, 1), (2, 2))
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=images, boxes=[[BOX], [BOX, part]], padding=True)


# S


@pytest.fixture
def folder(processor, model, tmp_path):
    """A folder as it was written before processors knew S."""
    processor.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "processor_config.json").read_text())
    assert fields.pop("num_latent_tokens") == 8
    (tmp_path / "processor_config.json").write_text(json.dumps(fields))
    return tmp_path


def test_the_number_of_steps_is_saved(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "num_latent_tokens", 3)
    monkeypatch.setattr(processor, "chat_template", build_chat_template(num_latent_tokens=3))
    processor.save_pretrained(tmp_path)
    loaded = VReflectionProcessor.from_pretrained(tmp_path)
    conversation = ask("Q", picture(1)) + reflect(path(PATH[:2]))
    assert encode(loaded, conversation)["boxes"].tolist() == [[[*CORNERS[step], 0] for step in (0, 1, 1)]]
    with pytest.raises(ValueError, match="4 boxes, but only 3 latent steps"):
        encode(loaded, ask("Q", picture(1)) + reflect(path(PATH)))


def test_a_folder_of_before_takes_it_from_its_config(processor, folder):
    loaded = VReflectionProcessor.from_pretrained(folder)
    assert loaded.num_latent_tokens == 8
    conversation = ask("Q", picture(1)) + answer(BOX, "A")
    found, expected = encode(loaded, conversation), encode(processor, conversation)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_without_a_number_of_steps_boxes_are_refused_and_prompts_are_not(processor, folder):
    (folder / "config.json").unlink()
    loaded = VReflectionProcessor.from_pretrained(folder)
    assert loaded.num_latent_tokens is None
    prompt = ask("Q", picture(1))
    assert torch.equal(encode(loaded, prompt)["input_ids"], encode(processor, prompt)["input_ids"])
    with pytest.raises(ValueError, match="Set `processor.num_latent_tokens`"):
        encode(loaded, prompt + answer(BOX, "A"))
    loaded.num_latent_tokens = 8
    assert encode(loaded, prompt + answer(BOX, "A"))["boxes"].shape == (1, 8, 5)


# What is no box

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ([NAN, 0.1, 0.5, 0.5], r"corners in \[0, 1\]"),
        ([0.1, 0.1, 0.5, NAN], r"corners in \[0, 1\]"),
        ([0.1, 0.1, INF, 0.5], r"corners in \[0, 1\]"),
        ([-INF, 0.1, 0.2, 0.5], r"corners in \[0, 1\]"),
        ([-0.01, 0.1, 0.5, 0.5], r"corners in \[0, 1\]"),
        ([0.1, 0.1, 0.5, 1.01], r"corners in \[0, 1\]"),
        ([10, 10, 50, 50], r"corners in \[0, 1\]"),
        ([0.5, 0.1, 0.1, 0.5], "x0 < x1"),
        ([0.1, 0.5, 0.5, 0.1], "y0 < y1"),
        ([0.1, 0.1, 0.1, 0.5], "x0 < x1"),
        ([0.1, 0.5, 0.5, 0.5], "y0 < y1"),
        ([0.1, 0.1, 0.5], r"\[x0, y0, x1, y1\]"),
        ([0.1, 0.1, 0.5, 0.5, 0.5], r"\[x0, y0, x1, y1\]"),
        (None, r"\[x0, y0, x1, y1\]"),
        (["a", 0.1, 0.5, 0.5], r"\[x0, y0, x1, y1\]"),
        (0.5, r"\[x0, y0, x1, y1\]"),
    ],
)
def test_what_is_no_box_is_refused_by_name(processor, box, problem):
    text, images = texts((1, 1), (1, 2))
    message = rf"(?s)Box 1 of sample 1 must .*{problem}"
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=images, boxes=[[BOX], [BOX, {"box": box}]], padding=True)
    conversations = [ask("Q", picture(1)) + answer(BOX), ask("Q", picture(2)) + answer(BOX, "A")]
    conversations[1][1]["content"].append({"type": "reflection", "box": box})
    with pytest.raises(ValueError, match=message):
        encode(processor, *conversations)


@pytest.mark.parametrize("image", [1, 2, -1, 0.5, "first"])
def test_a_wrong_image_index_is_refused_by_name(processor, image):
    """Sample 0 has two images, sample 1 only one: its index 1 is wrong all the same."""
    conversations = [ask("Q", picture(1), picture(2)) + answer(BOX), ask("Q", picture(3)) + answer(BOX, (BOX, image))]
    with pytest.raises(
        ValueError, match=f"Box 1 of sample 1 has `image_index` {image!r}, but the sample has 1 images"
    ):
        encode(processor, *conversations)


def test_a_box_without_an_image_is_refused_by_name(processor):
    with pytest.raises(ValueError, match="Box 0 of sample 0 has `image_index` 0, but the sample has 0 images"):
        encode(processor, ask("Q") + answer(BOX))


@pytest.mark.parametrize(("boxes", "count"), [([BOX, BOX, BOX], 3), ([BOX], 1), ([], 0)])
def test_another_number_of_boxes_than_segments_is_refused_by_name(processor, boxes, count):
    text, images = texts((1, 1), (1, 2))
    with pytest.raises(ValueError, match=f"Sample 1 has 2 reflection segments, but {count} boxes"):
        processor(text=text, images=images, boxes=[[BOX], boxes], padding=True)


def test_boxes_for_another_number_of_texts_are_refused(processor):
    text, images = texts((1, 1), (1, 1))
    with pytest.raises(ValueError, match="a list for each of the 2 texts, got 1"):
        processor(text=text, images=images, boxes=[[BOX]], padding=True)
