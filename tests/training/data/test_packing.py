import random

import devices
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from PIL import Image
from transformers.utils import is_flash_attn_2_available

from vreflection_hub_card.rows import BadRow
from vreflection_training import VReflectionDataCollator
from vreflection_training.collator import NON_MODEL_KEYS
from vreflection_training.data.packing import pack_dataset, pack_samples
from vreflection_training.losses import attention_distillation_loss, bcm_alignment_loss, feature_distillation_loss


def picture(seed, width, height):
    return Image.effect_noise((width, height), 80).convert("RGB").rotate(90 * seed)


def row(name, boxes=(), sizes=((84, 56),), answer="Which glyph"):
    """A row with pictures of these sizes and reflections on these (image, box), or on a path (image, boxes)."""
    content = [{"type": "image", "image": picture(seed, *size)} for seed, size in enumerate(sizes)]
    reflections = [
        {"type": "reflection", "boxes" if isinstance(box[0], list) else "box": box, "image_index": image}
        for image, box in boxes
    ]
    return {
        "id": name,
        "messages": [
            {"role": "user", "content": [*content, {"type": "text", "text": f"{name}?"}]},
            {"role": "assistant", "content": [*reflections, {"type": "text", "text": answer}]},
        ],
    }


ROWS = [
    row("one", [(0, [0.1, 0.2, 0.6, 0.9])]),
    row("text", sizes=(), answer="red cross is on the"),
    row("several pictures", [(1, [0.0, 0.0, 0.5, 0.5]), (0, [0.5, 0.5, 1.0, 1.0])], ((56, 112), (140, 84))),
    row("no reflection", sizes=((56, 56),)),
    row("last", [(0, [[0.3, 0.3, 0.9, 0.4], [0.0, 0.5, 0.2, 1.0]])], ((112, 112),), "blue"),
]
PACKS = [[ROWS[0], ROWS[1], ROWS[2]], [ROWS[3], ROWS[4]]]


def forward(model, batch, latent_inputs):
    inputs = {key: value.to(model.device) for key, value in batch.items() if key not in NON_MODEL_KEYS}
    return model(**inputs, latent_inputs=latent_inputs, use_cache=False)


def run(model, batch, latent_inputs):
    """Logits at every token that isn't padding, sample by sample, and what was seen at the segments."""
    outputs = forward(model, batch, latent_inputs)
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100).to(model.device)
    nll = F.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    losses = {
        "ce": nll,
        "bcm": bcm_alignment_loss(outputs.latent_states, outputs.teacher_latents, alignment="symmetric"),
        "feat": feature_distillation_loss(outputs.student_latents, outputs.teacher_latents),
        "attn": attention_distillation_loss(outputs.student_attention, outputs.teacher_attention),
    }
    return outputs, losses


@pytest.fixture(scope="module", params=["sdpa none", "eager sincos"])
def strong(request, make_model):
    """What is fed decides what comes out, so that a leak between samples shows."""
    attention, positions = request.param.split()
    model = make_model(dac_queries="states", patch_positions=positions)
    model.set_attn_implementation({"text_config": attention})
    return model


@pytest.mark.parametrize("latent_inputs", ["bcm", "dac"])
def test_packed_and_separate_agree(strong, processor, latent_inputs):
    collate = VReflectionDataCollator(processor, strong.config)
    strong.zero_grad()
    packed, packed_losses = run(strong, batch := collate(PACKS), latent_inputs)
    sum(packed_losses.values()).backward()
    packed_gradients = {
        name: value.grad.clone() for name, value in strong.named_parameters() if value.grad is not None
    }

    strong.zero_grad()
    separate, separate_losses = run(strong, apart := collate(ROWS), latent_inputs)
    sum(separate_losses.values()).backward()

    lengths, at = apart["attention_mask"].sum(1).tolist(), 0
    rows = [packed.logits[0], packed.logits[1]]
    where = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    for sample, (pack, number) in enumerate(where):
        at = 0 if number == 0 else at
        torch.testing.assert_close(
            rows[pack][at : at + lengths[sample]], separate.logits[sample, : lengths[sample]], rtol=0, atol=5e-5
        )
        at += lengths[sample]
    for name in ("latent_states", "teacher_latents", "student_latents", "teacher_attention", "student_attention"):
        torch.testing.assert_close(getattr(packed, name), getattr(separate, name), rtol=0, atol=5e-5, msg=name)
    for name, loss in separate_losses.items():
        assert packed_losses[name].item() == pytest.approx(loss.item(), rel=5e-5), name
    for name, parameter in strong.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().clamp(min=1)
            difference = (packed_gradients[name] - parameter.grad).abs().max()
            assert difference <= 5e-5 * scale, name
    assert batch["input_ids"].shape[0] == 2


