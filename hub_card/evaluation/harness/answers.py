"""The answers of a run, on disk as soon as they are given: what makes a run resumable."""

import json
from pathlib import Path

from ...errors import InputError


class AnswerLog:
    """The answers in a folder, one JSON line each; every process appends to a file of its own and reads all of them.

    Args:
        folder (`Path`): Where the files `answers.rank*.jsonl` lie; made if need be.
        settings (`dict`): What the answers depend on. They are the first line of each file.
        rank (`int`, *optional*, defaults to 0): This process.

    Raises:
        InputError: The folder holds answers that were given under other settings, or a damaged line.
    """

    def __init__(self, folder: Path, settings: dict, rank: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.settings, self._answers = folder, settings, {}
        self.read()
        own = folder / f"answers.rank{rank}.jsonl"
        kept = whole_lines(own) if own.exists() else b""
        self._file = own.open("r+b" if own.exists() else "w+b")
        self._file.truncate(len(kept))
        self._file.seek(0, 2)
        if not kept:
            self._write([{"settings": settings}])

    def read(self):
        """Reads the answers of all processes."""
        for path in sorted(self.folder.glob("answers.rank*.jsonl")):
            try:
                header, *answers = [json.loads(line) for line in whole_lines(path).splitlines()] or [None]
            except ValueError as error:
                raise InputError(f"{path}: a line is damaged ({error}); delete the file") from error
            if header is not None:
                self._check_settings(path, header["settings"])
            self._answers |= {(answer["task"], answer["index"], answer["repeat"]): answer for answer in answers}

    def _check_settings(self, path: Path, found: dict):
        for name in sorted(self.settings | found):
            if self.settings.get(name) != found.get(name):
                raise InputError(
                    f"{path}: holds answers given with {name} = {found.get(name)!r}, not {self.settings.get(name)!r}; "
                    "choose another output folder, or delete this one"
                )

    def get(self, task: str, index: int, repeat: int, question: str) -> dict | None:
        """The answer to a task's item, by its position in the data, or `None`.

        Raises:
            InputError: The answer is one to another question: the data changed.
        """
        answer = self._answers.get((task, index, repeat))
        if answer is not None and answer["question"] != question:
            raise InputError(
                f"{self.folder}: item {index} of {task} was another question when it was answered; choose another output "
                "folder, or delete this one"
            )
        return answer

    def find(self, task: str, index: int) -> dict:
        """The first answer to an item that was answered."""
        return self._answers[task, index, 0]

    def add(self, answers: list[dict]):
        """Writes answers down; each has the keys `task`, `index` and `repeat`."""
        self._write(answers)
        self._answers |= {(answer["task"], answer["index"], answer["repeat"]): answer for answer in answers}

    def _write(self, rows: list[dict]):
        self._file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file.flush()


def whole_lines(path: Path) -> bytes:
    """A file's content up to its last line's end; a process that was killed may have left half a line."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]
