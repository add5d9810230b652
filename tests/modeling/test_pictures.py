"""One opener for pictures: every kind of picture gives the same pixels by every door, and what is none is named."""

import base64
import io
import warnings
import zlib

import numpy as np
import pytest
import torch
from datasets import Image as Decoder
from PIL import Image, ImageOps
from reference import ask

from modeling_vreflection.pictures_vreflection import (
    PictureError,
    PictureNotFoundError,
    open_picture,
    picture_size,
)
from vreflection_hub_card.errors import InputError
from vreflection_hub_card.evaluation.benchmarks import Item
from vreflection_hub_card.space.uploaded_picture import open_upload
from vreflection_training import VReflectionDataCollator
from vreflection_training.commands.ask import read_picture


WIDTH, HEIGHT = 56, 28  # whole patches, so that nothing is resized


def scene() -> Image.Image:
    """A red and a green quarter on white: no two rotations of it are equal."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    picture.paste((255, 0, 0), (0, 0, 28, 14))
    picture.paste((0, 128, 0), (28, 0, 56, 14))
    return picture


def see_through(mode: str) -> Image.Image:
    """The scene's upper half; below it nothing, painted black."""
    picture = scene().convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 14, WIDTH, HEIGHT))
    return picture.convert(mode)


def palette() -> Image.Image:
    """Black and transparent by a palette, both red in the RGB that is thrown away."""
    picture = Image.new("P", (WIDTH, HEIGHT), 0)
    picture.putpalette([255, 0, 0, 0, 0, 0])
    picture.paste(1, (0, 0, 28, HEIGHT))
    picture.info["transparency"] = 0
    return picture


def ramp(dtype, low, high) -> Image.Image:
    """Three thirds, from the lowest value to the highest."""
    values = np.array([low, (low + high) / 2, high]).repeat([20, 16, 20]).astype(dtype)
    return Image.fromarray(np.tile(values, (HEIGHT, 1)))


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated(orientation: int, kind: str = "PNG", **options) -> bytes:
    """The scene as a camera stores it that was held in one of eight ways."""
    undone = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # by PIL's number
    picture = scene() if orientation == 1 else scene().transpose(Image.Transpose(undone[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(picture, kind, exif=exif, **options)


def chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def tag_behind_the_pixels() -> bytes:
    """A PNG whose EXIF comes last."""
    whole = rotated(6)
    start = whole.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(whole[start : start + 4], "big")
    return whole[:start] + whole[end:-12] + whole[start:end] + whole[-12:]


def transparent_value() -> bytes:
    """16 bits, black transparent by its value."""
    whole = saved(ramp(np.uint16, 0, 65_535), "PNG")
    return whole[:33] + chunk(b"tRNS", b"\0\0") + whole[33:]


def on_white() -> Image.Image:
    expected = scene()
    expected.paste("white", (0, 14, WIDTH, HEIGHT))
    return expected


def thirds(middle: int) -> Image.Image:
    return ramp(np.uint8, 0, 255).point(lambda value: middle if 0 < value < 255 else value).convert("RGB")


def black_beside_white() -> Image.Image:
    expected = Image.new("RGB", (WIDTH, HEIGHT), "white")
    expected.paste("black", (0, 0, 28, HEIGHT))
    return expected


GREY = scene().convert("L")
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT), "blue")]}
# What is stored, and what is to be seen.
KINDS = {
    **{f"EXIF {value}": (rotated(value), scene()) for value in range(1, 9)},
    **{f"TIFF, EXIF {value}": (rotated(value, "TIFF"), scene()) for value in (1, 3, 6, 8)},
    "WebP, EXIF 6": (rotated(6, "WEBP", lossless=True), scene()),
    "JPEG, EXIF 6": (rotated(6, "JPEG", quality=100, subsampling=0), scene()),
    "EXIF behind the pixels": (tag_behind_the_pixels(), scene()),
    "RGB": (saved(scene(), "BMP"), scene()),
    "CMYK JPEG": (saved(scene().convert("CMYK"), "JPEG", quality=100, subsampling=0), scene()),
    "16 bit, a value transparent": (transparent_value(), thirds(127).point(lambda value: value or 255)),
    "16 bit PGM": (
        b"P5 56 28 65535\n" + np.asarray(ramp(">u2", 1000, 40_000)).astype(">u2").tobytes(),
        ramp(np.uint16, 1000, 40_000).convert("I").point(lambda value: value / 257 + 0.5).convert("L").convert("RGB"),
    ),
    "RGBA": (saved(see_through("RGBA"), "PNG"), on_white()),
    "LA": (saved(see_through("LA"), "PNG"), on_white().convert("L").convert("RGB")),
    "P with transparency": (saved(palette(), "PNG", transparency=0), black_beside_white()),
    "L": (saved(GREY, "PNG"), GREY.convert("RGB")),
    "1": (saved(black_beside_white().convert("1"), "PNG"), black_beside_white()),
    "16 bit": (saved(ramp(np.uint16, 0, 65_535), "PNG"), thirds(127)),  # 32,767 of 65,535
    "16 bit, other byte order": (saved(ramp(">u2", 0, 65_535), "TIFF"), thirds(127)),
    "I": (saved(ramp(np.int32, -100, 100), "TIFF"), thirds(128)),
    "F": (saved(ramp(np.float32, -0.5, 0.5), "TIFF"), thirds(128)),
    "F of one value": (saved(ramp(np.float32, 0.5, 0.5), "TIFF"), Image.new("RGB", (WIDTH, HEIGHT), "black")),
    "CMYK": (saved(scene().convert("CMYK"), "TIFF"), scene().convert("CMYK").convert("RGB")),
    "animated GIF": (saved(scene(), "GIF", **FRAMES), scene()),
    "animated WebP": (saved(scene(), "WEBP", lossless=True, **FRAMES), scene()),
}


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def written(content: bytes, folder) -> str:
    (folder / "picture").write_bytes(content)
    return str(folder / "picture")


