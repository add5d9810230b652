"""The text after the pictures, worded as the paper's authors did in their released evaluation."""

from collections.abc import Sequence


LETTERS = "ABCDE"
INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."


def with_options(question: str, options: str) -> str:
    """A question and its options, already formatted."""
    return f"{question}\nOptions:\n{options}"


def mmvp_question(question: str, options: str) -> str:
    """MMVP's `"(a) Open (b) Closed"` on one line as `"A. Open B. Closed"`; a label in the question changes as well."""
    return with_options(question, options).replace("(a)", "A.").replace("(b)", "B.")


def lettered(options: Sequence[str]) -> str:
    """One option a line: `"A. red"`."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
