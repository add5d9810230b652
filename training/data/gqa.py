"""Reader of GQA: questions with programs, whose objects in the scene graph are the path to the answer."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vreflection_hub_card.evaluation.benchmarks import SHORT_ANSWER
from vreflection_hub_card.rows import path_part, reflection_part, text_part

from .image_folders import ImageFolders
from .images import image_size
from .json_files import fill_row, read_json_entries


ANSWERS = {"short": "answer", "full": "fullAnswer"}  # by option, the key in the file
# Operations whose argument ends with the ids of objects, or with (-) if there is none. Others may.
OBJECT_OPERATIONS = ("select", "relate", "verify rel", "choose rel")
# Not "not(7)", which negates an attribute.
OBJECT_IDS = re.compile(r"(?<!\bnot)\(\s*(-|\d+(?:\s*,\s*\d+)*)\s*\)\s*$")

Box = tuple[float, float, float, float]
# By image id: width and height in pixels, and by object id x, y, width and height in pixels.
SceneGraphs = dict[str, tuple[float | None, float | None, dict[str, Box]]]


def gqa_rows(
    path: str | Path,
    folders: ImageFolders,
    scene_graphs: SceneGraphs,
    balanced: bool = True,
    answers: str = "short",
    num_latent_tokens: int = 8,
) -> Iterator[dict[str, Any]]:
    """Reads a file of GQA's questions, a JSON object by question id, as rows of the project's format.

    ```python
    {"02930152": {"imageId": "2354786", "question": "Is the sky dark?", "answer": "yes", "fullAnswer": "Yes, the sky is dark.",
                  "isBalanced": True, "semantic": [
                      {"operation": "select", "argument": "sky (2486325)", "dependencies": []},
                      {"operation": "verify color", "argument": "dark", "dependencies": [0]}]}}
    ```

    The objects that the program's arguments name are the path of one reflection, in the order of the list `semantic` and of
    the ids in one argument. A box is visited once. `(-)`, no such object, ends the path. Boxes are cut to the picture.

    A row has no reflection, and says why in `no_reflection`, where the program asks about the whole scene, where the path is
    empty, and where it has more boxes than latent steps. An id without an object, a picture without a scene graph or a file,
    a box outside its picture and a program that can't be understood make a bad row.

    Args:
        path (`str` or `Path`): The file.
        folders (`ImageFolders`): Where the pictures, `IMAGEID.jpg`, lie: in the folder itself, or in its `gqa` or
            `gqa/images`.
        scene_graphs (`dict`): What [`read_scene_graphs`] returns.
        balanced (`bool`, *optional*, defaults to `True`): Whether questions with `isBalanced` false are left out.
        answers (`str`, *optional*, defaults to `"short"`): `"short"` answers with `answer` and asks for it as the benchmark
            `gqa` does, with `SHORT_ANSWER` behind the question; `"full"` answers with `fullAnswer`.
        num_latent_tokens (`int`, *optional*, defaults to 8): S of the model, the most boxes of a path.

    Raises:
        ValueError: A file that is no JSON object of questions.
    """

    def fill(row: dict[str, Any], item: dict[str, Any]):
        if balanced and item.get("isBalanced") is not True:
            raise ValueError(f"`isBalanced` must be true or false, got {item.get('isBalanced')!r}.")
        question, answer, image_id = (_text(item, key) for key in ("question", ANSWERS[answers], "imageId"))
        image = folders.find(f"{image_id}.jpg", "gqa")
        row["images"] = [image]
        if not os.path.exists(image):
            raise FileNotFoundError(f"{image}: no such file.")
        if image_id not in scene_graphs:
            raise ValueError(f"the scene graphs hold no picture {image_id}.")
        width, height, objects = scene_graphs[image_id]
        if not (width and height):
            width, height = image_size(image)
        ids, scene = _visited_objects(item.get("semantic"), objects)
        boxes = [*dict.fromkeys(_relative_box(name, objects[name], width, height) for name in ids)]
        if not boxes:
            row["no_reflection"] = "program of scene" if scene else "empty path"
        elif len(boxes) > num_latent_tokens:
            row["no_reflection"] = f"more than {num_latent_tokens} boxes"
            boxes = []
        parts = [path_part(boxes)] if len(boxes) > 1 else [*map(reflection_part, boxes)]
        row["messages"] = [
            {
                "role": "user",
                "content": [{"type": "image"}, text_part(question + (SHORT_ANSWER if answers == "short" else ""))],
            },
            {"role": "assistant", "content": [*parts, text_part(answer)]},
        ]

    for question_id, item in read_json_entries(path):
        if not balanced or item.get("isBalanced") is not False:
            yield fill_row(f"{Path(path).stem}-{question_id}", "gqa", item, fill)


def read_scene_graphs(path: str | Path) -> SceneGraphs:
    """Reads the sizes and boxes of a file of scene graphs; names, attributes and relations are left out, to save memory.

    Raises:
        ValueError: A file that isn't a JSON object of scene graphs.
    """
    graphs = {}
    for image_id, graph in read_json_entries(path):
        try:
            boxes = {name: tuple(map(thing.get, "xywh")) for name, thing in graph["objects"].items()}
        except (KeyError, AttributeError) as error:
            raise ValueError(f"{path}: the scene graph of picture {image_id} has no `objects` by id.") from error
        graphs[image_id] = graph.get("width"), graph.get("height"), boxes
    return graphs


def check_options(
    scene_graphs: str, balanced: bool = True, answers: str = "short", num_latent_tokens: int = 8
) -> None:
    """Raises a `ValueError` for an option of a source that can't be followed, a `FileNotFoundError` without the file."""
    if not isinstance(scene_graphs, str):
        raise ValueError(f"`scene_graphs` must be the file of the scene graphs, got {scene_graphs!r}.")
    if not isinstance(balanced, bool):
        raise ValueError(f"`balanced` must be true or false, got {balanced!r}.")
    if answers not in ANSWERS:
        raise ValueError(f"`answers` must be {' or '.join(map(repr, ANSWERS))}, got {answers!r}.")
    if not isinstance(num_latent_tokens, int) or isinstance(num_latent_tokens, bool) or num_latent_tokens < 1:
        raise ValueError(f"`num_latent_tokens` must be a number from 1 on, got {num_latent_tokens!r}.")
    if not os.path.isfile(scene_graphs):
        raise FileNotFoundError(f"there is no file {scene_graphs}, given as `scene_graphs`.")


