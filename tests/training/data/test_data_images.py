import io
import random
import threading
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from vreflection_training.data.images import count_image_tokens, image_size, load_image
from vreflection_training.tiny import tiny_image_processor


LIMITS = {
    "tiny": (28 * 28, 576 * 28 * 28),
    "paper": (128 * 28 * 28, 5120 * 28 * 28),
    "stock": (56 * 56, 1280 * 28 * 28),
    "narrow": (256 * 28 * 28, 256 * 28 * 28),
}
EXTREME = [
    (1, 1), (1, 200), (200, 1), (13, 14), (14, 14), (15, 43), (27, 5000), (28, 28), (41, 42), (42, 42), (5000, 26),
    (1190, 6), (9000, 45), (784, 16128), (2003, 2003), (40, 5717),
]  # fmt: skip


@pytest.fixture(scope="module", params=LIMITS)
def image_processor(request):
    processor = tiny_image_processor()
    shortest, longest = LIMITS[request.param]
    processor.size = {"shortest_edge": shortest, "longest_edge": longest}
    return processor


def picture(width, height, mode="RGB"):
    return Image.new(mode, (width, height), 120 if mode == "L" else None)


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_tokens_predicted_from_the_size_are_those_that_the_processor_makes(image_processor):
    draw = random.Random(0)
    sizes = [(int(2 ** draw.uniform(2, 11)), int(2 ** draw.uniform(2, 11))) for _ in range(40)]
    made = 0
    for width, height in EXTREME + sizes:
        try:
            predicted = count_image_tokens(width, height, image_processor)
        except ValueError:
            # What can't be counted can't be loaded either.
            with pytest.raises(ValueError, match="too narrow"):
                load_image(picture(width, height), image_processor)
            continue
        loaded = load_image(picture(width, height), image_processor)
        grid = image_processor(images=[loaded], do_resize=False, return_tensors="pt")["image_grid_thw"]
        assert predicted == grid.prod() // 4, (width, height)
        made += 1
    assert made > 45


def test_pictures_lie_within_the_limits_and_on_whole_merged_patches():
    image_processor = tiny_image_processor()
    for width, height in [(3000, 2000), (40, 30), (640, 480)]:
        loaded = load_image(picture(width, height), image_processor)
        assert loaded.mode == "RGB"
        assert loaded.width % 28 == 0 and loaded.height % 28 == 0
        assert loaded.width * loaded.height <= image_processor.size["longest_edge"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", range(1, 9))
def test_exif_rotation_is_applied_once_and_the_size_agrees(tmp_path, kind, value):
    image_processor = tiny_image_processor()
    upright = Image.new("RGB", (112, 56), "white")
    upright.paste("red", (0, 0, 56, 28))  # the top left quarter
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that a viewer undoes, by PIL's number
    stored = upright.transpose(Image.Transpose(back[value])) if value in back else upright
    path = tmp_path / "picture"
    stored.save(path, kind, exif=orientation(value), **({"quality": 100} if kind == "JPEG" else {"lossless": True}))
    assert image_size(path) == (112, 56)
    loaded = load_image(path, image_processor)
    assert loaded.size == (112, 56)
    assert loaded.getpixel((20, 10))[1] < 100  # red where it was
    assert min(loaded.getpixel((90, 40))) > 200
    assert loaded.getexif().get(0x0112) is None


def test_a_path_bytes_and_a_picture_are_the_same(tmp_path):
    image_processor = tiny_image_processor()
    image = Image.effect_mandelbrot((90, 61), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    data = encoded(image, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    forms = [str(path), path, {"path": None, "bytes": data}, {"path": str(path), "bytes": None}, image]
    forms.append({"path": "elsewhere.png", "bytes": data})  # as a parquet file holds it
    assert {image_size(form) for form in forms} == {(90, 61)}
    assert len({load_image(form, image_processor).tobytes() for form in forms}) == 1


def test_only_the_header_is_read(tmp_path):
    data = encoded(Image.effect_noise((800, 600), 90), quality=95)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[:2000])
    assert image_size(path) == (800, 600)
    with pytest.raises(ValueError, match="cut.jpg: damaged or unreadable"):
        load_image(path, tiny_image_processor())


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for function in (image_size, lambda image: load_image(image, tiny_image_processor())):
        with pytest.raises(FileNotFoundError, match="gone.jpg: no such file"):
            function(str(tmp_path / "gone.jpg"))
        for name in ("text.jpg", "empty.jpg"):
            with pytest.raises(ValueError, match=f"{name}: not a picture"):
                function(str(tmp_path / name))
        with pytest.raises(ValueError, match="is a folder"):
            function(tmp_path)
    with pytest.raises(ValueError, match="web"):
        image_size("https://example.com/a.jpg")


def test_an_exif_tag_behind_the_pixels_counts_neither_for_the_size_nor_for_the_picture():
    plain = encoded(Image.new("RGB", (112, 56)), "PNG")
    chunk = b"eXIf" + orientation(6).tobytes()[6:]
    chunk = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    image = {"path": None, "bytes": plain[:-12] + chunk + plain[-12:]}
    assert Image.open(io.BytesIO(image["bytes"])).getexif()[0x0112] == 6  # it is there
    assert image_size(image) == (112, 56)
    loaded = load_image(image, tiny_image_processor())
    assert loaded.size == (112, 56)
    assert loaded.getexif().get(0x0112) is None


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_a_picture_on_the_web_is_opened_like_a_file(tmp_path):
    picture = Image.effect_noise((90, 61), 80).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(tmp_path / "a.png", exif=orientation(6))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        loaded = load_image(f"{address}/a.png", tiny_image_processor())
        assert loaded.tobytes() == load_image(tmp_path / "a.png", tiny_image_processor()).tobytes()
        with pytest.raises(OSError, match="404"):
            load_image(f"{address}/gone.png", tiny_image_processor())
    finally:
        server.shutdown()
        server.server_close()
