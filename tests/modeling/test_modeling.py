"""The training forward: what fills the slots, what is seen there, where gradients go, and what is refused."""

from types import SimpleNamespace

import devices
import pytest
import torch
from reference import BOXES, Row, answer, ask, attend, encode, patches_inside, picture, with_positions
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from modeling_vreflection.regions_vreflection import boxes_by_step
from modeling_vreflection.segments_vreflection import images_before


STEPS = 8


def sample(question, pictures, *parts):
    """A conversation with its answer, and the (box, image) of each of its segments."""
    regions = [part if isinstance(part, tuple) else (part, 0) for part in parts if not isinstance(part, str)]
    return ask(question, *pictures) + answer(*parts), regions


@pytest.fixture(scope="module")
def mixed(processor):
    """Two segments over two images of different sizes, an image without a reflection, no image, one segment."""
    samples = [
        sample("Which?", [picture(1, (112, 84)), picture(2)], "A", (BOXES[0], 1), "N", (BOXES[1], 0), "Z"),
        sample("Which glyph is on the red cross?", [picture(3, (84, 84))], "A"),
        sample("Hello, what do you know?", [], "Nothing."),
        sample("What is this?", [picture(4, (168, 112))], BOXES[2], "Z"),
    ]
    return batch_of(processor, samples)


@pytest.fixture(scope="module")
def paths(processor, mixed):
    """The same rows, where segments follow paths: over two images, with a box twice in a row, as long as the segment."""
    there = [(BOXES[index % 3], index % 2) for index in range(STEPS)]
    regions = [[there, [(BOXES[1], 0), (BOXES[1], 0), (BOXES[0], 1)]], [], [], [[(BOXES[2], 0), (BOXES[0], 0)]]]
    first_image = [0, 2, 3, 3]  # of each row in the batch
    boxes = [
        [[round(65_536 * corner) for corner in box] + [first + image] for box, image in by_step(region)]
        for first, row in zip(first_image, regions)
        for region in row
    ]
    return SimpleNamespace(
        inputs={**mixed.inputs, "boxes": torch.tensor(boxes, device=devices.DEVICE)}, regions=regions
    )


@pytest.fixture(scope="module")
def aligned(processor):
    """What `latent_inputs="hidden"` takes: one segment a row, all in one column; rows without one; a shorter tail."""
    samples = [
        sample("Which glyph is on the red triangle?", [picture(1, (112, 84)), picture(2)], (BOXES[1], 1), "A"),
        sample("What?", [picture(3, (84, 84))], BOXES[0], "Z"),
        sample("Which glyph?", [picture(5, (56, 84))], "Z"),
        sample("Hello, what do you know?", [], "Z"),
        sample("What is this?", [picture(4, (168, 112))], BOXES[2], "Z"),
    ]
    batch = batch_of(processor, samples)
    batch.inputs["attention_mask"][1, -2:] = 0
    return batch


def batch_of(processor, samples, **kwargs):
    inputs = encode(processor, *[messages for messages, _ in samples], **kwargs)
    return SimpleNamespace(inputs=inputs, regions=[regions for _, regions in samples])


def by_step(region) -> list[tuple[list[float], int]]:
    """The box and image of each step: `region` is a pair of them, or a list of pairs, whose last one is repeated."""
    path = region if isinstance(region, list) else [region]
    return [*path, *[path[-1]] * (STEPS - len(path))]


