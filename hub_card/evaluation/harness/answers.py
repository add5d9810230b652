"""The answers of a run, on disk as soon as they are given: what makes a run resumable."""

import json
from pathlib import Path

from ...errors import InputError


class AnswerLog:
    """The answers in a folder, one JSON line each; every process appends to a file of its own and reads all of them.

    Args:
        folder (`Path`): Where the files `answers.rank*.jsonl` lie; made if need be.
        settings (`dict`): What the answers depend on. They are the first line of each file.
        rank (`int`): This process.

    Raises:
        InputError: The folder holds answers that were given under other settings, or a damaged line.
    """

    def __init__(self, folder: Path, settings: dict, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.settings = folder, settings
        self.answers = {}  # by task, position in the data, and repeat
        self.read()
        path = folder / f"answers.rank{rank}.jsonl"
        self._file = path.open("ab")
        kept = whole_lines(path)
        self._file.truncate(len(kept))
        if not kept:
            self._write([{"settings": settings}])

    def read(self):
        """Reads the answers of all processes."""
        for path in sorted(self.folder.glob("answers.rank*.jsonl")):
            try:
                rows = [json.loads(line) for line in whole_lines(path).splitlines()]
            except ValueError as error:
                raise InputError(f"{path}: a line is damaged ({error}); delete the file") from error
            found = rows.pop(0)["settings"] if rows else self.settings
            for name in sorted(self.settings | found):
                if self.settings.get(name) != found.get(name):
                    raise InputError(
                        f"{path}: holds answers given with {name} = {found.get(name)!r}, not "
                        f"{self.settings.get(name)!r}; choose another output folder, or delete this one"
                    )
            self._remember(rows)

    def get(self, task: str, index: int, repeat: int, question: str) -> dict | None:
        """An item's answer, or `None`; an `InputError` if it answers another question, since the data changed."""
        answer = self.answers.get((task, index, repeat))
        if answer is not None and answer["question"] != question:
            raise InputError(
                f"{self.folder}: item {index} of {task} was another question when it was answered; choose another output "
                "folder, or delete this one"
            )
        return answer

    def add(self, answers: list[dict]):
        """Writes answers down; each has the keys `task`, `index` and `repeat`."""
        self._write(answers)
        self._remember(answers)

    def _write(self, rows: list[dict]):
        self._file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file.flush()

    def _remember(self, answers: list[dict]):
        self.answers |= {(answer["task"], answer["index"], answer["repeat"]): answer for answer in answers}


def whole_lines(path: Path) -> bytes:
    """A file's content up to its last line's end; a process that was killed may have left half a line."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]
