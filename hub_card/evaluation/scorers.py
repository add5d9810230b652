"""Finding the letter in what a model wrote, and the scores of a benchmark.

`authors` and `authors_table` repeat the paper's released evaluation with its faults, for numbers that compare with the
paper's; `strict` takes a letter only where it is given as the answer. Each scorer takes what the model wrote and the
options' texts, and returns the letter, of GlyphSearch the glyph, of GQA the word or phrase. An answer without a letter, `None`, is unparsed: it
counts as an answer, and it is wrong.
"""

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence

from .benchmarks import LETTERS, Benchmark
from .statistics import proportion


def score_authors(text: str, options: Sequence[str]) -> str | None:
    """The authors' scorer: of what follows the last `<answer>`, or of everything, the first letter A to E in any case.

    "The answer is B" is scored as E, and without `<answer>` so is every answer after a token such as `<|eovt|>`: like the
    authors, give it the text with its special tokens.
    """
    letter = re.search(f"[{LETTERS}]", tagged(text) or text, re.IGNORECASE)
    return letter and letter.group().upper()


def score_authors_table(text: str, options: Sequence[str]) -> str | None:
    """The scorer of the authors' table script: the first character after the last `<answer>`, or of everything."""
    letter = tagged(text)[:1]
    return letter if letter and letter in LETTERS else None


def tagged(text: str) -> str:
    """What stands between the last `<answer>` and `</answer`, or where they are missing, the text's start and end."""
    return text.split("<answer>")[-1].split("</answer")[0].strip()


def score_strict(text: str, options: Sequence[str]) -> str | None:
    """Takes a letter that is given as the answer: alone, before an option's text, or as in "the answer is B".

    Special tokens and Markdown are ignored. Where different letters are given, none is taken. The letter of an option
    that the item doesn't have is taken, and wrong. The full text of exactly one option counts as its letter.
    """
    text = tagged(plain(text))
    letters = {letter.upper() for letter in given_letters(text)}
    if not letters and text:
        letters = {letter for letter, option in zip(LETTERS, options) if bare(plain(option)) == bare(text)}
    return letters.pop() if len(letters) == 1 else None


def score_exact(text: str, options: Sequence[str]) -> str | None:
    """Takes an option's text where nothing else stands but special tokens."""
    answer = plain(text).strip()
    return answer if answer in options else None


def score_exact_match(text: str, options: Sequence[str]) -> str | None:
    """Takes an option, as it is written there, that the answer equals but for case and punctuation; else the answer itself.

    As lmms-eval's `exact_match` with `ignore_case` and `ignore_punctuation`; special tokens and the `<answer>` tags are ignored.
    """
    answer = tagged(plain(text))
    return next((option for option in options if unpunctuated(option) == unpunctuated(answer)), answer or None)


def unpunctuated(text: str) -> str:
    """The text in lower case, without punctuation, its words one space apart."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def plain(text: str) -> str:
    """The text behind thoughts in words, without special tokens such as `<|eovt|>`, Markdown's emphasis, LaTeX around a letter."""
    text = text.rpartition("</think>")[2]
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


SCORERS = {
    "authors": score_authors,
    "authors_table": score_authors_table,
    "strict": score_strict,
    "exact": score_exact,
    "exact_match": score_exact_match,
}


def summarise_verdicts(benchmark: Benchmark, samples: Sequence[dict], scorer: str) -> dict:
    """The scores that a scorer gives on a benchmark, each with its 95 % Wilson interval.

    Args:
        samples (`Sequence[dict]`): Rows of `samples.jsonl`; with a limit, of some items.

    Returns:
        `dict`: The `accuracy` over all items; how many are `unparsed`; for each kind of group, e.g. `category`, the
        accuracy of each, or where only whole groups count (`pair`, `cycle`), the share of the complete ones that are
        right in every item.

    Raises:
        ValueError: An item twice, or groups that can't be those of the data set.
    """
    if twice := [item for item, count in Counter(sample["id"] for sample in samples).items() if count > 1]:
        raise ValueError(f"{benchmark.name}: scored twice: {some(twice)}.")
    verdicts = [sample["verdicts"][scorer] for sample in samples]
    result = {
        "accuracy": proportion([verdict["correct"] for verdict in verdicts]),
        "unparsed": sum(verdict["letter"] is None for verdict in verdicts),
    }
    for kind in samples[0]["groups"]:
        groups: dict[str, list[bool]] = {}
        for sample, verdict in zip(samples, verdicts):
            groups.setdefault(sample["groups"][kind], []).append(verdict["correct"])
        if kind in benchmark.complete:
            result[kind] = proportion(whole_groups(benchmark, kind, groups, len(samples)))
        else:
            result[kind] = {name: proportion(outcomes) for name, outcomes in sorted(groups.items())}
    return result


def whole_groups(benchmark: Benchmark, kind: str, groups: dict[str, list[bool]], items: int) -> list[bool]:
    """Of each complete group, whether all of it is right. Only a limit may leave some incomplete: else a `ValueError`."""
    size = benchmark.complete[kind]
    smallest = size if items == benchmark.total else 1
    if wrong := [name for name, outcomes in groups.items() if not smallest <= len(outcomes) <= size]:
        raise ValueError(f"{benchmark.name}: a {kind} has {size} items, but not {some(wrong)}.")
    return [all(outcomes) for outcomes in groups.values() if len(outcomes) == size]


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
