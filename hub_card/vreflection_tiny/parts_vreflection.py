"""Content parts of messages that are reflections: which ones are rendered, and the boxes that they hold."""

from typing import Any

from .regions_vreflection import quantise_box


REFLECTION_KEYS = ("type", "box", "boxes", "image_index")


class ReflectionPartError(ValueError):
    """A reflection part that can't be used; `kind` is a report's heading for what is wrong."""

    def __init__(self, message: str, kind: str = "box"):
        super().__init__(message)
        self.kind = kind


def read_path(
    part: dict[str, Any], num_images: int, num_latent_tokens: int | None, number: int, sample: str = ""
) -> list[list[int]]:
    """Checks a reflection part, and returns its boxes in the order of looking.

    Args:
        part (`dict`): The part; keys that hold `None` count as left out.
        num_images (`int`): How many images the sample has.
        num_latent_tokens (`int`): S.
        number (`int`): Which of the sample's reflections it is, for errors.
        sample (`str`, *optional*): The sample's name, for errors, such as `" of sample 3"`.

    Returns:
        `list[list[int]]`: For each of the K boxes x0, y0, x1, y1 in 1/65,536 of the image's sides, and the image's index.

    Raises:
        ReflectionPartError: Unknown keys; both or neither of `box` and `boxes`; more boxes than S; a box that is no box; an
            `image_index` that is none of the images, or a list of another length.
        ValueError: S is not known.
    """
    if num_latent_tokens is None:
        raise ValueError(
            "The processor doesn't know how many latent steps a reflection has: neither processor_config.json nor config.json "
            "holds `num_latent_tokens`. Set `processor.num_latent_tokens` to that of the model's config, and save it again."
        )
    where = f"Reflection {number}{sample}"
    part = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in part.items()}
    given = {key: value for key, value in part.items() if value is not None}
    if unknown := [key for key in given if key not in REFLECTION_KEYS]:
        raise ReflectionPartError(
            f"{where} has the key {unknown[0]!r}, which nothing reads; a reflection has {', '.join(REFLECTION_KEYS)}.",
            "unknown key",
        )
    images = given.get("image_index", 0)
    if "boxes" not in given:
        boxes, names = [part.get("box")], [f"Box {number}{sample}"]
        if isinstance(images, (list, tuple)):
            raise ReflectionPartError(
                f"{names[0]} has `image_index` {images!r}: of a single `box` it is a number.", "image_index"
            )
    else:
        boxes = given["boxes"]
        if "box" in given:
            raise ReflectionPartError(f"{where} has both `box` and `boxes`: leave one of them out.")
        if not isinstance(boxes, (list, tuple)) or not boxes:
            raise ReflectionPartError(f"{where} must have as `boxes` at least one [x0, y0, x1, y1], got {boxes!r}.")
        if len(boxes) > num_latent_tokens:
            raise ReflectionPartError(
                f"{where} has {len(boxes)} boxes, but only {num_latent_tokens} latent steps (`num_latent_tokens`): leave some "
                "out.",
                "path too long",
            )
        names = [f"Box {place} of reflection {number}{sample}" for place in range(len(boxes))]
    if not isinstance(images, (list, tuple)):
        images = [images] * len(boxes)
    if len(images) != len(boxes):
        raise ReflectionPartError(
            f"{where} has {len(boxes)} boxes, but {len(images)} numbers in `image_index`: give one for each box, or one "
            "number for all.",
            "image_index",
        )
    path = []
    for name, box, image in zip(names, boxes, images):
        try:
            corners = quantise_box(box, name)
        except ValueError as error:
            raise ReflectionPartError(str(error)) from error
        if not isinstance(image, int) or not 0 <= image < num_images:
            raise ReflectionPartError(
                f"{name} has `image_index` {image!r}, but the sample has {num_images} images.", "image_index"
            )
        path.append([*corners, image])
    return path


def rendered_reflections(messages: list[dict]) -> list[dict]:
    """The reflection parts that the chat template renders: those after the last question."""
    questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
    answers = messages[questions[-1] :] if questions else messages
    return [
        part
        for message in answers
        if message["role"] == "assistant" and isinstance(message.get("content"), (list, tuple))
        for part in message["content"]
        if part["type"] == "reflection"
    ]