def loaded(content: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(content))
    picture.load()
    return picture


# By these a file's content comes in, as a source of `open_picture`.
DOORS = {
    "path": written,
    "Path": lambda content, folder: folder / "picture" if written(content, folder) else None,
    "bytes": lambda content, folder: content,
    "file": lambda content, folder: open(written(content, folder), "rb"),
    "path of a dict": lambda content, folder: {"path": written(content, folder), "bytes": None},
    "bytes of a dict": lambda content, folder: {"path": "elsewhere", "bytes": content},
    "PIL": lambda content, folder: Image.open(io.BytesIO(content)),
    "PIL, decoded": lambda content, folder: loaded(content),
    "PIL, rotated": lambda content, folder: ImageOps.exif_transpose(loaded(content)),
    "PIL, of `datasets`": lambda content, folder: Decoder().decode_example({"path": None, "bytes": content}),
    "data URL": lambda content, folder: data_url(content),
    "data URL of a dict": lambda content, folder: {"path": data_url(content), "bytes": None},
    "base64": lambda content, folder: base64.b64encode(content).decode(),
}
# And these open a file for a command.
COMMANDS = {
    "ask": read_picture,
    "evaluate": lambda path: Item("0", "", (), "A", (path,)).pictures()[0],
    "the page": lambda path: open_upload(path, "picture"),
}
UPLOADED = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # the page takes no others


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_the_same_by_each_door(tmp_path, kind):
    content, expected = KINDS[kind]
    lossy = 3 if "JPEG" in kind else 0
    for door, make in DOORS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            source = make(content, tmp_path)
            assert picture_size(source) == (WIDTH, HEIGHT), door
            picture = open_picture(source)
            if hasattr(source, "close"):
                source.close()
        assert picture.mode == "RGB" and not picture.info and not picture.getexif(), door
        difference = np.asarray(picture).astype(int) - np.asarray(expected)
        assert abs(difference).max() <= lossy, door
    path = written(content, tmp_path)
    for command, run in COMMANDS.items():
        if command != "the page" or Image.open(path).format in UPLOADED:
            assert run(path).tobytes() == picture.tobytes(), command


@pytest.fixture(scope="module")
def collator(model, processor):
    return VReflectionDataCollator(processor, model.config)


def patches(processor, picture) -> torch.Tensor:
    return processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_processor_sees_what_the_opener_gives(tmp_path, processor, kind):
    content, _ = KINDS[kind]
    path = written(content, tmp_path)
    pil = Image.open(path)
    expected = patches(processor, open_picture(path))
    for part in (
        {"image": path}, {"image": tmp_path / "picture"}, {"url": path}, {"path": path}, {"image": pil},
        {"image": {"path": None, "bytes": content}}, {"image": data_url(content)}, {"url": data_url(content)},
        {"base64": base64.b64encode(content).decode()}, {"type": "image_url", "image_url": {"url": data_url(content)}},
    ):  # fmt: skip
        messages = [{"role": "user", "content": [{"type": "image", **part}]}]
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected), part
    text = processor.apply_chat_template(ask("What?", pil), tokenize=False)
    for images in (path, pil, [pil], [[data_url(content)]]):
        assert torch.equal(processor(images=images, text=text, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_collator_sees_what_the_opener_gives(tmp_path, processor, collator, kind):
    content, _ = KINDS[kind]
    path = written(content, tmp_path)
    pil, expected = Image.open(path), patches(processor, open_picture(path))
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "A"}]}]
    for image in (path, pil, {"path": None, "bytes": content}):
        row = {"id": "0", "images": [image], "messages": ask("What?", None) + answer}
        row["messages"][0]["content"][0].pop("image")
        assert torch.equal(collator([row])["pixel_values"], expected), image


