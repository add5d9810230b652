"""Frames of a clip: the right ones, upright, in order; `vreflection ask --frames` names them; what can't be read is refused."""

import json
import struct
import sys

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image
from test_ask_command import fails

from vreflection_hub_card.errors import InputError
from vreflection_hub_card.glyphsearch import make_scene
from vreflection_hub_card.inference.clip_frames import MAX_FRAMES, read_frames
from vreflection_training.cli import main


av = pytest.importorskip("av")

RATE = 4


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_clip(path, seeds, **options):
    """Writes scenes of seeds, four a second."""
    with av.open(path, "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width = stream.height = 168
        stream.pix_fmt, stream.bit_rate = "yuv420p", 8_000_000
        frames = [av.VideoFrame.from_image(make_scene(seed).image) for seed in seeds]
        for frame in [*frames, None]:
            container.mux(stream.encode(frame))


def scene_of(picture, seeds):
    """The seed of the scene that comes nearest to a picture."""
    pixels = np.asarray(picture, dtype=float)
    return min(seeds, key=lambda seed: np.abs(pixels - np.asarray(make_scene(seed).image)).mean())


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("fps, taken", [(1, [0, 4, 8]), (2, [0, 2, 4, 6, 8]), (0.3, [0]), (4, range(10)), (50, range(10)), (3, [0, 2, 3, 4, 6, 7, 8])])  # fmt: skip
def test_the_first_frame_of_each_span_is_taken(suffix, fps, taken):
    write_clip(f"clip.{suffix}", range(10))
    frames = read_frames(f"clip.{suffix}", fps)
    assert [second for second, _ in frames] == pytest.approx([index / RATE for index in taken])
    assert [scene_of(picture, range(10)) for _, picture in frames] == list(taken)
    assert all(picture.mode == "RGB" and picture.size == (168, 168) for _, picture in frames)


def test_a_clip_that_was_held_upright_is_upright():
    write_clip("clip.mp4", [3])
    content = bytearray(open("clip.mp4", "rb").read())
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 168 << 16, 0, 1 << 30)
    open("clip.mp4", "wb").write(content)
    ((_, picture),) = read_frames("clip.mp4")
    assert np.abs(np.asarray(picture, dtype=float) - np.rot90(np.asarray(make_scene(3).image), -1)).mean() < 10


def test_odd_names_and_titles_are_read():
    with av.open("clip.mp4", "w") as container:
        container.metadata["title"] = "XXXX"
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width = stream.height = 168
        stream.pix_fmt = "yuv420p"
        for frame in (av.VideoFrame.from_image(make_scene(1).image), None):
            container.mux(stream.encode(frame))
    content = open("clip.mp4", "rb").read()
    assert content.count(b"XXXX") == 1
    open("10:30 clip.mp4", "wb").write(content.replace(b"XXXX", b"\xfc\xff\xfe\xe9"))  # no UTF-8
    assert len(read_frames("10:30 clip.mp4")) == 1


def test_more_frames_than_the_most_are_refused():
    write_clip("clip.mp4", range(6))
    assert len(read_frames("clip.mp4", RATE, max_frames=6)) == 6
    with pytest.raises(InputError, match="clip.mp4: more than 5 frames at 4 a second, .*take fewer"):
        read_frames("clip.mp4", RATE, max_frames=5)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e9])
def test_impossible_rates_are_refused(fps):
    write_clip("clip.mp4", [1])
    with pytest.raises(InputError, match="must be above 0 and at most 1000, got"):
        read_frames("clip.mp4", fps)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_clip_that_was_cut_off_is_refused(suffix, share):
    write_clip(f"clip.{suffix}", range(24), **{"movflags": "faststart"} if suffix == "mp4" else {})
    content = open(f"clip.{suffix}", "rb").read()
    open(f"clip.{suffix}", "wb").write(content[: int(share * len(content))])
    with pytest.raises(InputError, match=rf"clip.{suffix}: damaged"):
        read_frames(f"clip.{suffix}")


def test_a_clip_cut_between_two_frames_is_refused():
    write_clip("clip.mp4", range(24), movflags="faststart")
    with av.open("clip.mp4") as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    content = open("clip.mp4", "rb").read()
    open("clip.mp4", "wb").write(content[: packets[12].pos])
    with pytest.raises(InputError, match=r"ends after 3\.00 of its 6\.00 s"):
        read_frames("clip.mp4")


