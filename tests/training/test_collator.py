import pytest
from PIL import Image

from vreflection_hub_card.glyphsearch import DIFFICULTIES, scene_row
from vreflection_training import VReflectionDataCollator


@pytest.fixture
def collate(processor, model):
    def make(rows, **options):
        return VReflectionDataCollator(processor, model.config, **options)(rows)

    return make


def scene(index):
    return scene_row(index, "train", DIFFICULTIES["default"])


TEXT_ONLY = {
    "id": "text",
    "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Which glyph"}],
}
WITHOUT_BOX = {
    "id": "no-box",
    "images": [Image.new("RGB", (56, 84), "red")],
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "K"}]},
    ],
}


def supervised(batch, processor, row):
    return processor.tokenizer.decode(batch["labels"][row][batch["labels"][row] != -100])


def test_assistant_tokens_are_labelled_and_forced_tokens_are_not(collate, processor):
    row = scene(0)
    batch = collate([row])
    answer = row["messages"][1]["content"][1]["text"]
    assert supervised(batch, processor, 0) == f"<|sovt|>{answer}<|im_end|>"
    assert supervised(collate([row], slot_ce=True), processor, 0) == (
        "<|sovt|>" + "<|lvr|>" * 8 + f"<|eovt|>{answer}<|im_end|>"
    )
    assert supervised(collate([row], reflect=False), processor, 0) == f"{answer}<|im_end|>"
    assert "boxes" not in collate([row], reflect=False)


def test_samples_without_picture_or_box_share_a_batch(collate, processor):
    batch = collate([TEXT_ONLY, scene(0), WITHOUT_BOX, scene(1)])
    assert batch["boxes"][:, 0].tolist() == [0, 2]  # images: scene 0, the one without box, scene 1
    assert len(batch["image_grid_thw"]) == 3
    assert batch["sample_ids"] == ["text", "glyphsearch-train-0", "no-box", "glyphsearch-train-1"]
    assert supervised(batch, processor, 0) == "Which glyph<|im_end|>"
    assert supervised(batch, processor, 2) == "K<|im_end|>"


def test_alignment_moves_rows_and_changes_nothing_in_them(collate, model):
    rows = [scene(0), TEXT_ONLY, scene(1)]
    plain, aligned = collate(rows), collate(rows, align_segments=True)
    starts = (aligned["input_ids"] == model.config.latent_token_id).int().argmax(1)[[0, 2]]
    assert starts[0] == starts[1]
    for row in range(3):
        kept = [batch["attention_mask"][row].bool() for batch in (plain, aligned)]
        for key in ("input_ids", "labels", "mm_token_type_ids"):
            assert plain[key][row][kept[0]].tolist() == aligned[key][row][kept[1]].tolist()


def test_a_sample_over_the_limit_is_named_not_cut(collate):
    with pytest.raises(ValueError, match="Sample glyphsearch-train-1 has .* tokens, above `max_length`"):
        collate([TEXT_ONLY, scene(1)], max_length=40)


def test_a_sample_without_an_answer_is_named(collate):
    with pytest.raises(ValueError, match="Sample question has nothing to learn from"):
        collate([scene(0), {"id": "question", "messages": TEXT_ONLY["messages"][:1]}])


def test_a_bad_box_names_the_sample(collate):
    row = scene(3)
    row["messages"][1]["content"][0]["box"] = [0.5, 0.1, 0.4, 0.3]
    with pytest.raises(ValueError, match="^Sample glyphsearch-train-3: [^,]*must have x0 < x1"):
        collate([TEXT_ONLY, row])


def test_a_missing_picture_names_the_sample(collate):
    row = {**scene(3), "images": []}
    with pytest.raises(ValueError, match="glyphsearch-train-3"):
        collate([row])
