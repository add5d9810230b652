"""Stage path against a computation in plain torch, row by row, that shares no code with ours but the backbone's layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from run_helpers import Rows, gradients, moved
from transformers import AutoModelForImageTextToText

from vreflection_hub_card.glyphsearch import make_scene
from vreflection_training import VReflectionDataCollator


# Corners on no edge of a patch, and exact in 1/65,536.
A, B, C = [0.125, 0.25, 0.375, 0.5], [0.5, 0.0, 1.0, 0.625], [0.40625, 0.71875, 0.4375, 0.75]
FORMS = {
    "one pass": {},
    "two passes": {"latent_inputs": "dac"},
    "CE stops at the slots": {"bcm_receives_ce": False},
    "the paper's target": {"attention_target": "teacher", "lambda_attn": 0.7},
    "other weights": {"lambda_dac": 0.5, "lambda_feat": 3.0, "lambda_attn": 0.2, "latent_loss": "mse"},
}


def row(name, images, *parts):
    """A row of a question about pictures; its answer is made of texts and reflections (boxes, image_index)."""
    asked = [{"type": "image"}] * len(images) + [{"type": "text", "text": "Which glyph is on the red cross?"}]
    said = []
    for part in parts:
        boxes, index = (None, None) if isinstance(part, str) else part
        path = {"box": boxes} if boxes and isinstance(boxes[0], float) else {"boxes": boxes}
        said.append(
            {"type": "text", "text": part} if boxes is None else {"type": "reflection", **path, "image_index": index}
        )
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"id": name, "images": images, "messages": messages}


def rows():
    """A path over two pictures of two sizes, a single box, two reflections in one answer, and a row without any."""
    pictures = [make_scene(seed).image for seed in range(4)]
    wide = pictures[1].crop((0, 0, 168, 112))
    plain = {"id": "text", "images": [], "messages": [{"role": "user", "content": "Hello"}]}
    plain["messages"].append({"role": "assistant", "content": "Which glyph"})
    return [
        row("two pictures", [pictures[0], wide], ([A, B, C], [0, 1, 0]), "B"),
        row("one box", [pictures[2]], (C, 0), "X"),
        plain,
        row("two reflections", [pictures[3]], ([B, A], 0), "Q", (A, 0), "red"),
    ]


def attend(module, queries, features):
    """Eq. 1 and 3 for queries (S, D) over features (N, D): latents (S, D) and head-averaged attention (S, N)."""
    heads = module.num_heads
    q, k, v = (
        F.linear(x, layer.weight, layer.bias).unflatten(1, (heads, -1))
        for x, layer in ((queries, module.q_proj), (features, module.k_proj), (features, module.v_proj))
    )
    weights = (torch.einsum("shd,nhd->hsn", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    mixed = torch.einsum("hsn,nhd->shd", weights, v).flatten(1)
    out = F.linear(mixed, module.o_proj.weight, module.o_proj.bias)
    return F.layer_norm(out, out.shape[1:], module.norm.weight, module.norm.bias, 1e-6), weights.mean(0)


def patches_inside(box, height, width):
    """Indices of the merged patches whose interior meets the box's."""
    x0, y0, x1, y1 = box
    return [
        y * width + x
        for y in range(height)
        for x in range(width)
        if x / width < x1 and (x + 1) / width > x0 and y / height < y1 and (y + 1) / height > y0
    ]


def paths(sample):
    """For each reflection the box and the picture of each of the 8 steps."""
    for part in sample["messages"][-1]["content"]:
        if isinstance(part, dict) and part["type"] == "reflection":
            boxes = part["boxes"] if "boxes" in part else [part["box"]]
            images = (
                part["image_index"] if isinstance(part["image_index"], list) else [part["image_index"]] * len(boxes)
            )
            yield [(boxes[min(step, len(boxes) - 1)], images[min(step, len(boxes) - 1)]) for step in range(8)]