@pytest.mark.parametrize("size", [(90, 61), (7, 30)])
def test_training_and_decoding_resize_alike(processor, collator, size):
    picture = Image.effect_noise(size, 80).convert("RGB")
    row = {"id": "0", "images": [picture], "messages": ask("What?", None)}
    row["messages"][0]["content"][0].pop("image")
    row["messages"].append({"role": "assistant", "content": [{"type": "text", "text": "A"}]})
    assert torch.equal(collator([row])["pixel_values"], patches(processor, picture))


def test_arrays_and_tensors_are_pictures(processor):
    array = np.array(scene())
    text = processor.apply_chat_template(ask("What?", scene()), tokenize=False)
    expected = patches(processor, scene())
    for images in (array, array.transpose(2, 0, 1), torch.tensor(array).permute(2, 0, 1), [array], array[None]):
        assert torch.equal(processor(images=images, text=text, return_tensors="pt")["pixel_values"], expected)
    red = array[..., 0]
    for grey in (red, red[..., None], red.astype(np.uint16) * 257, red.astype(np.int32)):
        assert open_picture(grey).tobytes() == Image.fromarray(red).convert("RGB").tobytes()
    clear = np.dstack([array, np.zeros_like(red)])
    assert set(open_picture(clear).tobytes()) == {255}
    for wrong in (array / 255, array.astype(np.int64), array.astype(np.uint16), array[..., :2].astype(np.float32)):
        check_refusal(wrong, "give uint8 values", processor)


def test_the_web_is_not_fetched_from(processor, collator):
    address = "https://example.com/a.png"
    for source in (address, address.upper(), {"path": address, "bytes": None}):
        check_refusal(source, "download it, and give its path", processor)
    for part in ({"image": address}, {"url": address}, {"type": "image_url", "image_url": {"url": address}}):
        messages = [{"role": "user", "content": [{"type": "image", **part}]}]
        with pytest.raises(PictureError, match="download it"):
            processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with pytest.raises(PictureError, match="download it"):
        picture_size(address)
    with pytest.raises(InputError, match="download it"):
        read_picture(address)


def test_an_animation_that_was_wound_on_is_seen_where_it_stands():
    picture = Image.open(io.BytesIO(KINDS["animated GIF"][0]))
    picture.seek(1)
    assert open_picture(picture).getpixel((0, 0)) == (0, 0, 255)


def test_random_values_are_converted_as_by_numpy():
    """Bit for bit, each of the three formulas."""
    random = np.random.default_rng(0)
    wide = random.integers(0, 2**16, (64, 64), dtype=np.uint16)
    integers = random.integers(-(2**31), 2**31 - 1, (64, 64), dtype=np.int32)
    floats = random.normal(size=(64, 64)).astype(np.float32)
    for values, low, high in [
        (wide, 0, 65_535),
        (wide.astype(np.int32), 0, 65_535),
        (integers, integers.min(), integers.max()),
        (floats, floats.min(), floats.max()),
    ]:
        low, high = np.float64(low), np.float64(high)
        expected = ((values.astype(np.float64) - low) / (high - low) * 255).round().astype(np.uint8)
        opened = open_picture(Image.fromarray(values))
        assert (np.asarray(opened) == expected[..., None]).all()


def test_a_given_picture_stays_as_it_is(processor):
    for content, _ in KINDS.values():
        picture = Image.open(io.BytesIO(content))
        picture.load()
        mode, size, pixels = picture.mode, picture.size, picture.tobytes()
        opened = open_picture(picture)
        opened.paste("blue", (0, 0, WIDTH, HEIGHT))
        assert (picture.mode, picture.size, picture.tobytes()) == (mode, size, pixels)


# What is none


def every_door(content: bytes, folder) -> list:
    return [make(content, folder) for name, make in DOORS.items() if not name.startswith(("PIL", "file"))]


def check_refusal(source, message, processor):
    with pytest.raises(PictureError, match=message) as error:
        open_picture(source)
    with pytest.raises(PictureError) as again:
        processor(images=[source], text="<|image_pad|>")
    assert str(again.value) == str(error.value)
    return error.value


