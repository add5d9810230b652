"""The paper's six benchmarks and GlyphSearch: where their data lies, how many items they have, how to read a row.

A revision is the data set's commit that public evaluation code pins; BLINK's is the one that the paper's authors used.
Counts are of the whole data set, so that an item can't get lost unseen.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image

from ..errors import InputError
from ..glyphsearch import GLYPHS, draw_question
from .prompts import INSTRUCTION, LETTERS, lettered, mmvp_question, with_options


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        id (`str`): Its id, unique in its benchmark.
        question (`str`): The text after the pictures with the options in it, without the protocol's instruction.
        options (`tuple[str, ...]`): The options' texts, without letters.
        answer (`str`): The right letter; of GlyphSearch, the right glyph.
        images (`tuple`): What `open_picture` makes the pictures of; their headers have been read.
        groups (`dict[str, str]`): For each kind of sub-score, the group that the item counts for.
    """

    id: str
    question: str
    options: tuple[str, ...]
    answer: str
    images: tuple[Any, ...]
    groups: dict[str, str] = field(default_factory=dict)

    def pictures(self) -> list[Image.Image]:
        """The pictures, decoded, as RGB.

        Raises:
            InputError: A damaged picture.
        """
        # Imported here, since the command line reads the benchmarks' names and must not wait for torch.
        from modeling_vreflection.processing_vreflection import PictureError, open_picture

        try:
            return [open_picture(image) for image in self.images]
        except PictureError as error:
            raise InputError(f"item {self.id}: a picture can't be opened ({error})") from error


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's data.

    Args:
        name (`str`): Its key in `BENCHMARKS`.
        dataset (`str`): The data set's Hub id.
        revision (`str`, *optional*): The commit to load; `None` where none is known.
        split (`str`): The split.
        counts (`dict[str, int]`): Items of each subset, a configuration of the data set; of `""` where there are none.
        item (`Callable[[dict], Item]`): Reads a row. An image may be anything that `open_picture` opens.
        complete (`dict[str, int]`): Kinds of groups that are right only as a whole, with their size.
        config (`str`, *optional*): The only configuration, where it has a name that must be given.
        instruction (`str`): What follows each question.
        scorers (`tuple[str, ...]`): How answers are scored, keys of `SCORERS`.
        rows (`Callable[[], list[dict]]`, *optional*): Makes the rows of data that isn't loaded from anywhere.
    """

    name: str
    dataset: str
    revision: str | None
    split: str
    counts: dict[str, int]
    item: Callable[[dict], Item]
    complete: dict[str, int] = field(default_factory=dict)
    config: str | None = None
    instruction: str = INSTRUCTION
    scorers: tuple[str, ...] = ("authors", "authors_table", "strict")
    rows: Callable[[], list[dict]] | None = None

    @property
    def total(self) -> int:
        """Items of all subsets."""
        return sum(self.counts.values())

    def check_count(self, count: int, subset: str = "") -> None:
        """Raises an `InputError` unless a subset, or `""` for a benchmark without, has all its items."""
        if count != self.counts[subset]:
            where = f"{self.name} {subset}".strip()
            raise InputError(
                f"{where}: {count} items instead of {self.counts[subset]}; load {self.dataset}, split {self.split}, "
                f"revision {self.revision}, completely"
            )


def read_mmvp(row: dict[str, Any]) -> Item:
    """Reads a row of `Questions.csv` (Index, Question, Options, Correct Answer) with its `image`, `INDEX.jpg`."""
    index = int(row["Index"])
    name = f"mmvp {index}"
    options = re.fullmatch(r"\(a\)(.+?)\(b\)(.+)", row["Options"].strip(), re.DOTALL | re.IGNORECASE)
    if options is None:
        raise InputError(f"item {name}: the options {row['Options']!r} are not of the form '(a) … (b) …'")
    options = tuple(option.strip() for option in options.groups())
    return Item(
        id=str(index),
        question=mmvp_question(row["Question"], row["Options"]),
        options=options,
        answer=read_answer(row["Correct Answer"], options, name),
        images=(read_image(row.get("image"), name),),
        groups={"pair": str((index + 1) // 2)},
    )


def read_vstar(row: dict[str, Any]) -> Item:
    """Reads a row of V* (question_id, image, text, label, category). The text holds options and an instruction."""
    name = f"vstar {row['question_id']}"
    options = tuple(option.strip() for option in re.findall(r"^\([A-E]\)(.*)$", row["text"], re.MULTILINE))
    if not options:
        raise InputError(f"item {name}: no line of the text begins with a letter like '(A)'")
    return Item(
        id=str(row["question_id"]),
        question=row["text"],
        options=options,
        answer=read_answer(row["label"], options, name),
        images=(read_image(row.get("image"), name),),
        groups={"category": one_of(row["category"], ("direct_attributes", "relative_position"), name)},
    )


BLINK_COUNTS = {"Counting": 120, "IQ_Test": 150, "Jigsaw": 150, "Relative_Reflectance": 134, "Spatial_Relation": 143}


def read_blink(row: dict[str, Any]) -> Item:
    """Reads a row of BLINK (idx, question, sub_task, image_1 to image_4, choices, answer)."""
    name = f"blink {row['idx']}"
    options = tuple(row["choices"])
    further = [row[key] for key in ("image_2", "image_3", "image_4") if row.get(key) is not None]
    return Item(
        id=row["idx"],
        # The line that the authors leave empty after the last option.
        question=with_options(row["question"], lettered(options) + "\n"),
        options=options,
        answer=read_answer(row["answer"], options, name),
        images=tuple(read_image(image, name) for image in [row.get("image_1"), *further]),
        groups={"subset": one_of(row["sub_task"], tuple(BLINK_COUNTS), name)},
    )


GLYPHSEARCH_COUNT = 1000
HRBENCH_CATEGORIES = {"single": "FSP", "cross": "FCP"}


def read_hrbench(row: dict[str, Any], benchmark: str) -> Item:
    """Reads a row of HR-Bench (index, question, answer, category, A, B, C, D, cycle_category, image as base64)."""
    name = f"{benchmark} {row['index']}"
    options = tuple(row[letter] for letter in "ABCD")
    image = read_encoded_image(row.get("image"), name)
    # No column says which rows are one question: those that show the same options, in any order, for the same picture.
    question = "\n".join([row["question"], *sorted(options), row["image"]])
    return Item(
        id=str(row["index"]),
        question=with_options(row["question"], lettered(options)),
        options=options,
        answer=read_answer(row["answer"], options, name),
        images=(image,),
        groups={
            "category": HRBENCH_CATEGORIES[one_of(row["category"], tuple(HRBENCH_CATEGORIES), name)],
            "cycle": hashlib.sha256(question.encode()).hexdigest()[:16],
        },
    )


def read_mmerealworld(row: dict[str, Any]) -> Item:
    """Reads a row of MME-RealWorld-Lite (index, question, multi-choice options, answer, category, bytes as base64)."""
    name = f"mmerealworld_lite {row['index']}"
    choices = row["multi-choice options"]
    options = tuple(re.sub(r"^\s*\([A-E]\)\s*", "", choice).strip() for choice in choices)
    # The data set writes "Reasoning", "Reason" and "reasoning".
    kind = {"percep": "Perception", "reason": "Reasoning"}.get(row["category"][:6].lower())
    if kind is None:
        raise InputError(f"item {name}: the category {row['category']!r} is neither perception nor reasoning")
    return Item(
        id=str(row["index"]),
        question=with_options(row["question"], "\n".join(choices)),
        options=options,
        answer=read_answer(row["answer"], options, name),
        images=(read_encoded_image(row.get("bytes"), name),),
        groups={"category": kind},
    )


def read_glyphsearch(row: dict[str, Any]) -> Item:
    """Draws a row (index): a scene of GlyphSearch's test split and the question about it."""
    scene, question = draw_question("test", row["index"])
    return Item(
        id=str(row["index"]),
        question=question.text,
        options=tuple(GLYPHS),
        answer=question.answer,
        images=(scene.image,),
    )