def expect(model, stock, batch, latent_inputs, position="before"):
    """Recomputes a training forward row by row and step by step: each row's states, and what is seen at segments."""
    start, slot, end = model.config.latent_token_ids
    rows, seen = [], {key: [] for key in ("H", "Z_T", "Z_S", "A_T", "A_S", "inside")}
    for index, regions in enumerate(batch.regions):
        row = Row(stock, batch.inputs, index)
        slots = (row.ids == slot).nonzero().flatten().view(-1, STEPS)
        assert len(slots) == len(regions) and (row.ids[slots[:, 0] - 1] == start).all()
        columns = slots.flatten()
        teachers, students = [], []
        # All pictures of these conversations come before their answers.
        sincos = model.config.patch_positions == "sincos"
        read = [with_positions(*image) if sincos else image[0] for image in zip(row.features, row.grids)]
        everything = torch.cat(read) if read else None
        offsets = torch.tensor([0, *map(len, row.features)]).cumsum(0).tolist()
        for region in regions:
            latents, (maps, inside) = [], everything.new_zeros(2, STEPS, len(everything))
            for step, (box, image) in enumerate(by_step(region)):
                patches = torch.tensor(patches_inside(box, row.grids[image]), device=everything.device)
                attention = everything.new_full((len(patches),), 1 / len(patches))
                if model.model.bcm is not None:
                    query = model.model.bcm.queries[None, step : step + 1]
                    seen_by_step, weights = attend(model.model.bcm, query, read[image][patches][None])
                    latents.append(seen_by_step[0, 0])
                    attention = weights[0, 0]
                maps[step, offsets[image] + patches] = attention.detach()
                inside[step, offsets[image] + patches] = 1
            seen["A_T"].append(maps)
            seen["inside"].append(inside)
            teachers += [torch.stack(latents)] if latents else []
        if latent_inputs == "hidden" or not teachers:
            for column in columns.tolist():
                row.fill([column], row.run(length=column)[-1:])
        else:
            filled = torch.cat(teachers)
            row.fill(columns, filled if latent_inputs == "bcm" else filled.detach())
        states = row.run()
        for segment in slots:
            seen["H"].append(states[segment - 1])
            queries = states[segment if position == "at" else segment - 1]
            latents, attention = attend(model.model.dac, queries[None], everything[None])
            students.append(latents[0])
            seen["A_S"].append(attention[0])
        if latent_inputs == "dac" and students:
            row.fill(columns, torch.cat(students))
            states = row.run()
        seen["Z_T"] += teachers
        seen["Z_S"] += students
        rows.append(states)
    stacked = {key: torch.stack(seen[key]) if seen[key] else None for key in ("H", "Z_T", "Z_S")}
    for key in ("A_T", "A_S", "inside"):
        stacked[key] = pad_sequence([maps.T for maps in seen[key]], batch_first=True).transpose(1, 2)
    return rows, stacked


def check(model, stock, batch, latent_inputs, position="before"):
    """Compares the forward with `expect`."""
    with torch.no_grad():
        outputs = model(**batch.inputs, latent_inputs=latent_inputs)
        rows, seen = expect(model, stock, batch, latent_inputs, position)
    close = {"atol": 1e-4, "rtol": 1e-4}
    for index, states in enumerate(rows):
        kept = batch.inputs["attention_mask"][index].bool()
        torch.testing.assert_close(outputs.last_hidden_state[index][kept], states, **close)
        torch.testing.assert_close(outputs.logits[index][kept], states @ stock.lm_head.weight.detach().T, **close)
    torch.testing.assert_close(outputs.latent_states, seen["H"], **close)
    if seen["Z_T"] is None:
        assert outputs.teacher_latents is None
    else:
        torch.testing.assert_close(outputs.teacher_latents, seen["Z_T"], **close)
    torch.testing.assert_close(outputs.student_latents, seen["Z_S"], **close)
    torch.testing.assert_close(outputs.teacher_attention, seen["A_T"], **close)
    torch.testing.assert_close(outputs.student_attention, seen["A_S"], **close)
    assert torch.equal(outputs.inside_box, seen["inside"].bool())
    return outputs


