"""The paper's six benchmarks, GQA and GlyphSearch: where their data lies, how many items they have, how to read a row.

A revision is the data set's commit that public evaluation code pins; BLINK's is the one that the paper's authors used, and
GQA's, which nobody pins, one behind the last change of its files.
Counts are of the whole data set, so that an item can't get lost unseen. Questions are worded as in the authors' released
evaluation.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..errors import InputError
from ..glyphsearch import GLYPHS, draw_question


LETTERS = "ABCDE"
INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."
# What follows a question of GQA, in the benchmark and in training.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Item:
    """One question of a benchmark."""

    id: str  # unique in its benchmark
    question: str  # the text after the pictures with the options in it, without the benchmark's instruction
    options: tuple[str, ...]  # their texts, without letters; of GQA, the answer alone
    answer: str  # the right letter; of GlyphSearch, the right glyph; of GQA, the right word or phrase
    images: tuple[Any, ...]  # what `open_picture` opens; their headers have been read
    groups: dict[str, str] = field(default_factory=dict)  # by kind of sub-score, the group that the item counts for

    def pictures(self) -> list[Image.Image]:
        """The pictures, decoded, as RGB; an `InputError` if one is damaged."""
        # Imported here, since the command line reads the benchmarks' names and must not wait for torch.
        from modeling_vreflection.pictures_vreflection import PictureError, open_picture

        try:
            return [open_picture(image) for image in self.images]
        except PictureError as error:
            raise InputError(f"item {self.id}: a picture can't be opened ({error})") from error


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's data and how it is asked."""

    name: str  # its key in `BENCHMARKS`
    dataset: str  # a Hub id
    revision: str | None
    split: str
    counts: dict[str, int]  # items of each subset, a configuration of the data set; of "" where there are none
    id_column: str
    read: Callable[[dict], dict]  # makes of a row all of an `Item` but its id
    complete: dict[str, int] = field(
        default_factory=dict
    )  # kinds of groups that are right only as a whole, their size
    config: str | None = None  # the only configuration, where it has a name that must be given
    instruction: str = INSTRUCTION  # what follows each question
    scorers: tuple[str, ...] = ("authors", "authors_table", "strict")
    pictures: str | None = None  # a configuration of rows (id, image), which a column `imageId` of the items names
    rows: Callable[[], list[dict]] | None = None  # makes the rows of data that isn't loaded from anywhere

    @property
    def total(self) -> int:
        """Items of all subsets."""
        return sum(self.counts.values())

    def item(self, row: dict[str, Any]) -> Item:
        """Reads a row; an `InputError` names an item that isn't as the data set has it."""
        item_id = str(row[self.id_column])
        try:
            return Item(item_id, **self.read(row))
        except InputError as error:
            raise InputError(f"item {self.name} {item_id}: {error}") from error


