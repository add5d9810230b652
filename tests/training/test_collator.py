import pytest
import torch
from PIL import Image

from vreflection_hub_card.glyphsearch import DIFFICULTIES, scene_row
from vreflection_training import VReflectionDataCollator, collator


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
    # As the released code labels: the newline after the turn in both stages, in stage 2 the end token without the slots.
    closed = supervised(collate([row], closing_ce=True), processor, 0)
    assert closed == f"<|sovt|><|eovt|>{answer}<|im_end|>\n"
    closed = supervised(collate([row], closing_ce=True, slot_ce=True), processor, 0)
    assert closed == "<|sovt|>" + "<|lvr|>" * 8 + f"<|eovt|>{answer}<|im_end|>\n"
    assert supervised(collate([row], reflect=False), processor, 0) == f"{answer}<|im_end|>"
    assert "boxes" not in collate([row], reflect=False)


def test_samples_without_picture_or_box_share_a_batch(collate, processor):
    batch = collate([TEXT_ONLY, scene(0), WITHOUT_BOX, scene(1)])
    assert batch["boxes"][..., 4].tolist() == [[0] * 8, [2] * 8]  # images: scene 0, the one without box, scene 1
    assert len(batch["image_grid_thw"]) == 3
    assert batch["sample_ids"] == ["text", "glyphsearch-train-0", "no-box", "glyphsearch-train-1"]
    assert supervised(batch, processor, 0) == "Which glyph<|im_end|>"
    assert supervised(batch, processor, 2) == "K<|im_end|>"


@pytest.mark.parametrize("packed", [False, True])
def test_paths_count_the_images_of_the_batch_through(collate, packed):
    boxes = [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
    row = {
        "id": "path",
        "images": [Image.new("RGB", (56, 56))] * 2,
        "messages": [
            {"role": "user", "content": "Which?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "reflection", "boxes": boxes, "image_index": [1, 0]},
                    {"type": "reflection", "box": boxes[0], "image_index": 1},
                    {"type": "text", "text": "K"},
                ],
            },
        ],
    }
    rows = [row, WITHOUT_BOX, TEXT_ONLY, row]
    batch = collate([rows[:2], rows[2:]] if packed else rows)
    low, high = [0, 0, 32768, 32768], [32768, 32768, 65536, 65536]
    assert batch["boxes"].tolist() == [
        [[*low, 1]] + [[*high, 0]] * 7,
        [[*low, 1]] * 8,
        [[*low, 4]] + [[*high, 3]] * 7,
        [[*low, 4]] * 8,
    ]
    assert batch["reflections"] == [2, 0, 0, 2]


def test_alignment_moves_rows_and_changes_nothing_in_them(collate, model):
    longer = scene(1)
    longer["messages"][0]["content"][1]["text"] += " red red"
    rows = [scene(0), TEXT_ONLY, longer]
    plain, aligned = collate(rows), collate(rows, align_segments=True)
    starts = [(b["input_ids"] == model.config.latent_token_id).int().argmax(1) for b in (plain, aligned)]
    assert starts[0][0] != starts[0][2] and starts[1][0] == starts[1][2]
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


def test_each_row_is_prepared_once_whatever_is_wrong_with_others(collate, processor, monkeypatch, tmp_path):
    """Bad rows drop out where they are prepared: nobody opens a picture or renders a conversation again."""
    bad_box = scene(2)
    bad_box["messages"][1]["content"][0]["box"] = [0.5, 0.1, 0.4, 0.3]
    missing = {**scene(3), "id": "missing", "images": [str(tmp_path / "missing.png")]}
    good = [scene(0), TEXT_ONLY, WITHOUT_BOX, scene(1)]
    expected = collate(good)
    calls = {"open": [], "render": []}

    def counted(name, call):
        def count(*arguments, **options):
            calls[name].append(arguments)
            return call(*arguments, **options)

        return count

    monkeypatch.setattr(collator, "load_image", counted("open", collator.load_image))
    template = counted("render", type(processor).apply_chat_template)
    monkeypatch.setattr(type(processor), "apply_chat_template", template)
    batch = collate([bad_box, *good[:2], missing, *good[2:]], on_bad_row="skip")
    assert len(calls["open"]) == 5  # three good rows with a picture, the two bad ones
    assert len(calls["render"]) == 4  # of the bad ones none is rendered
    assert [message.split(":")[0] for message in batch.pop("skipped")] == [
        "Sample glyphsearch-train-2",
        "Sample missing",
    ]
    for key, value in batch.items():
        assert torch.equal(value, expected[key]) if torch.is_tensor(value) else value == expected[key], key


def test_a_dummy_row_runs_every_module_and_has_no_labels(collate):
    batch = collate([TEXT_ONLY], every_module=True)
    assert batch["dummy"] and batch["sample_ids"] == ["text"] and batch["reflections"] == [0]
    assert batch["boxes"].shape == (1, 8, 5) and (batch["labels"][1] == -100).all() and "pixel_values" in batch
    assert not collate([TEXT_ONLY, scene(0)], every_module=True)["dummy"]
    packed = collate([[TEXT_ONLY]], every_module=True)
    assert packed["dummy"] and len(packed["input_ids"]) == 1
    alone = collate([{**TEXT_ONLY, "messages": []}], on_bad_row="skip")
    assert alone["dummy"] and alone["sample_ids"] == [] and alone["num_tokens"] == 0