def test_without_reflections_it_is_the_stock_model(model, stock, processor):
    samples = [sample("Which?", [picture(1), picture(2, (84, 56))], "A"), sample("Hello", [], "Nothing.")]
    inputs = batch_of(processor, samples).inputs
    expected = stock(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model(**inputs, latent_inputs="bcm").logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("latent_inputs", ["bcm", "dac"])
def test_forward_equals_recomputation_row_by_row(model, stock, processor, mixed, latent_inputs, side, monkeypatch):
    if side == "right":
        monkeypatch.setattr(processor.tokenizer, "padding_side", "right")
        pictures = [picture(1, (112, 84)), picture(2)]
        samples = [
            sample("Hello", [], "Nothing."),
            sample("Which?", pictures, "A", (BOXES[1], 1), "N", (BOXES[0], 0), (BOXES[2], 1), "Z"),
            sample("What?", [picture(3, (84, 84))], BOXES[0], "A"),
        ]
        mixed = batch_of(processor, samples)
        assert mixed.inputs["attention_mask"][:, 0].all()
    check(model, stock, mixed, latent_inputs)


@pytest.mark.parametrize("positions", ["none", "sincos"])
@pytest.mark.parametrize("latent_inputs", ["bcm", "dac"])
def test_paths_equal_recomputation_step_by_step(make_model, stock, paths, latent_inputs, positions):
    check(make_model(patch_positions=positions), stock, paths, latent_inputs)


@pytest.mark.parametrize("has_bcm", [True, False])
@pytest.mark.parametrize("pooling", ["patch", "roi_align"])
def test_each_step_sees_what_a_call_with_its_box_alone_shows(make_model, paths, aligned, pooling, has_bcm):
    model = make_model(region_pooling=pooling, has_bcm=has_bcm)
    inputs = paths.inputs
    if not has_bcm:  # then states are fed back, in one segment a row
        boxes = boxes_by_step(aligned.inputs["boxes"], STEPS).clone()
        boxes[0, 2:5], boxes[0, 5:] = boxes[1, 0], boxes[2, 0]
        boxes[0, :, 4] = torch.tensor([0, 1] * 4)
        inputs = {**aligned.inputs, "boxes": boxes}
    options = {"latent_inputs": "bcm" if has_bcm else "hidden"}
    with torch.no_grad():
        whole = model(**inputs, **options)
        for step in range(STEPS):
            boxes = inputs["boxes"][:, step : step + 1].expand(-1, STEPS, -1)
            alone = model(**{**inputs, "boxes": boxes}, **options)
            if has_bcm:
                torch.testing.assert_close(whole.teacher_latents[:, step], alone.teacher_latents[:, step])
            torch.testing.assert_close(whole.teacher_attention[:, step], alone.teacher_attention[:, step])
            assert torch.equal(whole.inside_box[:, step], alone.inside_box[:, step])
    torch.testing.assert_close(whole.teacher_attention.sum(2), torch.ones_like(whole.teacher_attention[..., 0]))


def test_one_box_a_segment_can_be_given_with_its_image_in_front(model, mixed):
    boxes = boxes_by_step(mixed.inputs["boxes"], STEPS)
    assert boxes[:, 0, 4].tolist() == [1, 0, 3]
    with torch.no_grad():
        by_step, by_segment = (
            model(**{**mixed.inputs, "boxes": given}, latent_inputs="dac") for given in (boxes, boxes[:, 0].roll(1, 1))
        )
    for name in ("logits", "teacher_latents", "teacher_attention", "student_latents", "student_attention"):
        assert torch.equal(by_step[name], by_segment[name])


def test_positions_reach_bcm_and_dac_and_nobody_else(make_model, stock, processor, mixed):
    model = make_model(patch_positions="sincos")
    inputs = batch_of(processor, [sample("Which?", [picture(1), picture(2, (84, 56))], "A")]).inputs
    assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    plain = make_model()
    with torch.no_grad():
        ours, theirs = model(**mixed.inputs, latent_inputs="bcm"), plain(**mixed.inputs, latent_inputs="bcm")
    assert (ours.teacher_latents - theirs.teacher_latents).abs().max() > 0.1
    assert (ours.student_attention - theirs.student_attention).abs().max() > 1e-3


def test_positions_need_a_hidden_size_that_four_divides(make_model):
    with pytest.raises(ValueError, match="that 4 divides, got 190"):
        config = make_model().config.to_dict()
        config["text_config"] = {**config["text_config"], "hidden_size": 190}
        type(make_model().config)(**{**config, "patch_positions": "sincos", "compression_num_heads": 2})


def test_feeding_states_back_equals_uncached_recomputation(model, stock, aligned):
    check(model, stock, aligned, "hidden")


def test_the_three_ways_to_fill_slots_differ(model, aligned):
    """Else the comparisons above would not tell them apart."""
    with torch.no_grad():
        outputs = [model(**aligned.inputs, latent_inputs=way) for way in ("bcm", "dac", "hidden")]
    states = [output.last_hidden_state[:, -1] for output in outputs]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        distance = (states[first] - states[second]).abs().amax(1)
        assert (distance[[0, 4]] > 0.05).all()  # row 1 ends earlier
        assert (distance[[2, 3]] < 1e-5).all()  # rows without a reflection don't care


def test_a_batch_of_one_equals_its_row(model, processor, mixed):
    pictures = [picture(1, (112, 84)), picture(2)]
    alone = batch_of(processor, [sample("Which?", pictures, "A", (BOXES[0], 1), "N", (BOXES[1], 0), "Z")])
    with torch.no_grad():
        one, many = (model(**batch.inputs, latent_inputs="dac") for batch in (alone, mixed))
    length = alone.inputs["input_ids"].shape[1]
    torch.testing.assert_close(one.logits[0], many.logits[0, -length:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.student_attention, many.student_attention[:2], atol=1e-5, rtol=1e-4)


def test_dac_can_be_queried_by_the_states_at_the_slots(model, stock, mixed, monkeypatch):
    before = model(**mixed.inputs, latent_inputs="dac").student_latents
    monkeypatch.setattr(model.config, "query_position", "at")
    outputs = check(model, stock, mixed, "dac", position="at")
    assert (outputs.student_latents - before).abs().max() > 0.05


def test_static_queries_are_the_same_whatever_the_states(make_model, mixed):
    model = make_model(dac_queries="static")
    outputs = model(**mixed.inputs, latent_inputs="bcm")
    features = model.get_image_features(mixed.inputs["pixel_values"], mixed.inputs["image_grid_thw"]).pooler_output
    for segment, images in enumerate(((0, 1), (0, 1), (3,))):
        seen = torch.cat([features[image] for image in images])
        expected, _ = attend(model.model.dac, model.model.dac.queries[None], seen[None])
        torch.testing.assert_close(outputs.student_latents[segment], expected[0], atol=1e-4, rtol=1e-4)


def test_random_queries_are_fresh_gaussians(make_model, mixed):
    model = make_model(dac_queries="random")
    with torch.no_grad():
        torch.manual_seed(0)
        first = model(**mixed.inputs, latent_inputs="bcm").student_latents
        second = model(**mixed.inputs, latent_inputs="bcm").student_latents
        torch.manual_seed(0)
        queries = torch.randn(3, STEPS, first.shape[-1], device=first.device)
        features = model.get_image_features(mixed.inputs["pixel_values"], mixed.inputs["image_grid_thw"]).pooler_output
        expected, _ = attend(model.model.dac, queries[2:], features[3][None])
    torch.testing.assert_close(first[2:], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(first, second)


def test_without_bcm_the_teacher_looks_evenly_at_the_box_and_states_are_fed(make_model, stock, aligned):
    model = make_model(has_bcm=False)
    outputs = check(model, stock, aligned, "dac")
    looked = outputs.teacher_attention[0, 0]
    assert looked.unique().tolist() == [0.0, pytest.approx(1 / (looked > 0).sum().item())]
    check(model, stock, aligned, "hidden")


def test_without_dac_the_student_is_silent(make_model, mixed):
    outputs = make_model(has_dac=False)(**mixed.inputs, latent_inputs="bcm")
    assert outputs.student_latents is None and outputs.student_attention is None
    assert outputs.teacher_latents is not None


def test_without_boxes_dac_looks_at_all_images_of_the_row(model, stock, aligned):
    inputs = {key: value for key, value in aligned.inputs.items() if key != "boxes"}
    with torch.no_grad():
        outputs = model(**inputs, latent_inputs="hidden")
        boxed = model(**aligned.inputs, latent_inputs="hidden")
    assert outputs.teacher_latents is None and outputs.teacher_attention is None
    torch.testing.assert_close(outputs.logits, boxed.logits)
    images = torch.cat(Row(stock, inputs, 0).features)[None]
    latents, attention = attend(model.model.dac, outputs.latent_states[:1], images)
    torch.testing.assert_close(outputs.student_latents[:1], latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs.student_attention[:1], attention, atol=1e-5, rtol=1e-4)


def test_a_reflection_without_any_image_feeds_states_back(model, processor):
    messages = ask("Hello") + answer([0.1, 0.1, 0.9, 0.9], "Z")
    text = processor.apply_chat_template(messages, tokenize=False)
    inputs = processor(text=text, return_tensors="pt").to(devices.DEVICE)
    outputs = model(**inputs, latent_inputs="hidden")
    assert outputs.student_latents is None and outputs.latent_states.shape[:2] == (1, STEPS)
    prompt = encode(processor, ask("Hello"))
    options = {"max_new_tokens": 11, "return_dict_in_generate": True, "output_logits": True}
    generated = model.generate(**prompt, **options, reflect=True)
    torch.testing.assert_close(outputs.logits[0, -4], generated.logits[10][0], atol=1e-4, rtol=1e-4)


def test_images_after_a_segment_are_not_looked_at():
    ids = torch.tensor([[7, 7, 0, 7, 0, 0, 0, 0], [0, 0, 7, 7, 7, 0, 7, 0]])
    segments = (torch.tensor([0, 0, 1, 1]), torch.tensor([2, 5, 5, 7]))
    images = [2, 1, 3, 1]  # tokens of each
    assert images_before(ids, None, segments, images, 7) == [range(0, 1), range(0, 2), range(2, 3), range(2, 4)]
    # Packed: a sample begins anew within its row.
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])
    assert images_before(ids, positions, segments, images, 7) == [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]
    assert images_before(ids, None, (torch.tensor([1]), torch.tensor([1])), images, 7) == [range(2, 2)]


@pytest.mark.parametrize("latent_inputs", ["bcm", "dac", "hidden"])
def test_images_are_encoded_once(model, aligned, latent_inputs):
    calls = []
    hook = model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    try:
        model(**aligned.inputs, latent_inputs=latent_inputs)
    finally:
        hook.remove()
    assert len(calls) == 1


def test_encoded_images_can_be_handed_in(model, mixed):
    features = model.get_image_features(mixed.inputs["pixel_values"], mixed.inputs["image_grid_thw"], return_dict=True)
    inputs = {key: value for key, value in mixed.inputs.items() if key != "pixel_values"}
    outputs = model(**inputs, mm_encoder_outputs={"image": features}, latent_inputs="dac")
    torch.testing.assert_close(outputs.logits, model(**mixed.inputs, latent_inputs="dac").logits)


def test_roi_align_teacher_still_sums_to_one(make_model, mixed):
    outputs = make_model(region_pooling="roi_align")(**mixed.inputs, latent_inputs="bcm")
    torch.testing.assert_close(outputs.teacher_attention.sum(-1), torch.ones(3, STEPS, device=devices.DEVICE))
    assert (outputs.teacher_attention[1, :, 12:] == 0).all()  # the image of segment 1 has 12 patches


@pytest.mark.parametrize("pooling", ["patch", "roi_align"])
def test_bfloat16_keeps_attention_in_float32(make_model, mixed, aligned, pooling):
    model = make_model(region_pooling=pooling).to(torch.bfloat16)
    for batch, latent_inputs in ((mixed, "bcm"), (mixed, "dac"), (aligned, "hidden")):
        outputs = model(**batch.inputs, latent_inputs=latent_inputs)
        assert outputs.teacher_latents.dtype == outputs.student_latents.dtype == torch.bfloat16
        for attention in (outputs.teacher_attention, outputs.student_attention):
            assert attention.dtype == torch.float32
            torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]), atol=1e-5, rtol=0)


