"""Every kind of picture becomes the RGB that a person sees."""

import numpy as np
import pytest
from PIL import Image

from vreflection_hub_card.errors import InputError
from vreflection_hub_card.pictures import load_picture


def gradient(mode="RGB"):
    values = np.linspace(0, 255, 64 * 48 * 3).reshape(48, 64, 3).astype(np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("name, mode", [("a.png", "RGB"), ("a.png", "L"), ("a.png", "1"), ("a.jpg", "RGB"), ("a.jpg", "L"), ("a.webp", "RGB"), ("a.gif", "P"), ("a.jpg", "CMYK"), ("a.tif", "CMYK"), ("a.bmp", "RGB")])  # fmt: skip
def test_common_formats(tmp_path, name, mode):
    picture = gradient(mode)
    picture.save(tmp_path / name)
    loaded = load_picture(tmp_path / name)
    assert loaded.mode == "RGB" and loaded.size == (64, 48)
    difference = np.abs(np.asarray(loaded, dtype=int) - np.asarray(picture.convert("RGB"), dtype=int))
    assert difference.mean() < 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    picture = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 5, 10))
    if mode == "P":
        picture = Image.new("P", (10, 10), 0)
        picture.putpalette([255, 0, 0, 0, 0, 0])
        picture.paste(1, (0, 0, 5, 10))
        picture.save(tmp_path / "a.png", transparency=0)
    else:
        picture.convert(mode).save(tmp_path / "a.png")
    loaded = load_picture(tmp_path / "a.png")
    assert loaded.getpixel((2, 2)) == (0, 0, 0)
    assert loaded.getpixel((8, 8)) == (255, 255, 255)


def test_16_bit_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 32_768, 65_535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert [load_picture(tmp_path / "a.png").getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pictures_without_a_fixed_range_are_stretched(tmp_path, dtype):
    Image.fromarray(np.array([[-100, 0, 100]], dtype=dtype)).save(tmp_path / "a.tif")
    assert [load_picture(tmp_path / "a.tif").getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste("black", (0, 0, 10, 20))
    picture.save(tmp_path / "a.png", exif=exif)
    loaded = load_picture(tmp_path / "a.png")
    assert loaded.size == (20, 40)
    assert loaded.getpixel((10, 2)) == (0, 0, 0) and loaded.getpixel((10, 30)) == (255, 255, 255)


def truncated(path, share=0.5, **options):
    Image.effect_noise((200, 200), 80).convert("RGB").save(path, **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.tif", "a.bmp"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.95])
def test_truncated_files(tmp_path, name, share):
    truncated(tmp_path / name, share)
    with pytest.raises(InputError, match=name):
        load_picture(tmp_path / name)


@pytest.mark.parametrize(
    "content, message",
    [(b"", "not a picture"), (b"hello, I am text", "not a picture"), (b"\x89PNG\r\n\x1a\n", "a.png")],
)
def test_files_that_are_no_pictures(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_picture(tmp_path / "a.png")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_picture(tmp_path / "a.png")
    with pytest.raises(InputError, match="is a folder"):
        load_picture(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def forbid(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", forbid)  # as root nothing is unreadable
    with pytest.raises(InputError, match="may not be read"):
        load_picture(tmp_path / "a.png")


def test_too_long_and_too_large_pictures(tmp_path, monkeypatch):
    Image.new("RGB", (2010, 10)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="2010 x 10 pixels"):
        load_picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="too many pixels"):
        load_picture(tmp_path / "a.png")
