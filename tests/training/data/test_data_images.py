import io
import random

import pytest
from PIL import Image

from vreflection_training.data.images import count_image_tokens, image_size, load_image
from vreflection_training.tiny import tiny_image_processor


LIMITS = {
    "tiny": (28 * 28, 576 * 28 * 28),
    "paper": (128 * 28 * 28, 5120 * 28 * 28),
    "stock": (56 * 56, 1280 * 28 * 28),
    "narrow": (256 * 28 * 28, 256 * 28 * 28),
    "qwen3_vl": (128 * 32 * 32, 5120 * 32 * 32),
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
    if request.param == "qwen3_vl":
        processor.patch_size = 16
    return processor


def picture(width, height, mode="RGB"):
    return Image.new(mode, (width, height), 120 if mode == "L" else None)


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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
        grid = image_processor(images=[loaded], return_tensors="pt")["image_grid_thw"]
        assert predicted == grid.prod() // 4, (width, height)
        made += 1
    assert made > 45


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
    with pytest.raises(ValueError, match="download it"):
        image_size("https://example.com/a.jpg")
