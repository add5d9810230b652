"""Asking a server rows of one's own or GlyphSearch's scenes: answers alone, since neither latents nor looks come over HTTP."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import Any

from tqdm import tqdm

from ..errors import InputError
from ..glyphsearch import Question, draw_question
from ..inference.encoding import user_turn
from .chat_server import ChatServer
from .glyphsearch_accuracy import UNCHANGED, Sample, accuracy_by_kind
from .harness.answers import AnswerLog
from .kept_answers import USUAL, KeptAnswers
from .matching import Match
from .own_rows import OwnRow
from .rows_accuracy import row_sample
from .statistics import proportion


class ServerAsker(KeptAnswers):
    """Asks a server rows and keeps the answers, see [`KeptAnswers`].

    Args:
        server (`ChatServer`): The server.
        rows (`Sequence[OwnRow]`): What to ask.
        request (`dict`): Arguments of `ChatServer.answer` but the messages.
        in_flight (`int`): Requests at a time.
        log (`AnswerLog`, *optional*): Where answers are written as they come; what it holds is not asked again.
    """

    def __init__(
        self,
        server: ChatServer,
        rows: Sequence[OwnRow],
        request: dict[str, Any],
        in_flight: int,
        log: AnswerLog | None = None,
    ):
        super().__init__(rows, log)
        self.server, self.request, self.in_flight = server, request, in_flight

    def ask(self) -> None:
        """Asks all rows; a `BadRow` or an `InputError` at the first that can't be asked, with all answers that came kept."""
        missing, total = self._missing([USUAL], range(len(self.rows))), len(self.rows)
        with (
            ThreadPoolExecutor(self.in_flight) as pool,
            tqdm(total=total, initial=total - len(missing), desc=USUAL, unit="row") as bar,
        ):
            asked = {pool.submit(self._ask_one, row): row for row in missing}
            try:
                for answer in as_completed(asked):
                    if answer.exception():
                        break
                    self._keep(USUAL, [asked.pop(answer)], [answer.result()])
                    bar.update()
            finally:  # also after Ctrl+C: what was asked for is kept
                in_flight = [answer for answer in asked if not answer.cancel()]
                wait(in_flight)
                for answer in in_flight:
                    if not answer.exception():
                        self._keep(USUAL, [asked[answer]], [answer.result()])
            for answer in in_flight:  # in the order of the rows
                answer.result()

    def samples(self, task: str, match: Match) -> list[dict[str, Any]]:
        """The rows of `samples.jsonl`, once all are asked."""
        kept = ("text", "tokens", "finish_reason")
        return [row_sample(task, row, self.answers[USUAL, index], kept, match) for index, row in enumerate(self.rows)]

    def _ask_one(self, row: int) -> dict:
        try:
            return self.server.answer(self.rows[row].conversation(), **self.request)
        except InputError as error:
            raise InputError(f"{error}; asked for: row {self.rows[row].id}") from error


def summarise_answers(samples: Sequence[dict], match: Match) -> dict[str, Any]:
    """How many answers are right, unparsed, and cut at the limit of tokens."""
    verdicts = [sample["verdicts"][match.rule] for sample in samples]
    return {
        "match": {"rule": match.rule, "tolerance": match.tolerance},
        "accuracy": proportion([verdict["correct"] for verdict in verdicts]),
        "unparsed": sum(verdict["found"] is None for verdict in verdicts),
        "cut": sum(sample["finish_reason"] == "length" for sample in samples),
    }


def scene_rows(split: str, difficulty: str, limit: int) -> tuple[list[OwnRow], list[Question]]:
    """One question about each of a split's first scenes; where `glyphsearch_answers` asks the same, its id is that one's."""
    rows, questions = [], []
    for index in range(limit):
        scene, question = draw_question(split, index, difficulty)
        name = str(index) if (split, difficulty) == ("test", "default") else f"{split} {difficulty} {index}"
        rows.append(OwnRow(name, user_turn([scene.image], question.text), question.answer))
        questions.append(question)
    return rows, questions


def scenes_accuracy(samples: Sequence[dict], questions: Sequence[Question]) -> dict[str, dict]:
    """The accuracy over all scenes and by kind of question, as GlyphSearch counts it."""
    answered = [Sample(question, {UNCHANGED: sample["text"]}, {}, {}) for question, sample in zip(questions, samples)]
    return accuracy_by_kind(answered, UNCHANGED)
