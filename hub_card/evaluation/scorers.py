"""What an answer is worth: finding the letter in what a model wrote, and the scores of a benchmark.

`authors` and `authors_table` repeat the paper's released evaluation with its faults, for numbers that compare with the
paper's; `strict` takes a letter only where it is given as the answer. An answer without a letter is unparsed: it counts
as an answer, and it is wrong. All scorers take what the model wrote, the right letter (or option), and the options' texts.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .benchmarks import Benchmark
from .prompts import LETTERS
from .statistics import proportion


@dataclass(frozen=True)
class Verdict:
    """What became of an answer.

    Args:
        letter (`str`, *optional*): The letter that was read, or GlyphSearch's glyph; `None` if there is none.
        correct (`bool`): Whether it is the right one.
    """

    letter: str | None
    correct: bool


@dataclass(frozen=True)
class Scored:
    """An item's id and groups with the verdict on its answer: what the scores are made of."""

    id: str
    groups: dict[str, str]
    verdict: Verdict


def score_authors(text: str, answer: str, options: Sequence[str] = ()) -> Verdict:
    """The authors' scorer: of what follows the last `<answer>`, or of everything, the first letter A to E in any case.

    "The answer is B" is scored as E, and without `<answer>` so is every answer after a token such as `<|eovt|>`: like the
    authors, give it the text with its special tokens.
    """
    letter = re.search(f"[{LETTERS}]", tagged(text) or text, re.IGNORECASE)
    letter = letter and letter.group().upper()
    return Verdict(letter, letter == answer)


def score_authors_table(text: str, answer: str, options: Sequence[str] = ()) -> Verdict:
    """The scorer of the authors' table script: the first character after the last `<answer>`, or of everything."""
    letter = tagged(text)[:1]
    letter = letter if letter and letter in LETTERS else None
    return Verdict(letter, letter == answer)


def tagged(text: str) -> str:
    """What stands between the last `<answer>` and `</answer`, or where they are missing, the text's start and end."""
    return text.split("<answer>")[-1].split("</answer")[0].strip()


def score_strict(text: str, answer: str, options: Sequence[str] = ()) -> Verdict:
    """Takes a letter that is given as the answer: alone, before an option's text, or as in "the answer is B".

    Special tokens and Markdown are ignored. Where different letters are given, none is taken. The letter of an option
    that the item doesn't have is taken, and wrong. The full text of exactly one option counts as its letter.
    """
    text = tagged(plain(text))
    letters = {letter.upper() for letter in given_letters(text)}
    if not letters and text:
        letters = {letter for letter, option in zip(LETTERS, options) if bare(plain(option)) == bare(text)}
    letter = letters.pop() if len(letters) == 1 else None
    return Verdict(letter, letter == answer)


def score_exact(text: str, answer: str, options: Sequence[str]) -> Verdict:
    """Takes an option's text where nothing else stands but special tokens."""
    said = plain(text).strip()
    option = said if said in options else None
    return Verdict(option, option == answer)


def plain(text: str) -> str:
    """The text without special tokens such as `<|eovt|>`, Markdown's emphasis, and LaTeX around a letter."""
    text = re.sub(r"<\|[^<>|]*\|>", " ", text)
    text = re.sub(r"\\(?:boxed|text|mathrm|mathbf)\b", " ", text)
    return re.sub(r"[*`$_{}]", "", text)


def bare(text: str) -> str:
    """The text for comparison: without case, without spaces and punctuation around it."""
    return text.strip(" \t\n.,;:!?\"'").casefold()


# No second letter may follow: "A or B", "(A), (B)".
ALONE = r"""(?!\s*(?:[,/&]|or\b|and\b)\s*(?:or\s+|and\s+)?["']?(?:[(\[][A-E][)\]]|(?-i:[A-E])\b))"""
# Without brackets the sentence must stop after the letter, since "the answer is a dog" holds an article.
STOP = r"(?=\s*(?:[.,;:!?)\n]|$|[-–—]\s|because\b|since\b|as\b))"
LETTER = rf"""(?:[(\[]([A-E])[)\]]|["']?\b([A-E])\b["']?{STOP}){ALONE}"""
NAMED = r"(?:the\s+)?(?:(?:option|choice|letter|answer)\s+)?"
IS = r"(?:(?:is|would\s+be|should\s+be|must\s+be)\s*:?|[:=])"