def _visited_objects(program: Any, objects: dict[str, Box]) -> tuple[list[str], bool]:
    """The ids of the objects on a program's way, and whether it selects the whole scene."""
    if not isinstance(program, list):
        raise ValueError(f"`semantic` must be a list of operations, got {program!r}.")
    visited, scene, ended = [], False, False
    for step in program:
        operation = step.get("operation") if isinstance(step, dict) else None
        argument = step.get("argument") if isinstance(step, dict) else None
        if not isinstance(operation, str) or not isinstance(argument, (str, type(None))):
            raise ValueError(f"a step of `semantic` needs `operation` and `argument` as texts, got {step!r}.")
        if operation == "select" and argument is not None and argument.strip() == "scene":
            scene = True
            continue
        found = OBJECT_IDS.search(argument or "")
        if found is None:
            if operation.strip() in OBJECT_OPERATIONS:
                raise ValueError(f"the argument of {operation!r} must end with (ids) or (-), got {argument!r}.")
            continue
        if found[1] == "-":
            ended = True
            continue
        ids = re.findall(r"\d+", found[1])
        for name in ids:
            if name not in objects:
                raise ValueError(f"{operation!r} names the object {name}, which the scene graph doesn't have.")
        visited += [] if ended else ids
    return visited, scene and not ended


def _relative_box(name: str, box: Box, width: float, height: float) -> Box:
    """x0, y0, x1, y1 as fractions of the picture's sides, cut to it."""
    if not all(isinstance(number, (int, float)) for number in (*box, width, height)):
        raise ValueError(f"object {name} or its picture has no size: x, y, w, h {box}, picture {width} x {height}.")
    x, y, w, h = box
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"object {name} lies outside its picture: x, y, w, h {box}, picture {width} x {height}.")
    return x0 / width, y0 / height, x1 / width, y1 / height


def _text(item: dict[str, Any], key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{key}` must be a text, got {value!r}.")
    return value
