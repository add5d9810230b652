"""Thoughts in words (`reasoning_content`) of a row are trained on, or the row is refused; they are never left out."""

import pytest
from datasets import Dataset
from PIL import Image
from tiny_models import save_thinking_backbone

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.inference.encoding import answer_texts
from vreflection_hub_card.rows import FEATURES, BadRow, normalise_row, row_messages
from vreflection_training import VReflectionDataCollator
from vreflection_training.data.inspection import inspect_row


ASK = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which glyph?"}]}
LOOK = {"type": "reflection", "box": [0.0, 0.0, 0.5, 0.5]}
SAID = {"role": "assistant", "content": [LOOK, {"type": "text", "text": "K"}], "reasoning_content": "It is red."}


def row(*messages):
    return {"id": "a", "images": [Image.new("RGB", (84, 56))] * sum(m is ASK for m in messages), "messages": messages}


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """Config and processor of a model that thinks in words."""
    folder = save_thinking_backbone(tmp_path_factory.mktemp("thinking"))
    model, processor = VReflectionForConditionalGeneration.from_backbone(folder)
    return model.config, processor


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("thoughts, rendered", [("It is red.", "It is red.\n"), (None, "")])
def test_thoughts_are_learned_before_the_reflection(thinking, stored, thoughts, rendered):
    config, processor = thinking
    given = row(ASK, {**SAID, "reasoning_content": thoughts})
    if stored:  # as readers bring rows, with None in the question's column
        given = Dataset.from_list([normalise_row(given, "a", "b")], features=FEATURES)[0]
        assert given["messages"][0]["reasoning_content"] is None
    batch = VReflectionDataCollator(processor, config)([given])
    labels = batch["labels"][0]
    learned = processor.tokenizer.decode(labels[labels != -100])
    assert learned == rendered + "</think>\n\n<|sovt|>K<|im_end|>"
    assert inspect_row(given, processor).tokens == len(labels)


def test_a_model_without_thoughts_refuses_them(processor, model):
    given = row(ASK, SAID)
    with pytest.raises(BadRow, match="Sample a has `reasoning_content`, and this model has not learned to think"):
        VReflectionDataCollator(processor, model.config)([given])
    assert inspect_row(given, processor).kind == "thoughts"


@pytest.mark.parametrize(
    "messages, message",
    [
        ([ASK, SAID, ASK, SAID], "before the last question, where thoughts are forgotten"),
        ([{**ASK, "reasoning_content": "Hm."}, SAID], "nothing reads 'reasoning_content'"),
        ([ASK, {**SAID, "reasoning_content": ["Hm."]}], "`reasoning_content` must be a text"),
        ([ASK, {**SAID, "reasoning_content": "<image>"}], "<image> stands in the text"),
    ],
)
def test_thoughts_in_a_wrong_place_or_form_make_a_bad_row(messages, message):
    with pytest.raises(BadRow, match=message):
        row_messages(row(*messages))
    assert message in normalise_row(row(*messages), "a", "b")["error"]


def test_an_answer_is_compared_without_its_thoughts(thinking, processor):
    tokens = thinking[1].tokenizer(["It is red.\n</think>\n\nK<|im_end|>", "No end"])["input_ids"]
    assert answer_texts(thinking[1], tokens) == ["K", ""]
    assert answer_texts(processor, processor.tokenizer(["a</think>K"])["input_ids"]) == ["a</think>K"]