no_flash_attention = devices.DEVICE.type != "cuda" or not is_flash_attn_2_available()


@pytest.mark.parametrize(
    "attention",
    [
        "sdpa",
        pytest.param(
            "flash_attention_2",
            marks=pytest.mark.skipif(no_flash_attention, reason="needs flash-attn and --device cuda"),
        ),
    ],
)
@pytest.mark.parametrize("latent_inputs", ["bcm", "dac"])
def test_packed_and_separate_agree_in_bfloat16(make_model, processor, attention, latent_inputs):
    """One pack a batch, as flash attention takes them. A leak between samples changes a value by 0.4 on average."""
    model = make_model(patch_positions="sincos").to(torch.bfloat16)
    model.set_attn_implementation({"text_config": attention})
    collate = VReflectionDataCollator(processor, model.config)
    with torch.no_grad():
        packed = [forward(model, collate([pack]), latent_inputs).last_hidden_state for pack in PACKS]
        apart = [forward(model, collate([row]), latent_inputs).last_hidden_state for row in ROWS]
    assert (torch.cat(packed, 1) - torch.cat(apart, 1)).abs().mean() < 0.01


def test_another_sample_in_the_pack_changes_nothing(strong, processor):
    """Bit by bit: neither attention nor BCM nor DAC looks across. No shape changes, or sums may run in another order."""
    collate = VReflectionDataCollator(processor, strong.config)
    # Other noise, and boxes on other patches, as many as before.
    changed = row("several pictures", [(1, [0.5, 0.5, 1.0, 1.0]), (0, [0.0, 0.0, 0.5, 0.5])], ((56, 112), (140, 84)))
    with torch.no_grad():
        first, _ = run(strong, collate([[ROWS[0], ROWS[2]]]), "dac")
        second, _ = run(strong, collate([[ROWS[0], changed]]), "dac")
    length = collate([ROWS[0]])["input_ids"].shape[1]
    assert torch.equal(first.logits[:, :length], second.logits[:, :length])
    assert not torch.equal(first.logits[:, length:], second.logits[:, length:])
    for name in ("latent_states", "teacher_latents", "student_latents", "student_attention"):
        assert torch.equal(getattr(first, name)[0], getattr(second, name)[0]), name


