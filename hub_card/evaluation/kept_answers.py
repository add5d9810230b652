"""Answers to rows of one's own, those of an earlier process included: what asking a model and asking a server share."""

from collections.abc import Sequence

from .harness.answers import AnswerLog
from .own_rows import OwnRow


# What the answers as the model decodes by itself are called; the other ways are keys of `INTERVENTIONS`.
USUAL = "usual"


class KeptAnswers:
    """Keeps the answers to rows, by way of asking and the row's number.

    Args:
        rows (`Sequence[OwnRow]`): What to ask.
        log (`AnswerLog`, *optional*): Where answers are written as they are given; what it holds is not asked again.
    """

    def __init__(self, rows: Sequence[OwnRow], log: AnswerLog | None = None):
        self.rows, self.log = rows, log
        self.answers: dict[tuple[str, int], dict] = {}
        if log is not None:
            self.answers = {(way, index): answer for (way, index, _), answer in log.answers.items()}

    def _missing(self, ways: Sequence[str], rows: Sequence[int]) -> list[int]:
        """Those of the rows that weren't asked in all ways."""
        return [row for row in rows if any((way, row) not in self.answers for way in ways)]

    def _keep(self, way: str, rows: Sequence[int], answers: Sequence[dict]) -> None:
        named = [{"task": way, "index": row, "repeat": 0, **answer} for row, answer in zip(rows, answers)]
        if self.log is not None:
            self.log.add(named)
        self.answers |= {(way, answer["index"]): answer for answer in named}