def read_mmvp(row: dict[str, Any]) -> dict[str, Any]:
    """Reads a row of `Questions.csv` (Index, Question, Options, Correct Answer) with its `image`, `INDEX.jpg`."""
    options = re.fullmatch(r"\(a\)(.+?)\(b\)(.+)", row["Options"].strip(), re.DOTALL | re.IGNORECASE)
    if options is None:
        raise InputError(f"the options {row['Options']!r} are not of the form '(a) … (b) …'")
    options = tuple(option.strip() for option in options.groups())
    return {
        # The authors rewrite the labels on their line, and in the question where it has any.
        "question": with_options(row["Question"], [row["Options"]]).replace("(a)", "A.").replace("(b)", "B."),
        "options": options,
        "answer": read_answer(row["Correct Answer"], options),
        "images": (read_image(row.get("image")),),
        "groups": {"pair": str((int(row["Index"]) + 1) // 2)},
    }


def read_vstar(row: dict[str, Any]) -> dict[str, Any]:
    """Reads a row of V* (question_id, image, text, label, category). The text holds options and an instruction."""
    options = tuple(option.strip() for option in re.findall(r"^\([A-E]\)(.*)$", row["text"], re.MULTILINE))
    if not options:
        raise InputError("no line of the text begins with a letter like '(A)'")
    return {
        "question": row["text"],
        "options": options,
        "answer": read_answer(row["label"], options),
        "images": (read_image(row.get("image")),),
        "groups": {"category": one_of(row["category"], ("direct_attributes", "relative_position"))},
    }


BLINK_COUNTS = {"Counting": 120, "IQ_Test": 150, "Jigsaw": 150, "Relative_Reflectance": 134, "Spatial_Relation": 143}


def read_blink(row: dict[str, Any]) -> dict[str, Any]:
    """Reads a row of BLINK (idx, question, sub_task, image_1 to image_4, choices, answer)."""
    options = tuple(row["choices"])
    further = [row[key] for key in ("image_2", "image_3", "image_4") if row.get(key) is not None]
    return {
        # The authors leave an empty line after the last option.
        "question": with_options(row["question"], lettered(options)) + "\n",
        "options": options,
        "answer": read_answer(row["answer"], options),
        "images": tuple(read_image(image) for image in [row.get("image_1"), *further]),
        "groups": {"subset": one_of(row["sub_task"], BLINK_COUNTS)},
    }


HRBENCH_CATEGORIES = {"single": "FSP", "cross": "FCP"}


def read_hrbench(row: dict[str, Any]) -> dict[str, Any]:
    """Reads a row of HR-Bench (index, question, answer, category, A, B, C, D, cycle_category, image as base64)."""
    options = tuple(row[letter] for letter in "ABCD")
    image = read_encoded_image(row.get("image"))
    # No column says which rows are one question: those that show the same options, in any order, for the same picture.
    same = "\n".join([row["question"], *sorted(options), row["image"]])
    return {
        "question": with_options(row["question"], lettered(options)),
        "options": options,
        "answer": read_answer(row["answer"], options),
        "images": (image,),
        "groups": {
            "category": HRBENCH_CATEGORIES[one_of(row["category"], HRBENCH_CATEGORIES)],
            "cycle": hashlib.sha256(same.encode()).hexdigest()[:16],
        },
    }


def read_mmerealworld(row: dict[str, Any]) -> dict[str, Any]:
    """Reads a row of MME-RealWorld-Lite (index, question, multi-choice options, answer, category, bytes as base64)."""
    choices = row["multi-choice options"]
    options = tuple(re.sub(r"^\s*\([A-E]\)\s*", "", choice).strip() for choice in choices)
    # The data set writes "Reasoning", "Reason" and "reasoning".
    kind = {"percep": "Perception", "reason": "Reasoning"}.get(row["category"][:6].lower())
    if kind is None:
        raise InputError(f"the category {row['category']!r} is neither perception nor reasoning")
    return {
        "question": with_options(row["question"], choices),
        "options": options,
        "answer": read_answer(row["answer"], options),
        "images": (read_encoded_image(row.get("bytes")),),
        "groups": {"category": kind},
    }


def read_gqa(row: dict[str, Any]) -> dict[str, Any]:
    """Reads a row of GQA (id, imageId, question, answer), with its picture joined as `image`."""
    return {
        "question": row["question"],
        "options": (row["answer"],),
        "answer": row["answer"],
        "images": (read_image(row.get("image")),),
    }


def read_glyphsearch(row: dict[str, Any]) -> dict[str, Any]:
    """Draws a row (index): a scene of GlyphSearch's test split and the question about it."""
    scene, question = draw_question("test", row["index"])
    return {
        "question": question.text,
        "options": tuple(GLYPHS),
        "answer": question.answer,
        "images": (scene.image,),
    }


def with_options(question: str, options: Sequence[str]) -> str:
    """A question and its options, one a line."""
    return "\n".join([question, "Options:", *options])


def lettered(options: Iterable[str]) -> list[str]:
    """Options with their letters: `"A. red"`."""
    return [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]


def read_answer(answer: str, options: tuple[str, ...]) -> str:
    """The letter of `"B"`, `"(b)"` or `"(B)"`; an `InputError` if it is none of an option."""
    letter = answer.strip().strip("()").upper()
    if len(letter) != 1 or letter not in LETTERS[: len(options)]:
        raise InputError(f"the answer {answer!r} is no letter of its {len(options)} options")
    return letter


def one_of(value: str, known: Iterable[str]) -> str:
    """The value; an `InputError` if it isn't known."""
    if value not in known:
        raise InputError(f"{value!r} is none of {', '.join(known)}")
    return value


def read_image(value: Any) -> Any:
    """Checks, by its header, that `open_picture` can open a picture, and returns it still encoded; or an `InputError`."""
    from modeling_vreflection.pictures_vreflection import PictureError, picture_size

    if not value or (isinstance(value, dict) and not any(value.values())):
        raise InputError("its image is missing")
    try:
        picture_size(value)
    except PictureError as error:
        raise InputError(f"its image can't be opened ({error})") from error
    return value


def read_encoded_image(value: str | None) -> bytes:
    """The content of a picture given as base64, checked likewise."""
    try:
        return read_image(base64.b64decode(value or "", validate=True))
    except binascii.Error as error:
        raise InputError(f"its image is not base64 ({error})") from error


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "mmvp", "MMVP/MMVP", "37eafecab8a3940c50c2ade5b36de69dbc99a8cf", "train",
            counts={"": 300}, id_column="Index", read=read_mmvp, complete={"pair": 2}
        ),
        Benchmark(
            "vstar", "craigwu/vstar_bench", "d9ae62c903da0c98336e85c5ee89cd863b04b4da", "test",
            counts={"": 191}, id_column="question_id", read=read_vstar
        ),
        Benchmark(
            "blink", "BLINK-Benchmark/BLINK", "a3666eb249237ba3d5eca8db21176cc47967e040", "val",
            counts=BLINK_COUNTS, id_column="idx", read=read_blink
        ),
        Benchmark(
            "hrbench4k", "DreamMr/HR-Bench", "83b9013d6293b85dc507e87199ca52517536939c", "hrbench_4k",
            counts={"": 800}, id_column="index", read=read_hrbench, complete={"cycle": 4}, config="hrbench_version_split"
        ),
        Benchmark(
            "hrbench8k", "DreamMr/HR-Bench", "83b9013d6293b85dc507e87199ca52517536939c", "hrbench_8k",
            counts={"": 800}, id_column="index", read=read_hrbench, complete={"cycle": 4}, config="hrbench_version_split"
        ),
        Benchmark(
            "mmerealworld_lite", "yifanzhang114/MME-RealWorld-lite-lmms-eval",
            "f6b0dc81ba4d3c39bd9b4e544578198d365ac084", "train",
            counts={"": 1919}, id_column="index", read=read_mmerealworld
        ),
        Benchmark(
            "gqa", "lmms-lab/GQA", "bfd36546a2883e0e33ed5d15aee47fd8f9a69457", "testdev",
            counts={"testdev_balanced_instructions": 12578}, id_column="id", read=read_gqa,
            pictures="testdev_balanced_images", instruction=SHORT_ANSWER, scorers=("exact_match",)
        ),
        Benchmark(
            "glyphsearch_answers", "GlyphSearch", None, "test",
            counts={"": 1000}, id_column="index", read=read_glyphsearch, instruction="", scorers=("exact",),
            rows=lambda: [{"index": index} for index in range(1000)]
        ),
    )
}  # fmt: skip