def read_answer(answer: str, options: tuple[str, ...], name: str) -> str:
    """The letter of `"B"`, `"(b)"` or `"(B)"`; an `InputError` if it is none of an option."""
    letter = answer.strip().strip("()").upper()
    if len(letter) != 1 or letter not in LETTERS[: len(options)]:
        raise InputError(f"item {name}: the answer {answer!r} is no letter of its {len(options)} options")
    return letter


def one_of(value: str, known: tuple[str, ...], name: str) -> str:
    """The value; an `InputError` if it isn't known."""
    if value not in known:
        raise InputError(f"item {name}: {value!r} is none of {', '.join(known)}")
    return value


def read_image(value: Any, name: str) -> Any:
    """Checks, by its header, that `open_picture` can open a picture, and returns it still encoded; or an `InputError`."""
    from modeling_vreflection.processing_vreflection import PictureError, picture_size

    if not value or (isinstance(value, dict) and not any(value.values())):
        raise InputError(f"item {name}: its image is missing")
    try:
        picture_size(value)
    except PictureError as error:
        raise InputError(f"item {name}: its image can't be opened ({error})") from error
    return value


def read_encoded_image(value: str | None, name: str) -> bytes:
    """The content of a picture given as base64, checked likewise."""
    try:
        return read_image(base64.b64decode(value or "", validate=True), name)
    except binascii.Error as error:
        raise InputError(f"item {name}: its image is not base64 ({error})") from error


def _hrbench(size: str) -> Benchmark:
    name = f"hrbench{size}"
    return Benchmark(
        name=name,
        dataset="DreamMr/HR-Bench",
        revision="83b9013d6293b85dc507e87199ca52517536939c",
        split=f"hrbench_{size}",
        counts={"": 800},
        item=partial(read_hrbench, benchmark=name),
        complete={"cycle": 4},
        config="hrbench_version_split",
    )


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="mmvp",
            dataset="MMVP/MMVP",
            revision="37eafecab8a3940c50c2ade5b36de69dbc99a8cf",
            split="train",
            counts={"": 300},
            item=read_mmvp,
            complete={"pair": 2},
        ),
        Benchmark(
            name="vstar",
            dataset="craigwu/vstar_bench",
            revision="d9ae62c903da0c98336e85c5ee89cd863b04b4da",
            split="test",
            counts={"": 191},
            item=read_vstar,
        ),
        Benchmark(
            name="blink",
            dataset="BLINK-Benchmark/BLINK",
            revision="a3666eb249237ba3d5eca8db21176cc47967e040",
            split="val",
            counts=BLINK_COUNTS,
            item=read_blink,
        ),
        _hrbench("4k"),
        _hrbench("8k"),
        Benchmark(
            name="mmerealworld_lite",
            dataset="yifanzhang114/MME-RealWorld-lite-lmms-eval",
            revision="f6b0dc81ba4d3c39bd9b4e544578198d365ac084",
            split="train",
            counts={"": 1919},
            item=read_mmerealworld,
        ),
        Benchmark(
            name="glyphsearch_answers",
            dataset="GlyphSearch",
            revision=None,
            split="test",
            counts={"": GLYPHSEARCH_COUNT},
            item=read_glyphsearch,
            instruction="",
            scorers=("exact",),
            rows=lambda: [{"index": index} for index in range(GLYPHSEARCH_COUNT)],
        ),
    )
}