# Loss and gradients


def labels_of(batch):
    """Everything but padding."""
    return batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, -100)


def shifted_loss(logits, labels, reduction="mean"):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction=reduction)


def test_loss_is_the_mean_over_supervised_tokens(model, mixed):
    labels = labels_of(mixed)
    outputs = model(**mixed.inputs, labels=labels, latent_inputs="bcm")
    torch.testing.assert_close(outputs.loss, shifted_loss(outputs.logits, labels))
    outputs = model(**mixed.inputs, labels=labels, latent_inputs="bcm", num_items_in_batch=1000)
    torch.testing.assert_close(outputs.loss, shifted_loss(outputs.logits, labels, "sum") / 1000)


@pytest.mark.parametrize(
    ("latent_inputs", "batch"),
    [("bcm", "aligned"), ("dac", "aligned"), ("hidden", "aligned"), ("bcm", "paths"), ("dac", "paths")],
)
def test_gradients_equal_those_of_the_recomputation(model, stock, latent_inputs, batch, request):
    """Through every pass, every step that feeds back, and to each of BCM's queries from its step's own box."""
    batch = request.getfixturevalue(batch)
    name = "layers.1.mlp.down_proj.weight"
    ours, theirs = model.model.language_model.get_parameter(name), stock.model.language_model.get_parameter(name)
    modules = [model.model.bcm.queries, model.model.dac.norm.weight]
    logits = model(**batch.inputs, latent_inputs=latent_inputs).logits
    gradients = torch.autograd.grad(shifted_loss(logits, labels_of(batch)), [ours, *modules], allow_unused=True)

    rows, _ = expect(model, stock, batch, latent_inputs)
    expected_logits = torch.zeros_like(logits)
    for index, states in enumerate(rows):
        expected_logits[index, batch.inputs["attention_mask"][index].bool()] = states @ stock.lm_head.weight.T
    loss = shifted_loss(expected_logits, labels_of(batch))
    expected = torch.autograd.grad(loss, [theirs, *modules], allow_unused=True)

    received = {"bcm": [True, True, False], "dac": [True, False, True], "hidden": [True, False, False]}[latent_inputs]
    for gradient, other, receives in zip(gradients, expected, received):
        assert (gradient is not None) == (other is not None) == receives
        if receives:
            assert other.abs().max() > 1e-5
            torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("receives", [True, False])
