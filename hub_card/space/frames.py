"""The visitors' frames, kept on the server for the slider."""

from ..errors import InputError
from .overlay import Frame


# Bytes of memory of all visitors together; a visitor's picture and maps are some 2 MB.
MAX_MEMORY = 256 * 2**20
NO_FRAMES = "The heatmaps of this answer are gone: those of the latest visitors are kept. Ask again to see them."


class FrameStore:
    """Each visitor's frames of the last answer, the oldest dropped first; an answer that takes more alone isn't kept."""

    def __init__(self):
        self._frames: dict[str, list[Frame]] = {}  # the oldest first; one answer at a time is put

    def put(self, visitor: str, frames: list[Frame]) -> None:
        """Keeps a visitor's frames instead of those before; an empty list keeps none."""
        self._frames.pop(visitor, None)
        if frames:
            self._frames[visitor] = frames
        while self.memory() > MAX_MEMORY:
            del self._frames[next(iter(self._frames))]

    def get(self, visitor: str, number: int) -> Frame:
        """A visitor's frame, 0 for all looks and else the step; one that isn't there, or not any more, is an `InputError`."""
        frames = self._frames.get(visitor, [])
        if number not in range(len(frames)):
            raise InputError(NO_FRAMES)
        return frames[int(number)]

    def memory(self) -> int:
        """Bytes of all frames; those of one answer share their picture."""
        return sum(
            frames[0].picture.width * frames[0].picture.height * 3 + sum(frame.attention.nbytes for frame in frames)
            for frames in self._frames.values()
        )
