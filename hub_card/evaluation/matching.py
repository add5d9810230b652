"""Rules by which an answer to a row of one's own matches the row's: the same text, the same letter, the same number."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from typing import Any

from .scorers import score_strict


# Not within a word, an identifier or a number with other separators: "B2", "1.2.3" and "1,23" hold none.
NUMBER = re.compile(r"(?<![\w.,])[-+−]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?![.,]?\d)")


def find_text(text: str) -> str | None:
    """The text without spaces around it, `None` if nothing is left."""
    return text.strip() or None


def find_letter(text: str) -> str | None:
    """The letter A to E that is given as the answer, as the benchmarks' `strict` scorer takes it; `None` without one."""
    return score_strict(text, ())


def find_number(text: str) -> Decimal | None:
    """The only number in a text, written in digits; `None` where there is none, or different ones.

    Commas between thousands, a sign, decimals after a point and an exponent belong to it; a letter before it
    doesn't (`"B2"` holds no number), a unit after it may follow (`"30 kg"`, `"30kg"`, `"30 %"`).
    """
    found = {Decimal(number.replace(",", "").replace("−", "-")) for number in NUMBER.findall(text)}
    return found.pop() if len(found) == 1 else None


RULES: dict[str, Callable[[str], Any]] = {"exact": find_text, "letter": find_letter, "number": find_number}


@dataclass(frozen=True)
class Match:
    """When an answer is right: what the rule finds in it is what it finds in the row's own.

    Args:
        rule (`str`): `"exact"`: the whole text, case included, without special tokens and spaces around it. `"letter"`: the
            letter that is given as the answer, see [`find_letter`]. `"number"`: the only number, see [`find_number`].
        tolerance (`float`, *optional*): For `"number"`, how far it may be off, absolutely; 0 if left out.

    Raises:
        ValueError: An unknown rule; a tolerance for another rule, or that isn't 0 or more.
    """

    rule: str = "exact"
    tolerance: float | None = None

    def __post_init__(self):
        if self.rule not in RULES:
            raise ValueError(f"`match` must be one of {', '.join(RULES)}, got {self.rule!r}.")
        if self.tolerance is not None and self.rule != "number":
            raise ValueError(
                f"A tolerance is for numbers: leave it out, or match by 'number' instead of {self.rule!r}."
            )
        if self.tolerance is not None and not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"The tolerance must be a number from 0 on, got {self.tolerance}.")

    def find(self, text: str) -> str | Decimal | None:
        """What the rule finds in a text; `None` is unparsed, and wrong."""
        return RULES[self.rule](text)

    def verdict(self, text: str, reference: str) -> dict[str, Any]:
        """What was `found` in an answer, as text, and whether it is `correct`."""
        with localcontext(Context(traps=[])):  # an exponent without measure is a wrong number, and no error
            found, wanted = self.find(text), self.find(reference)
            correct = found is not None and wanted is not None and self._same(found, wanted)
            return {"found": None if found is None else str(found), "correct": correct}

    def _same(self, found: str | Decimal, wanted: str | Decimal) -> bool:
        # In decimals, for as floats 0.8 is more than 0.1 away from 0.7.
        return abs(found - wanted) <= Decimal(str(self.tolerance or 0)) if self.rule == "number" else found == wanted