def test_cross_entropy_trains_bcm_only_if_asked(model, mixed, receives):
    inputs = {**mixed.inputs, "labels": labels_of(mixed), "latent_inputs": "bcm", "bcm_receives_ce": receives}
    outputs = model(**inputs)
    parameters = dict(model.model.bcm.named_parameters())
    gradients = torch.autograd.grad(outputs.loss, parameters.values(), allow_unused=True, retain_graph=True)
    for name, gradient in zip(parameters, gradients):
        if name == "k_proj.bias":  # shifts all scores of a query alike
            continue
        assert bool(gradient is not None and gradient.abs().max() > 0) == receives, name
    # The alignment loss reaches BCM either way.
    assert torch.autograd.grad(outputs.teacher_latents.sum(), parameters["norm.bias"])[0].abs().max() > 0


@pytest.mark.parametrize("latent_inputs", ["bcm", "dac", "hidden"])
def test_latent_states_carry_gradients(model, aligned, latent_inputs):
    states = model(**aligned.inputs, latent_inputs=latent_inputs).latent_states
    weight = model.model.language_model.layers[0].mlp.down_proj.weight
    assert torch.autograd.grad(states.square().mean(), weight)[0].abs().max() > 0


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@pytest.mark.parametrize("latent_inputs", ["bcm", "dac"])
def test_gradient_checkpointing_changes_nothing(make_model, mixed, latent_inputs):
    model = make_model().train()
    weight = model.model.language_model.layers[0].mlp.down_proj.weight

    def gradient():
        loss = model(**mixed.inputs, labels=labels_of(mixed), latent_inputs=latent_inputs).loss
        return torch.autograd.grad(loss, weight)[0]

    plain = gradient()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradient(), plain)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_known_by_both_of_its_names(model, processor, name):
    ids = encode(processor, ask("What is on the red square?"))["input_ids"]
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    whole = model(input_ids=ids, position_ids=positions).logits
    cache, parts = DynamicCache(config=model.config.get_text_config()), []
    for columns in (slice(0, 5), slice(5, None)):
        chunk = {"input_ids": ids[:, columns], "position_ids": positions[:, columns]}
        parts.append(model(**chunk, **{name: cache}).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=5e-5, rtol=0)
    with pytest.raises(ValueError, match="pass one of them"):
        model(input_ids=ids, cache=cache, past_key_values=cache)


