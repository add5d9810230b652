"""A clip's frames as pictures of a row: what the second frame alone tells, and a path that goes from frame to frame."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_random_model, save_strong_backbone

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.evaluation.matching import Match
from vreflection_hub_card.evaluation.own_rows import read_own_rows
from vreflection_hub_card.glyphsearch import make_scene, questions
from vreflection_hub_card.inference.attention_maps import generate_and_look
from vreflection_hub_card.inference.encoding import encode_prompts, user_turn
from vreflection_hub_card.rows import BadRow
from vreflection_training import VReflectionDataCollator, VReflectionSFTConfig, VReflectionSFTTrainer
from vreflection_training.data.sources import load_rows


PATCHES = 36  # of a frame: 6 x 6 of 28 pixels
FRAMES = [make_scene(seed) for seed in (3, 4)]


# A shape that the first frame doesn't show, and the shapes of a path: one here, one there, and back.
(SECOND, *_) = [
    question
    for question in questions(FRAMES[1])
    if question.hops == 0 and question.target.name not in {item.name for item in FRAMES[0].objects}
]
PATH = [FRAMES[0].objects[0], FRAMES[1].objects[1], FRAMES[0].objects[2]]


def columns_of(item, frame):
    """Where the patches that a shape lies on stand among those of both frames."""
    x0, y0, x1, y1 = item.pixel_box
    rows, columns = range(y0 // 28, (y1 - 1) // 28 + 1), range(x0 // 28, (x1 - 1) // 28 + 1)
    return [frame * PATCHES + row * 6 + column for row in rows for column in columns]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def own(request, tmp_path_factory):
    """A backbone's model and processor, and two rows from a file, with their frames as files beside it."""
    folder = save_strong_backbone(tmp_path_factory.mktemp(request.param), request.param)
    model = make_random_model(folder, "cpu", patch_positions="sincos").eval()
    processor = VReflectionForConditionalGeneration.from_backbone(folder)[1]
    looks = {
        "second": ({"box": list(SECOND.target.box), "image_index": 1}, SECOND.text, SECOND.answer),
        "path": (
            {"boxes": [list(item.box) for item in PATH], "image_index": [0, 1, 0]},
            "Which glyph is on the red cross?",
            PATH[-1].glyph,
        ),
    }
    rows = []
    for row_id, (where, question, answer) in looks.items():
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": question}]
        said = [{"type": "reflection", **where}, {"type": "text", "text": answer}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": said}]
        rows.append({"id": row_id, "images": ["frame1.png", "frame2.png"], "messages": messages})
    (folder / "rows.json").write_text(json.dumps(rows))
    for number, scene in enumerate(FRAMES, 1):
        scene.image.save(folder / f"frame{number}.png")
    rows = load_rows([{"path": str(folder / "rows.json")}])
    return SimpleNamespace(model=model, processor=processor, rows=rows)


def collated(own, frames=FRAMES):
    batch = VReflectionDataCollator(own.processor, own.model.config)(
        [{**row, "images": [scene.image for scene in frames]} for row in own.rows]
    )
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw", "boxes")
    return {key: batch[key] for key in names}


def test_each_step_has_the_patches_of_its_frame(own):
    batch = VReflectionDataCollator(own.processor, own.model.config)(list(own.rows))
    assert batch["boxes"][..., 4].tolist() == [[1] * 8, [2, 3, *[2] * 6]]
    for key, value in collated(own).items():
        assert torch.equal(value, batch[key]), key  # as it comes from the files
    with torch.no_grad():
        seen = own.model(**collated(own), latent_inputs="bcm")
    path = [columns_of(item, frame) for item, frame in zip(PATH, (0, 1, 0))]
    for segment, steps in enumerate([[columns_of(SECOND.target, 1)] * 8, path + path[-1:] * 5]):
        for step, columns in enumerate(steps):
            assert seen.inside_box[segment, step].nonzero().flatten().tolist() == columns
            attention = seen.teacher_attention[segment, step]
            assert attention.nonzero().flatten().tolist() == columns
            assert attention.sum().item() == pytest.approx(1)
    # DAC isn't told the frame: it looks at both.
    assert seen.student_attention.shape == (2, 8, 2 * PATCHES) and (seen.student_attention > 0).all()


@pytest.mark.parametrize("other, changed", [(0, [[], [0, *range(2, 8)]]), (1, [range(8), [1]])])
def test_the_teacher_sees_only_the_frame_of_its_step(own, other, changed):
    frames = [make_scene(9) if number == other else scene for number, scene in enumerate(FRAMES)]
    with torch.no_grad():
        before, after = (own.model(**collated(own, of), latent_inputs="bcm") for of in (FRAMES, frames))
    moved = (before.teacher_latents - after.teacher_latents).abs().amax(2) > 1e-4
    assert [segment.nonzero().flatten().tolist() for segment in moved] == [list(steps) for steps in changed]
    assert (before.student_latents - after.student_latents).abs().amax(2).min() > 1e-4


@pytest.mark.parametrize("sample_packing", [False, True])
def test_a_step_of_training_on_frames(own, tmp_path, sample_packing):
    args = VReflectionSFTConfig(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=1 if sample_packing else 2,
        sample_packing=sample_packing,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to="none",
    )
    model = copy.deepcopy(own.model)
    trainer = VReflectionSFTTrainer(model, args, processing_class=own.processor, train_dataset=own.rows)
    trainer.train()
    log = trainer.state.log_history[0]
    assert all(math.isfinite(log[name]) and log[name] > 0 for name in ("loss_ce", "loss_feat", "loss_attn"))
    # Against the attention that a pass shows: the frames' patches are the losses', too.
    with torch.no_grad():
        seen = own.model(**collated(own), latent_inputs="bcm")
    target = seen.inside_box / seen.inside_box.sum(2, keepdim=True)
    expected = (target * ((target + 1e-9) / (seen.student_attention + 1e-9)).log()).sum((1, 2)).mean()
    assert log["loss_attn"] == pytest.approx(expected.item(), rel=1e-4)


def test_decoding_looks_at_both_frames_and_names_the_one_it_looked_at(own):
    options = {"reflect": True, "latent_feedback": "dac", "max_new_tokens": 12}
    prompt = encode_prompts(own.processor, user_turn([scene.image for scene in FRAMES], SECOND.text), "cpu")
    result = own.model.generate(**prompt, **options, do_sample=False, return_dict_in_generate=True)
    assert result.latent_attention.shape == (1, 8, 2 * PATCHES)
    _, _, ((reflection, *_),) = generate_and_look(own.model, prompt, ("dac",), **options)
    maps = torch.cat([frame.flatten(1) for frame in reflection.maps["dac"]], 1)
    torch.testing.assert_close(maps, result.latent_attention[0], atol=1e-5, rtol=1e-4)
    for look in reflection.looks:
        steps = [step - 1 for step in look.steps]
        of_frames = result.latent_attention[0, steps].view(-1, 2, PATCHES).sum(2).mean(0)
        assert look.image_index == of_frames.argmax()
    for other in range(2):
        frames = [make_scene(9) if number == other else scene for number, scene in enumerate(FRAMES)]
        prompt = encode_prompts(own.processor, user_turn([scene.image for scene in frames], SECOND.text), "cpu")
        another = own.model.generate(**prompt, **options, do_sample=False, return_dict_in_generate=True)
        assert (another.latents - result.latents).abs().amax(2).min() > 1e-4


@pytest.mark.parametrize("video", ["videos", "video", "part"])
def test_rows_with_a_native_video_are_refused(own, tmp_path, video):
    content = [{"type": "text", "text": "Which glyph?"}]
    if video == "part":
        content.insert(0, {"type": "video", "video": "clip.mp4"})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "K"}]
    row = {"id": "clip", "messages": messages}
    if video != "part":
        row[video] = ["clip.mp4"] if video == "videos" else "clip.mp4"
    problem = (
        "clip: .*'text' or 'image', not 'video'" if video == "part" else f"clip: `{video}`: V-Reflection looks at"
    )
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    for given in (row, load_rows([{"path": str(tmp_path / "rows.json")}])[0]):
        with pytest.raises(BadRow, match=problem):
            VReflectionDataCollator(own.processor, own.model.config)([given])
        with pytest.raises(BadRow, match=problem):
            read_own_rows([given], Match("exact"))
