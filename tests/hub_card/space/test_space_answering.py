"""What the page runs, without gradio: the answers as a stream, frames, refusals, the GPU's decorator."""

import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vreflection_hub_card.errors import InputError
from vreflection_hub_card.glyphsearch import draw_chain, draw_question, make_scene
from vreflection_hub_card.glyphsearch.likeness import NOTE
from vreflection_hub_card.inference.checkpoints import load_checkpoint
from vreflection_hub_card.inference.drawing import VEIL
from vreflection_hub_card.inference.encoding import encode_prompts, user_turn
from vreflection_hub_card.inference.look import look
from vreflection_hub_card.space import answering, zero_gpu
from vreflection_hub_card.space.answering import answer_each_way
from vreflection_hub_card.space.overlay import SIDE, draw_frames
from vreflection_hub_card.space.texts import NO_REFLECTION, caption_of
from vreflection_hub_card.space.uploaded_picture import MAX_BYTES, open_upload


@pytest.mark.parametrize("steps, feedback", [(8, "hidden"), (3, "hidden"), (12, "dac")])
def test_both_answers_and_the_maps_are_those_of_separate_runs(embedded, steps, feedback):
    scene, asked = draw_question("test", 3)
    told = list(answer_each_way(*embedded, scene.image, asked.text, steps, feedback))
    options = {"latent_feedback": feedback, "max_new_tokens": answering.MAX_NEW_TOKENS}
    seen = look(*embedded, user_turn([scene.image], asked.text), ("dac",), latent_steps=steps, **options)
    plain = look(*embedded, user_turn([scene.image], asked.text), (), latent_steps=0, max_new_tokens=512)
    assert told[-1].answer == seen.answer and told[-1].plain == plain.answer
    assert seen.answer != plain.answer
    assert len(told[-1].maps) == len(seen.reflections) == 1
    assert told[-1].maps[0].shape[0] == steps
    assert type(told[-1].maps[0]) is np.ndarray  # ZeroGPU hands it from one process to another
    assert np.array_equal(told[-1].maps[0], seen.reflections[0].maps["dac"][0])


def test_text_grows_and_the_maps_come_before_the_plain_answer(tiny):
    picture, asked = draw_question("test", 5)
    told = list(answer_each_way(*tiny, picture.image, asked.text, 4, "hidden", always_reflect=True))
    texts = [progress.answer for progress in told if progress.maps is None]
    assert len(texts) > 5 and all(after.startswith(before) for before, after in zip(texts, texts[1:]))
    first = next(progress for progress in told if progress.maps is not None)
    assert first.plain is None and first.maps[0].shape[0] == 4
    plain = [progress.plain for progress in told if progress.plain is not None]
    assert len(plain) > 5
    assert "<|" not in told[-1].answer + told[-1].plain


def test_without_dac_the_language_models_attention_is_shown(no_dac_folder):
    model, processor = load_checkpoint(no_dac_folder, "cpu")
    scene, asked = draw_question("test", 5)
    stream = answer_each_way(model, processor, scene.image, asked.text, 2, "hidden", always_reflect=True)
    maps = next(progress.maps for progress in stream if progress.maps is not None)
    options = {"latent_steps": 2, "reflect": True, "max_new_tokens": answering.MAX_NEW_TOKENS}
    seen = look(model, processor, user_turn([scene.image], asked.text), ("llm",), **options)
    assert np.allclose(maps[0], seen.reflections[0].maps["llm"][0], atol=1e-6)


def test_who_leaves_ends_the_decoding(tiny):
    model, processor = tiny
    scene, asked = draw_question("test", 5)
    threads, calls = threading.active_count(), []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    stream = answer_each_way(model, processor, scene.image, asked.text, 4, "hidden")
    next(stream)
    stream.close()
    handle.remove()
    assert len(calls) < 100  # of 512
    assert threading.active_count() == threads


def test_an_error_of_the_run_arrives(no_dac_folder):
    scene, asked = draw_question("test", 5)
    with pytest.raises(ValueError, match="needs a checkpoint with DAC"):
        list(answer_each_way(*load_checkpoint(no_dac_folder, "cpu"), scene.image, asked.text, 4, "dac"))


def test_zeroed_latents_break_the_answer_and_equal_generate(embedded):
    model, processor = embedded
    scene, asked = draw_chain("test", 3)
    told = list(answer_each_way(model, processor, scene.image, asked.text, 8, "dac", zeroed=True))
    assert told[-1].answer == asked.answer != told[-1].zeroed
    inputs = encode_prompts(processor, user_turn([scene.image], asked.text), "cpu")
    zeros = torch.zeros(1, 8, model.config.get_text_config().hidden_size)
    tokens = model.generate(**inputs, latents=zeros, latent_feedback="dac", max_new_tokens=64, do_sample=False)
    expected = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert told[-1].zeroed == expected
    texts = [(progress.maps is not None, progress.zeroed is not None, progress.plain is not None) for progress in told]
    assert texts == sorted(texts)  # the answer, its maps, the zeroed answer, the plain one