def expected_loss(model, processor, args, samples):
    """The loss of stage path over rows, and its terms."""
    nll, tokens, feats, attns = 0.0, 0, [], []
    backbone, config = model.model, model.config
    for sample in samples:
        batch = VReflectionDataCollator(processor, config)([sample])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        features, grids, deepstack = [], [], {}
        if "pixel_values" in batch:
            with torch.no_grad():
                encoded = backbone.get_image_features(batch["pixel_values"], batch["image_grid_thw"], return_dict=True)
            features = list(encoded.pooler_output)
            if hasattr(encoded, "deepstack_features"):  # what Qwen3-VL adds to the first layers' states
                levels = [torch.cat(level) for level in encoded.deepstack_features]
                seen = (ids == config.image_token_id)[None]
                deepstack = {"visual_pos_masks": seen, "deepstack_visual_embeds": levels}
            grids = [(height // 2, width // 2) for _, height, width in batch["image_grid_thw"].tolist()]
        embeds = backbone.get_input_embeddings().weight[ids]
        if features:
            embeds = embeds.index_put(((ids == config.image_token_id).nonzero()[:, 0],), torch.cat(features))
        types = (ids == config.image_token_id).int()[None]
        positions, _ = backbone.get_rope_index(ids[None], types, image_grid_thw=batch.get("image_grid_thw"))

        def run(embeds, positions=positions, deepstack=deepstack):
            language_model = backbone.language_model
            states = language_model(inputs_embeds=embeds[None], position_ids=positions, use_cache=False, **deepstack)
            return states[0][0]

        slots = (ids == config.latent_token_id).nonzero()[:, 0]
        teacher, targets = [], []
        starts = [sum(h * w for h, w in grids[:index]) for index in range(len(grids) + 1)]
        for path in paths(sample):
            for step, (box, image) in enumerate(path):
                inside = torch.tensor(patches_inside(box, *grids[image]))
                latent, attention = attend(
                    backbone.bcm, backbone.bcm.queries[step : step + 1], features[image][inside]
                )
                target = torch.zeros(starts[-1])
                uniform = torch.full_like(attention[0], 1 / len(inside))
                target[inside + starts[image]] = uniform if args.attention_target == "box" else attention[0].detach()
                teacher.append(latent[0])
                targets.append(target)
        if not teacher:
            states = run(embeds)
        else:
            teacher = torch.stack(teacher)
            fed = teacher if args.latent_inputs == "bcm" and args.bcm_receives_ce else teacher.detach()
            states = run(embeds.index_put((slots,), fed))
            student, attention = attend(backbone.dac, states[slots - 1], torch.cat(features))
            difference = student - teacher.detach()
            per_step = difference.abs().mean(1) if args.latent_loss == "l1" else difference.square().mean(1)
            feats += per_step.view(-1, 8).mean(1)
            targets, epsilon = torch.stack(targets), 1e-9
            attns += (targets * ((targets + epsilon) / (attention + epsilon)).log()).sum(1).view(-1, 8).sum(1)
            if args.latent_inputs == "dac":
                states = run(embeds.index_put((slots,), student))
        learned = labels[1:] != -100
        logits = model.lm_head(states[:-1][learned])
        nll = nll + F.cross_entropy(logits, labels[1:][learned], reduction="sum")
        tokens += int(learned.sum())
    terms = nll / tokens, sum(feats) / len(feats), sum(attns) / len(attns)
    weights = 1.0, args.lambda_dac * args.lambda_feat, args.lambda_dac * args.lambda_attn
    return sum(weight * term for weight, term in zip(weights, terms)), terms


@pytest.fixture
def model(checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32, patch_positions="none")
    with torch.no_grad():
        model.model.bcm.norm.bias.fill_(0.01)
    return model


WAYS = {
    "one batch": {},
    "packed": {"sample_packing": True, "per_device_train_batch_size": 1},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "gradient checkpointing": {"gradient_checkpointing": True},
}
SGD = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "weight_decay": 0.0, "per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    "checkpoint, form, way",
    [("qwen2_5_vl", form, "one batch") for form in FORMS]
    + [("qwen2_5_vl", form, way) for form in list(FORMS)[:2] for way in list(WAYS)[1:]]
    + [("qwen3_vl", form, way) for form, way in zip(("one pass", "two passes", "two passes", "one pass"), WAYS)],
    indirect=["checkpoint"],
)
def test_losses_and_gradients_against_plain_torch(make_trainer, model, processor, form, way):
    reference = copy.deepcopy(model)
    trainer = make_trainer(Rows(rows()), stage="path", **{**SGD, **FORMS[form], **WAYS[way]})
    got = gradients(trainer)
    reference.model.visual.requires_grad_(False)
    loss, terms = expected_loss(reference, processor, trainer.args, rows())
    loss.backward()
    log = trainer.state.log_history[0]
    for name, term in zip(("loss", "loss_ce", "loss_feat", "loss_attn"), (loss, *terms)):
        assert log[name] == pytest.approx(term.item(), rel=1e-6), name
    expected = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in reference.named_parameters()
    }
    difference = sum((got[name] - value).square().sum() for name, value in expected.items()).sqrt()
    assert difference < 2e-6 * sum(value.square().sum() for value in expected.values()).sqrt()
    for name, value in expected.items():
        # Float32 rounds by the size of a weight, which the gradient was taken from, and of the largest gradients.
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=2e-6 * scale, msg=name)
    frozen = form in ("two passes", "CE stops at the slots")
    assert any(got[name].any() for name in got if ".bcm." in name) != frozen


def test_the_last_steps_alone_hold_what_dac_sees(make_trainer, model):
    """Half of the steps: the second of two is that of a whole run in two passes from the same weights."""
    data = Rows(rows()[:2] * 2)
    options = {"stage": "path", **SGD, "per_device_train_batch_size": 2, "learning_rate": 0.1}
    other = copy.deepcopy(model)
    first = make_trainer(data, **{**options, "max_steps": 1})
    half = make_trainer(data, trained=other, **{**options, "max_steps": 2}, latent_inputs="dac", dac_inputs_share=0.5)
    first.train()
    half.train()
    before = copy.deepcopy(model.state_dict())
    second = make_trainer(data, **{**options, "max_steps": 1}, latent_inputs="dac")
    second.train()
    logs = [trainer.state.log_history for trainer in (half, first, second)]
    assert [logs[0][step]["loss"] for step in (0, 1)] == [logs[1][0]["loss"], logs[2][0]["loss"]]
    assert not moved(half.model.state_dict(), second.model.state_dict())
    assert not [name for name in moved(before, second.model.state_dict()) if ".bcm." in name]


@pytest.mark.parametrize("options", [{"latent_inputs": "dac"}, {"bcm_receives_ce": False}])
def test_a_bcm_that_no_gradient_reaches_has_to_be_trained(make_trainer, model, options):
    with torch.no_grad():
        model.model.bcm.norm.bias.zero_()
    with pytest.raises(ValueError, match="never trained: start from a stage path checkpoint, or set"):
        make_trainer(stage="path", **options)
    make_trainer(stage="path", **options, allow_untrained_bcm=True)
    make_trainer(stage="path", latent_inputs="dac", dac_inputs_share=0.5)


def test_more_boxes_than_steps_end_the_run(make_trainer):
    data = Rows([row("long", [make_scene(0).image], ([A] * 9, 0), "B")])
    with pytest.raises(ValueError, match="9.*8|8.*9"):
        make_trainer(data, stage="path", max_steps=1).train()