def test_the_output_can_be_a_tuple(model, mixed):
    outputs = model(**mixed.inputs, latent_inputs="bcm", return_dict=False)
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(outputs[0], model(**mixed.inputs, latent_inputs="bcm").logits)


def test_some_logits_can_be_kept(model, mixed):
    whole = model(**mixed.inputs, latent_inputs="bcm").logits
    kept = model(**mixed.inputs, latent_inputs="bcm", logits_to_keep=2).logits
    torch.testing.assert_close(kept, whole[:, -2:])


def test_a_forward_pass_after_generate_starts_anew(model, processor, mixed):
    fresh = model(**mixed.inputs, latent_inputs="bcm").logits
    model.generate(**encode(processor, ask("What?", picture(1))), max_new_tokens=12, reflect=True)
    torch.testing.assert_close(model(**mixed.inputs, latent_inputs="bcm").logits, fresh)


# What is refused


def test_slots_that_nothing_fills_are_refused(model, mixed):
    with pytest.raises(ValueError, match="pass `latent_inputs`, one of bcm, dac, hidden"):
        model(**mixed.inputs)


def test_unknown_latent_inputs_are_refused(model, mixed):
    with pytest.raises(ValueError, match="one of bcm, dac, hidden, got 'teacher'"):
        model(**mixed.inputs, latent_inputs="teacher")