def test_frames_that_came_out_wrong_are_refused():
    write_clip("clip.mp4", range(8), movflags="faststart")
    content = bytearray(open("clip.mp4", "rb").read())
    middle = len(content) // 2
    content[middle : middle + 2000] = np.random.default_rng(0).bytes(2000)
    open("clip.mp4", "wb").write(content)
    with pytest.raises(InputError, match=r"clip.mp4: damaged at \d\.\d\d s"):
        read_frames("clip.mp4", 0.1)


def test_frames_are_asked_about_and_named(tiny_folder, capsys, monkeypatch):
    write_clip("clip.mp4", range(10))
    drawn = []
    monkeypatch.setattr(
        "vreflection_hub_card.inference.drawing.save_figure",
        lambda figure, path: drawn.extend(text.get_text() for text in figure.findobj(Text)),
    )
    arguments = ["ask", "--frames", "clip.mp4", "--fps", "2", "Which glyph?", "--reflect", "--model", str(tiny_folder)]
    arguments += ["--max-new-tokens", "12", "--heatmap", "out.png"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["question"] == "Which glyph?" and result["frame_seconds"] == [0, 0.5, 1, 1.5, 2]
    assert main([*arguments, "--per-step"]) == main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("look ")) + 1
    assert result["looks"]
    for line, look in zip(lines[header : header + len(result["looks"])], result["looks"], strict=True):
        assert line.split()[2:4] == [str(look["image_index"] + 1), f"{look['image_index'] / 2:.2f}"]
    looked_at = {f"frame {look['image_index'] + 1}, {look['image_index'] / 2:.2f} s" for look in result["looks"]}
    assert {text.split(":")[0] for text in drawn if text.startswith("frame ")} == looked_at


@pytest.mark.parametrize(
    "arguments, fragment",
    [
        (["--frames", "missing.mp4", "What?"], "missing.mp4: no such file"),
        (["--frames", "http://localhost:9/clip.mp4", "What?"], "no such file"),
        (["--frames", ".", "What?"], "not a file"),
        (["--frames", "text.mp4", "What?"], "text.mp4: damaged, or no clip"),
        (["--frames", "empty.mp4", "What?"], "empty.mp4: damaged, or no clip"),
        (["--frames", "sound.wav", "What?"], "sound.wav: holds no moving picture"),
        (["--frames", "list.m3u8", "What?"], "list.m3u8: damaged, or no clip (Invalid data"),
        (["--frames", "clip.mp4", "--fps", "0", "What?"], "must be above 0"),
        (["--frames", "long.mp4", "--fps", "4", "What?"], f"more than {MAX_FRAMES} frames"),
        (["--frames", "thin.mp4", "What?"], "one side may be at most 200 times the other"),
        (["--frames", "clip.mp4"], 'a question is missing: vreflection ask --frames CLIP "QUESTION"'),
        (["--frames", "clip.mp4", "picture.png"], "picture.png: a picture and --frames exclude each other"),
        (["--frames", "clip.mp4", "picture.png", "What?"], "picture.png: a picture and --frames exclude each other"),
        (["picture.png", "What?", "--fps", "1"], "add --frames CLIP"),
        (["--frames", "clip.mp4", "What?", "--seed", "1"], "--seed"),
    ],
)
def test_mistakes(tiny_folder, capsys, arguments, fragment):
    write_clip("clip.mp4", [1, 2])
    write_clip("long.mp4", [1] * (MAX_FRAMES + 1))
    for name, content in (("text.mp4", "text"), ("empty.mp4", ""), ("list.m3u8", PLAYLIST)):
        open(name, "w").write(content)
    make_scene(1).image.save("picture.png")
    with av.open("thin.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 4040, 16, "yuv420p"
        for frame in (av.VideoFrame.from_image(Image.new("RGB", (4040, 16))), None):
            container.mux(stream.encode(frame))
    with av.open("sound.wav", "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        for frame in (sound, None):
            container.mux(stream.encode(frame))
    fails(capsys, main(["ask", *arguments, "--model", str(tiny_folder)]), fragment)


# What would be fetched, or read from elsewhere, if playlists were followed.
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"


def test_without_a_decoder_one_line_says_so(capsys, monkeypatch):
    write_clip("clip.mp4", [1])
    monkeypatch.setitem(sys.modules, "av", None)
    fails(capsys, main(["ask", "--frames", "clip.mp4", "What?"]), "clip.mp4", "pip install av")
