"""Rounds in which several things are measured in turns."""

from collections.abc import Iterable


def in_turns(names: Iterable[str], number: int) -> list[str]:
    """The order of a round: each begins another one, so that none is always first."""
    names = list(names)
    begin = number % len(names)
    return names[begin:] + names[:begin]