def test_without_boxes_the_student_sees_its_own_sample_alone(make_model, processor):
    model = make_model(has_bcm=False)
    collate = VReflectionDataCollator(processor, model.config)
    # Feeding states back can't run packed, so what they look at is compared.
    from modeling_vreflection.segments_vreflection import find_segments, images_before

    batch = collate(PACKS[:1])
    segments = find_segments(batch["input_ids"], model.config)
    tokens = (batch["image_grid_thw"].prod(1) // 4).tolist()
    seen = images_before(batch["input_ids"], batch["position_ids"], segments, tokens, model.config.image_token_id)
    assert [list(images) for images in seen] == [[0], [1, 2], [1, 2]]


def test_a_pack_is_labelled_like_its_samples(processor, model):
    collate = VReflectionDataCollator(processor, model.config)
    pack, apart = collate([ROWS]), collate(ROWS)
    real = apart["attention_mask"].bool()
    for key in ("input_ids", "labels", "mm_token_type_ids"):
        assert torch.equal(pack[key][0], apart[key][real]), key
    assert torch.equal(pack["boxes"], apart["boxes"]) and torch.equal(pack["pixel_values"], apart["pixel_values"])
    assert pack["position_ids"][0].tolist() == [n for length in real.sum(1).tolist() for n in range(length)]
    assert (pack["labels"][0][pack["position_ids"][0] == 0] == -100).all()
    assert "attention_mask" not in pack and pack["num_tokens"] == int(real.sum())


def test_packed_rows_need_their_token_types_and_no_cache(model, processor):
    batch = VReflectionDataCollator(processor, model.config)([[ROWS[1], ROWS[1]]])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with pytest.raises(ValueError, match="need `mm_token_type_ids`"):
        model(**inputs, use_cache=False)
    with pytest.raises(ValueError, match="need `use_cache=False`"):
        model(**inputs, mm_token_type_ids=batch["mm_token_type_ids"])


def test_plain_positions_of_a_text_are_as_good_as_none(model, processor):
    ids = processor.tokenizer("Which glyph is on the red cross?", return_tensors="pt")["input_ids"].to(model.device)
    with torch.no_grad():
        given = model(input_ids=ids, position_ids=torch.arange(ids.shape[1], device=ids.device)[None]).logits
        assert torch.equal(given, model(input_ids=ids).logits)


def test_a_bad_row_of_a_stream_takes_no_place_in_a_pack():
    assert packs_of([10, 0, 10, 10, 10], max_length=100) == [[1], [0, 2, 3, 4]]


def lengths(count, seed=0):
    draw = random.Random(seed)
    return [min(int(draw.lognormvariate(6.8, 0.8)), 16_000) for _ in range(count)]


def packs_of(sizes, **rule):
    return list(pack_samples(enumerate(sizes), **{"max_length": 16_384, **rule}))


@pytest.mark.parametrize("lookahead", [1, 7, 256, 5000])
def test_the_rule_of_the_paper_holds(lookahead):
    sizes = lengths(3000)
    packs = packs_of(sizes, lookahead=lookahead)
    assert sorted(number for pack in packs for number in pack) == list(range(3000))
    for pack in packs:
        assert sum(sizes[number] for number in pack) <= 16_384 and len(pack) <= 4
        assert len(pack) == 1 or all(sizes[number] <= 4096 for number in pack)


def test_the_longest_sample_that_fits_joins():
    assert packs_of([50, 30, 60, 45, 10], max_length=100) == [[0, 3], [1, 2, 4]]
    assert packs_of([50, 50, 50], max_length=100) == [[0, 1], [2]]  # of equal lengths the older
    assert packs_of([10] * 6, max_length=100) == [[0, 1, 2, 3], [4, 5]]
    assert packs_of([10, 70, 10], max_length=100, long_length=60) == [[1], [0, 2]]


def test_nothing_is_read_further_ahead_than_told():
    read = []

    def samples():
        for number in range(100):
            read.append(number)
            yield number, 10

    packs = pack_samples(samples(), max_length=1000, max_samples=4, lookahead=16)
    assert next(packs) == [0, 1, 2, 3] and len(read) == 16


def test_no_sample_waits_for_ever():
    # A short one that never is the best fit.
    sizes = [10] + [50] * 200
    packs = packs_of(sizes, max_length=100, lookahead=8)
    assert 0 in packs[0]


def test_a_sample_longer_than_a_pack_raises():
    with pytest.raises(ValueError, match="A sample of 101 tokens doesn't fit a pack of 100"):
        packs_of([10, 101], max_length=100)


def test_packing_fills_more_than_the_order_of_arrival():
    sizes = [size for size in lengths(4000, seed=1) if size <= 4096]
    rule = {"max_length": 4096, "max_samples": 100}
    assert len(packs_of(sizes, lookahead=256, **rule)) < 0.93 * len(packs_of(sizes, lookahead=1, **rule))


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_rows_that_are_bad_or_too_long_stop_or_are_left_out(processor, tmp_path, on_bad_row):
    gone = {**row("gone"), "images": [str(tmp_path / "gone.png")]}
    gone["messages"][0]["content"][0] = {"type": "image"}
    good = [row(f"good {number}", sizes=()) for number in range(3)]
    rows = Dataset.from_dict({"index": range(5)}).with_transform(
        lambda batch: {key: [data[index].get(key) for index in batch["index"]] for key in ("id", "images", "messages")}
    )
    data = [*good, gone, row("long", answer="red " * 100)]
    rule = {"max_length": 80, "max_samples": 2}
    if on_bad_row == "error":
        with pytest.raises(BadRow, match="Sample gone: .*no such file"):
            pack_dataset(rows, processor, rule)
        with pytest.raises(BadRow, match="Sample long has .* tokens, above `max_length`"):
            pack_dataset(rows.select([0, 1, 2, 4]), processor, rule)
        return
    packs, skipped = pack_dataset(rows, processor, rule, on_bad_row="skip")
    assert packs.packs == [[0, 1], [2]] and [data["id"] for data in packs[0]] == ["good 0", "good 1"]
    assert [message.split(":")[0].split(" has")[0] for message in skipped] == ["Sample gone", "Sample long"]
    assert sorted(sum(pack_dataset(rows, processor, rule, on_bad_row="skip", seed=1)[0].packs, [])) == [0, 1, 2]


def test_a_stream_packs_its_good_rows_and_leaves_bad_ones_to_the_collator(processor):
    texts = ["red", "red " * 100, "red", "red"]
    data = [row(str(number), sizes=(), answer=text) for number, text in enumerate(texts)]
    stream = IterableDataset.from_generator(lambda: iter(data))
    rule = {"max_length": 80, "max_samples": 2}
    packs, skipped = pack_dataset(stream, processor, rule, on_bad_row="skip")
    assert [[sample["id"] for sample in pack] for pack in packs] == [["1"], ["0", "2"], ["3"]] and skipped == []
    with pytest.raises(BadRow, match="Sample 1 has .* tokens, above `max_length`"):
        list(pack_dataset(stream, processor, rule)[0])
