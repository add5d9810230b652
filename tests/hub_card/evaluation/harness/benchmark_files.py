"""A few items of each benchmark, as local parquet files with the real columns and tiny pictures."""

import base64
import io
from dataclasses import replace

from datasets import Dataset, Features, Image, Value
from PIL import Image as PillowImage

from vreflection_hub_card.evaluation.benchmarks import BENCHMARKS, BLINK_COUNTS


TEXT = Value("string")


def picture(number, side=56):
    return PillowImage.new("RGB", (side, side), (20 * number % 256, 200, 40))


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def mmvp_rows():
    """Two pairs."""
    for index in range(1, 5):
        yield {
            "Index": index,
            "Question": f"Is door {(index + 1) // 2} open?",
            "Options": "(a) Open (b) Closed",
            "Correct Answer": "(a)" if index % 2 else "(b)",
            "image": picture(index),
        }


def vstar_rows():
    for index, category in enumerate(["direct_attributes", "direct_attributes", "relative_position"]):
        text = f"What colour is dog {index}?\n(A) red\n(B) blue\nAnswer with the option's letter from the given choices directly."
        yield {
            "image": picture(index),
            "text": text,
            "category": category,
            "label": "AB"[index % 2],
            "question_id": str(index),
        }


def blink_rows():
    """Two items of each subset; the first has a second picture."""
    for subset in BLINK_COUNTS:
        for index in (1, 2):
            yield {
                "idx": f"val_{subset}_{index}",
                "question": "How many dots?",
                "sub_task": subset,
                "image_1": picture(index),
                "image_2": picture(9, 84) if index == 1 else None,
                "image_3": None,
                "image_4": None,
                "choices": ["one", "two", "three"],
                "answer": "(B)",
                "prompt": "How many dots? Select from the following choices.",
            }


def hrbench_rows():
    """Two questions, each with its options in four orders."""
    colours = ["red", "blue", "green", "black"]
    for question, category in enumerate(["single", "cross"]):
        for cycle in range(4):
            options = colours[cycle:] + colours[:cycle]
            yield {
                "index": 4 * question + cycle,
                "question": f"What colour is car {question}?",
                "answer": "ABCD"[options.index("red")],
                "category": category,
                **dict(zip("ABCD", options)),
                "cycle_category": "sample",
                "image": encoded(picture(question)),
            }


def mmerealworld_rows():
    categories = ["Perception/OCR", "perception/Diagram", "Reasoning/OCR", "Reason/Diagram"]
    for index, category in enumerate(categories):
        yield {
            "index": index,
            "question": f"Which sign is number {index}?",
            "multi-choice options": [f"({letter}) sign {letter}" for letter in "ABCDE"],
            "answer": "ABCD"[index],
            "category": category,
            "l2-category": "x",
            "bytes": encoded(picture(index)),
        }


GQA_PICTURES = "testdev_balanced_images"


def gqa_rows():
    """Three questions about two pictures."""
    for index, (image, answer) in enumerate([("1", "t-shirt"), ("n2", "yes"), ("1", "brown dog")]):
        yield {
            "id": f"2013{index}",
            "imageId": image,
            "question": f"What is thing {index}?",
            "answer": answer,
            "fullAnswer": f"It is {answer}.",
            "isBalanced": True,
        }


def gqa_pictures():
    for name, side in (("n2", 84), ("1", 56)):
        yield {"id": name, "image": picture(1, side)}


ROWS = {
    "mmvp": ("train", {"": mmvp_rows}),
    "vstar": ("test", {"": vstar_rows}),
    "blink": ("val", dict.fromkeys(BLINK_COUNTS, blink_rows)),
    "hrbench4k": ("hrbench_4k", {"": hrbench_rows}),
    "hrbench8k": ("hrbench_8k", {"": hrbench_rows}),
    "mmerealworld_lite": ("train", {"": mmerealworld_rows}),
    "gqa": ("testdev", {"testdev_balanced_instructions": gqa_rows}),
}
IMAGES = ("image", "image_1", "image_2", "image_3", "image_4")


def rows_of(name, subset):
    return [row for row in ROWS[name][1][subset]() if row.get("sub_task", subset) == subset]


def shrink(patch):
    """Makes the benchmarks as large as the files of the tests."""
    for name, (_, subsets) in ROWS.items():
        counts = {subset: len(rows_of(name, subset)) for subset in subsets}
        patch.setitem(BENCHMARKS, name, replace(BENCHMARKS[name], counts=counts))


def write_files(folder, name, change=lambda row: row):
    """Writes a benchmark's files and returns the folder; `change` alters rows, or drops one by `None`."""
    split, subsets = ROWS[name]
    files = {subset: rows_of(name, subset) for subset in subsets}
    if name == "gqa":
        files[GQA_PICTURES] = [*gqa_pictures()]
    for subset, rows in files.items():
        rows = [row for row in map(change, rows) if row is not None]
        features = Dataset.from_list([{k: v for k, v in rows[0].items() if k not in IMAGES}]).features
        pictures = {key: Image() for key in rows[0] if key in IMAGES and not isinstance(rows[0][key], str)}
        features = Features({key: pictures.get(key, features.get(key, TEXT)) for key in rows[0]})
        path = folder / name / subset / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(path)
    return folder