@pytest.mark.parametrize("content", [b"", b"hello, I am text", b"\x89PNG"])
def test_files_that_are_no_pictures(tmp_path, processor, content):
    for source in every_door(content, tmp_path)[:5]:
        check_refusal(source, "not a picture", processor)
    assert "picture: not" in str(check_refusal(str(tmp_path / "picture"), "not a picture", processor))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.95])
def test_cut_files(tmp_path, processor, kind, share):
    content = saved(Image.effect_noise((200, 200), 80).convert("RGB"), kind)
    for source in every_door(content[: int(len(content) * share)], tmp_path):
        check_refusal(source, "not a picture|damaged or unreadable", processor)
    (tmp_path / "holiday").write_bytes(content[: int(len(content) * share)])
    check_refusal(tmp_path / "holiday", "holiday: ", processor)


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "ICO", "TGA", "PPM", "JPEG2000", "AVIF", "QOI"]
)
def test_damaged_files_give_a_picture_or_one_error(kind):
    """Whatever Pillow's decoder raises at random bytes in a file."""
    random = np.random.default_rng(0)
    content = saved(Image.effect_noise((32, 32), 80).convert("RGB"), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(150):
            damaged = np.frombuffer(content, dtype=np.uint8).copy()
            damaged[random.integers(0, min(len(damaged), 400), 4)] = random.integers(0, 256, 4)
            try:
                open_picture(damaged.tobytes(), max_pixels=10**6)
            except PictureError:
                pass


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_floats_that_are_not_finite(tmp_path, processor, value):
    values = np.zeros((8, 8), dtype=np.float32)
    values[3, 4] = value
    for source in (*every_door(saved(Image.fromarray(values), "TIFF"), tmp_path), Image.fromarray(values)):
        check_refusal(source, "holds values that aren't finite", processor)


def test_a_missing_file(tmp_path, processor):
    path = tmp_path / "gone.png"
    for source in (path, str(path), {"path": str(path), "bytes": None}):
        error = check_refusal(source, "gone.png: no such file", processor)
        assert isinstance(error, PictureNotFoundError) and isinstance(error, FileNotFoundError)
    check_refusal("gone", r"gone \(no such file, read as base64\): not a picture", processor)


def test_a_folder_and_what_is_no_source(tmp_path, processor):
    check_refusal(tmp_path, "is a folder", processor)
    check_refusal({"path": None, "bytes": None}, "a picture is a path", processor)
    check_refusal("data:image/png;base64,abc", "not base64", processor)
    with pytest.raises(PictureError, match="a picture is a path"):
        open_picture(None)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def forbid(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", forbid)  # as root nothing is unreadable
    with pytest.raises(PictureError, match="a.png: may not be read"):
        open_picture(tmp_path / "a.png")


def test_too_many_pixels(tmp_path, processor, monkeypatch):
    content = saved(Image.new("RGB", (200, 100)), "PNG")
    with pytest.raises(PictureError, match="upload.png: 200 x 100 pixels, 0.02 megapixels; at most 0.0199"):
        open_picture(content, name="upload.png", max_pixels=19_900)
    assert open_picture(content, max_pixels=20_000).size == (200, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for source in every_door(content, tmp_path):
        check_refusal(source, "too many pixels", processor)


def test_a_large_picture_in_memory_is_refused_as_a_file_is(processor, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    check_refusal(Image.new("RGB", (200, 100)), "too many pixels", processor)


@pytest.mark.parametrize("size", [(0, 0), (0, 5)])
def test_no_pixels(processor, size):
    check_refusal(Image.new("RGB", size), f"{size[0]} x {size[1]} pixels", processor)


@pytest.mark.parametrize("tag", ["white is zero", "12 bits"])
def test_tiffs_that_pillow_reads_wrong(processor, tag):
    content = bytearray(saved(ramp(np.uint16, 0, 65_535), "TIFF"))
    number, value = {"white is zero": (262, 0), "12 bits": (258, 12)}[tag]
    place = content.index(number.to_bytes(2, "little") + b"\3\0\1\0\0\0")
    content[place + 8 : place + 10] = value.to_bytes(2, "little")
    check_refusal(bytes(content), "comes out dark or inverted", processor)


def test_a_strip_that_is_too_long(processor):
    check_refusal(Image.new("RGB", (2010, 10)), "2010 x 10 pixels; one side may be at most 200 times", processor)
    assert open_picture(Image.new("RGB", (2000, 10))).size == (2000, 10)


def test_formats_can_be_limited():
    content = saved(scene(), "BMP")
    with pytest.raises(PictureError, match="upload: not a picture"):
        open_picture(io.BytesIO(content), name="upload", formats=("PNG",))
    assert open_picture(io.BytesIO(content), formats=("BMP",)).size == (WIDTH, HEIGHT)