WHOLE = re.compile(rf"{NAMED}{LETTER}[\s.,;:!?)]*", re.IGNORECASE)
LEADING = re.compile(r"\(([A-E])\)\s|([A-E])(?:[.:)]\s|[ \t]*\n)", re.IGNORECASE)
LABEL = re.compile(r"\(([A-E])\)|(?:^|\bor\s|\band\s|/)\s*([A-E])[.:)](?!\w)", re.IGNORECASE | re.MULTILINE)
STATED = re.compile(
    rf"\b(?:answer|option|choice)\s*{IS}\s*{NAMED}{LETTER}"
    rf"|\bI(?:'d|\s+would)?\s+(?:choose|pick|select|go\s+with)\s+{NAMED}{LETTER}"
    r"|(?<!\bor )(?<!\bnor )(?<!\band )(?<!/)\b([A-E])\s+is\s+(?:the\s+)?"
    r"(?:correct\b|(?:right|best)\s+(?:answer|option|choice)|answer\b)",
    re.IGNORECASE,
)


def given_letters(text: str) -> Iterator[str]:
    """The letters that a text gives as its answer; after an option that leads it, also those of further options."""
    matches = [WHOLE.fullmatch(text)]
    if not matches[0]:
        matches = [LEADING.match(text)]
        matches += [*(LABEL.finditer(text) if matches[0] else ()), *STATED.finditer(text)]
    for match in filter(None, matches):
        yield next(filter(None, match.groups()))


SCORERS: dict[str, Callable[..., Verdict]] = {
    "authors": score_authors,
    "authors_table": score_authors_table,
    "strict": score_strict,
    "exact": score_exact,
}


def summarise_verdicts(benchmark: Benchmark, verdicts: Sequence[Scored]) -> dict:
    """The scores of a benchmark, each with its 95 % Wilson interval.

    Args:
        benchmark (`Benchmark`): The benchmark.
        verdicts (`Sequence[Scored]`): What became of each item; with a limit, of some.

    Returns:
        `dict`: The `accuracy` over all items; how many are `unparsed`; for each kind of group, e.g. `category`, the
        accuracy of each, or where only whole groups count (`pair`, `cycle`), the share of the complete ones that are
        right in every item.

    Raises:
        ValueError: An item twice, or groups that can't be those of the data set.
    """
    if twice := [id for id, count in Counter(scored.id for scored in verdicts).items() if count > 1]:
        raise ValueError(f"{benchmark.name}: scored twice: {some(twice)}.")
    result = {
        "accuracy": proportion([scored.verdict.correct for scored in verdicts]),
        "unparsed": sum(scored.verdict.letter is None for scored in verdicts),
    }
    for kind in dict.fromkeys(kind for scored in verdicts for kind in scored.groups):
        groups: dict[str, list[bool]] = {}
        for scored in verdicts:
            groups.setdefault(scored.groups[kind], []).append(scored.verdict.correct)
        if kind in benchmark.complete:
            result[kind] = proportion(whole_groups(benchmark, kind, groups, len(verdicts)))
        else:
            result[kind] = {name: proportion(outcomes) for name, outcomes in sorted(groups.items())}
    return result


def whole_groups(benchmark: Benchmark, kind: str, groups: dict[str, list[bool]], items: int) -> list[bool]:
    """Of each complete group, whether all of it is right; a limit leaves some incomplete, all items together none.

    Raises:
        ValueError: A group with too many items, or, of a whole benchmark, with too few.
    """
    size = benchmark.complete[kind]
    wrong = [
        name
        for name, outcomes in groups.items()
        if len(outcomes) > size or (len(outcomes) < size and items == benchmark.total)
    ]
    if wrong:
        raise ValueError(f"{benchmark.name}: a {kind} has {size} items, but not {some(wrong)}.")
    return [all(outcomes) for outcomes in groups.values() if len(outcomes) == size]


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