def test_what_a_reflecting_pass_would_ignore_is_refused(model, processor, mixed):
    plain = encode(processor, ask("What?", picture(1)) + answer("Z"))
    with pytest.raises(ValueError, match="1 boxes, and nothing that uses them"):
        model(**plain, boxes=mixed.inputs["boxes"][:1])
    with pytest.raises(ValueError, match="no cache"):
        model(**mixed.inputs, latent_inputs="bcm", cache=DynamicCache(config=model.config.get_text_config()))
    with pytest.raises(ValueError, match="pass `images`, not `videos`"):
        model(**mixed.inputs, latent_inputs="bcm", pixel_values_videos=torch.zeros(4, 4))
    embeds = model.get_input_embeddings()(mixed.inputs["input_ids"])
    with pytest.raises(ValueError, match="no `inputs_embeds`"):
        model(**mixed.inputs, latent_inputs="bcm", inputs_embeds=embeds)


@pytest.mark.parametrize("count", [2, 4])
def test_another_number_of_boxes_is_refused(model, mixed, count):
    boxes = boxes_by_step(mixed.inputs["boxes"], STEPS).repeat(2, 1, 1)[:count]
    with pytest.raises(ValueError, match=f"{count} boxes for 3 reflection segments"):
        model(**{**mixed.inputs, "boxes": boxes}, latent_inputs="bcm")


def test_boxes_without_segments_are_refused(model, processor, mixed):
    inputs = encode(processor, ask("What?", picture(1)) + answer("Z"))
    with pytest.raises(ValueError, match="1 boxes, but no reflection segment"):
        model(**inputs, boxes=mixed.inputs["boxes"][:1], latent_inputs="bcm")


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0, 0, 9, 9, 4], "Box 1 lies in image 4.*0 to 1"),
        ([0, 0, 9, 9, 2], "Box 1 lies in image 2.*0 to 1"),  # of another row
        ([0, 0, 9, 9, -1], "Box 1 lies in image -1"),
        ([9, 0, 8, 9, 0], "Box 1 must be"),
        ([0, 9, 9, 8, 0], "Box 1 must be"),
        ([0, 0, 65537, 9, 0], "Box 1 must be"),
        ([-1, 0, 9, 9, 0], "Box 1 must be"),
    ],
)
def test_impossible_boxes_are_refused(model, mixed, box, message):
    boxes = boxes_by_step(mixed.inputs["boxes"], STEPS).clone()
    boxes[1, 5] = torch.tensor(box)
    with pytest.raises(ValueError, match=message):
        model(**{**mixed.inputs, "boxes": boxes}, latent_inputs="bcm")


def test_boxes_of_another_shape_are_refused(model, mixed):
    boxes = boxes_by_step(mixed.inputs["boxes"], STEPS)
    for wrong in (boxes[:, :7], boxes[..., :4], boxes[None]):
        with pytest.raises(ValueError, match=r"`boxes` must be \(segments, 8, 5\)"):
            model(**{**mixed.inputs, "boxes": wrong}, latent_inputs="bcm")
    with pytest.raises(ValueError, match="`boxes` must be integers.*1/65,536.*got torch.float32; the processor"):
        model(**{**mixed.inputs, "boxes": boxes / 65_536}, latent_inputs="bcm")