@pytest.mark.parametrize("size", [(168, 168), (2000, 1000), (300, 900)])
def test_frames_are_the_veiled_picture_clear_where_it_looked(size):
    maps = np.zeros((2, 4, 6), dtype=np.float32)
    maps[0, 1, 4], maps[1, 3, 0] = 0.5, 0.25
    frames = draw_frames(Image.new("RGB", size, "white"), [maps])
    assert [frame.name for frame in frames] == ["All looks", "Step 1 of 2", "Step 2 of 2"]
    assert [look.steps for looks in frames[0].looks for look in looks] == [(1,), (2,)]
    for frame, (row, column), share in zip(frames[1:], [(1, 4), (3, 0)], [1.0, 0.5]):
        assert frame.most == 0.5 and max(frame.image.size) == SIDE
        assert frame.image.width / frame.image.height == pytest.approx(size[0] / size[1], rel=0.01)
        x, y = (column + 0.5) / 6 * frame.image.width, (row + 0.5) / 4 * frame.image.height
        red, _, _, opacity = VEIL(share)
        expected = (1 - opacity) * 255 + opacity * red * 255
        assert np.abs(np.array(frame.image.getpixel((int(x), int(y)))) - expected).max() < 12
        red, _, _, opacity = VEIL(0.0)
        far = frame.image.getpixel((int(frame.image.width * 0.45), 2))
        assert np.abs(np.array(far) - ((1 - opacity) * 255 + opacity * red * 255)).max() < 8


def test_several_reflections_are_numbered_and_none_is_explained():
    frames = draw_frames(Image.new("RGB", (50, 50)), [np.full((2, 2, 2), 0.25, np.float32)] * 2)
    assert [frame.name for frame in frames][3] == "Reflection 2, step 1 of 2"
    assert "Reflection 2" in caption_of(frames[3]) and "25 %" in caption_of(frames[3])
    assert "reflection 2, steps 1 to 2: 50% in the box, 50% elsewhere" in caption_of(frames[0])
    assert draw_frames(Image.new("RGB", (50, 50)), []) == []
    assert NO_REFLECTION in caption_of(None)


def test_the_scale_names_small_shares_and_shows_the_picture_under_its_veil():
    frame = draw_frames(Image.new("RGB", (50, 50), (90, 120, 200)), [np.full((1, 40, 50), 1 / 2000, np.float32)])[1]
    assert "0.05 % on one patch" in caption_of(frame)
    assert frame.image.getpixel((9, 9)) == (90, 120, 200)  # uniform attention is as clear as the scale's end
    assert "#5a78c8 0% 100%" in caption_of(frame)


@pytest.mark.parametrize(
    "content, fragment",
    [
        (b"no picture at all", "not a picture"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 300, "holiday.png"),
        ("cut", "damaged"),
        ((9000, 6000), "54 megapixels"),
        ((20000, 20000), "too many pixels"),
        ((5000, 10), "one side"),
        (b"\0" * (MAX_BYTES + 1), "takes up to 20"),
    ],
)
def test_uploads_that_are_refused(tmp_path, content, fragment):
    path = tmp_path / "0f3c.png"
    if content == "cut":
        draw_question("test", 1)[0].image.save(path)
        path.write_bytes(path.read_bytes()[:700])
    elif isinstance(content, tuple):
        Image.new("1", content).save(path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=fragment) as error:
        open_upload(path, "holiday.png")
    assert str(tmp_path) not in str(error.value) and str(error.value).startswith("holiday.png")


def test_a_large_picture_that_is_not_too_large_is_taken(tmp_path):
    Image.new("RGB", (7000, 5000), "red").save(tmp_path / "photo.jpg")
    assert open_upload(tmp_path / "photo.jpg", "photo.jpg").size == (7000, 5000)


def test_the_gpu_is_asked_for_on_a_space_only(monkeypatch):
    def decode():
        yield 1

    marked = []
    gpu = SimpleNamespace(GPU=lambda duration: lambda function: marked.append((duration, function)) or function)
    monkeypatch.setitem(sys.modules, "spaces", gpu)
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert zero_gpu.on_gpu(decode) is decode and marked == []
    monkeypatch.setenv("SPACE_ID", "someone/something")
    assert zero_gpu.on_gpu(decode) is decode and marked == [(zero_gpu.GPU_SECONDS, decode)]
    monkeypatch.setitem(sys.modules, "spaces", None)  # a Space without it
    assert zero_gpu.on_gpu(decode) is decode


@pytest.mark.parametrize("is_embedded", [True, False])
def test_a_picture_unlike_a_scene_gets_a_note_beside_the_embedded_models_answer(embedded, is_embedded, tmp_path):
    page = pytest.importorskip("vreflection_hub_card.space.page", reason='needs pip install "vreflection[space]"')
    functions = page.build_page(*embedded, embedded=is_embedded).fns.values()
    # The button and the switch call the same one.
    (answer_question,) = {one.fn for one in functions if getattr(one.fn, "__name__", "") == "answer_question"}
    for picture, note in (
        (Image.new("RGB", (90, 60), "white"), NOTE if is_embedded else ""),
        (make_scene(3).image, ""),
    ):
        picture.save(tmp_path / "picture.png")
        payload = {"path": str(tmp_path / "picture.png"), "orig_name": "picture.png"}
        request = SimpleNamespace(session_hash="one")
        cleared = next(answer_question(payload, "Which glyph?", 8, "dac", False, False, request))
        assert note in [getattr(field, "info", None) for field in cleared.values()]
