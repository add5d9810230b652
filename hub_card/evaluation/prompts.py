"""What is asked: the text after the pictures, worded as the paper's authors did in their released evaluation."""

from collections.abc import Sequence


LETTERS = "ABCDE"
# What each protocol adds to the question.
PROTOCOLS = {"authors": "\nAnswer with the option's letter from the given choices directly.", "bare": ""}


def prompt(question: str, protocol: str = "authors") -> str:
    """The text that follows the pictures in the user's turn.

    Args:
        question (`str`): The item's question, with its options.
        protocol (`str`): A key of `PROTOCOLS`.

    Raises:
        ValueError: An unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"Unknown protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}.")
    return question + PROTOCOLS[protocol]


def with_options(question: str, options: str) -> str:
    """A question and its options, already formatted."""
    return f"{question}\nOptions:\n{options}"


def mmvp_question(question: str, options: str) -> str:
    """MMVP's `"(a) Open (b) Closed"` on one line as `"A. Open B. Closed"`; a label in the question changes as well."""
    return with_options(question, options).replace("(a)", "A.").replace("(b)", "B.")


def lettered(options: Sequence[str]) -> str:
    """One option a line: `"A. red"`."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