def test_modes_name_the_module_or_input_that_they_miss(model, make_model, mixed):
    inputs = {key: value for key, value in mixed.inputs.items() if key != "boxes"}
    with pytest.raises(ValueError, match="'bcm'` needs boxes"):
        model(**inputs, latent_inputs="bcm")
    with pytest.raises(ValueError, match="'dac'` needs boxes"):
        model(**inputs, latent_inputs="dac")
    with pytest.raises(ValueError, match="'bcm'` needs a model with BCM"):
        make_model(has_bcm=False)(**mixed.inputs, latent_inputs="bcm")
    with pytest.raises(ValueError, match="'dac'` needs a model with DAC"):
        make_model(has_dac=False)(**mixed.inputs, latent_inputs="dac")


@pytest.mark.parametrize("length", [7, 9])
def test_segments_of_another_length_are_refused(model, mixed, ids, length):
    input_ids = mixed.inputs["input_ids"].clone()
    _, slot, end = ids
    last = (input_ids[3] == slot).nonzero().max()
    if length < 8:
        input_ids[3, last] = end
    else:
        input_ids[3, last + 1] = slot
    with pytest.raises(ValueError, match=rf"segments \[2\] in rows \[3\] have \[{length}\] slots"):
        model(**{**mixed.inputs, "input_ids": input_ids}, latent_inputs="bcm")


def test_a_segment_without_its_start_token_is_refused(model, mixed, ids):
    input_ids = mixed.inputs["input_ids"].clone()
    start, _, end = ids
    input_ids[3, (input_ids[3] == start).nonzero()] = end
    with pytest.raises(ValueError, match=r"segments \[2\] in rows \[3\] have .* no start token"):
        model(**{**mixed.inputs, "input_ids": input_ids}, latent_inputs="bcm")


def test_a_segment_that_begins_its_row_is_refused(model, ids):
    _, slot, end = ids
    with pytest.raises(ValueError, match="start token"):
        model(input_ids=torch.tensor([[slot] * 8 + [end]], device=devices.DEVICE), latent_inputs="hidden")


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_feeding_back_refuses_what_a_cache_cannot_do(model, make_model, processor, mixed, aligned):
    with pytest.raises(ValueError, match="one segment a row"):
        model(**mixed.inputs, latent_inputs="hidden")
    samples = [sample("What?", [picture(1)], BOXES[0], "A"), sample("What?", [picture(1)], BOXES[0], "A A A")]
    with pytest.raises(ValueError, match="one column.*left"):
        model(**batch_of(processor, samples).inputs, latent_inputs="hidden")
    packed = torch.arange(aligned.inputs["input_ids"].shape[1], device=devices.DEVICE).expand(
        4, len(aligned.inputs["input_ids"]), -1
    )
    with pytest.raises(ValueError, match="turn `sample_packing` off"):
        model(**aligned.inputs, position_ids=packed, latent_inputs="hidden")
    checkpointed = make_model().train()
    checkpointed.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing=False"):
        checkpointed(**aligned.inputs, latent_inputs="hidden")
    checkpointed.eval()
    checkpointed(**aligned.inputs, latent_inputs="hidden")


def test_gradients_reach_the_pixels_of_a_frozen_vision_encoder(model, mixed):
    pixels = mixed.inputs["pixel_values"].clone().requires_grad_(True)
    frozen = model.model.visual.requires_grad_(False)
    try:
        model(**{**mixed.inputs, "pixel_values": pixels}, latent_inputs="bcm").logits.sum().backward()
    finally:
        frozen.requires_grad_(True)
    assert pixels.grad.abs().sum() > 0


def test_hidden_states_are_those_of_all_steps(model, aligned):
    """Where states are fed back step by step, as where Z_T fills the slots in one pass."""
    one_pass, steps = (
        model(**aligned.inputs, latent_inputs=filled, output_hidden_states=True) for filled in ("bcm", "hidden")
    )
    assert [layer.shape for layer in steps.hidden_states] == [layer.shape for layer in one_pass.hidden_states]
    first_slot = int((aligned.inputs["input_ids"] == model.config.latent_token_id).nonzero()[:, 1].min())
    for layer, expected in zip(steps.hidden_states, one_pass.hidden_states):
        torch.testing.assert_close(layer[:, :first_slot], expected[:, :first_slot], atol=1e-4, rtol=1e-4)
    logits = model.lm_head(steps.hidden_states[-1])
    torch.testing.assert_close(logits, steps.logits, atol=1e-5, rtol=1e-5)
