"""Chains of shapes: each hop leads from one shape of a scene to another, and a question asks for the glyph at the end.

A hop of *kinship* leads to the only other shape of the same colour, or to the only other one of the same form. A
*spatial* hop leads to the next shape on one side, if it is the only one there. No chain visits a shape twice.
"""

from collections.abc import Iterable, Sequence


# Where a spatial hop leads, seen from the shape that it starts at: (rows down, columns right).
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
# What two shapes share: an index of their names.
KINSHIP = {"of the same colour as": 0, "of the same form as": 1}
CHAIN_KINDS = ("kinship", "spatial")

Cell = tuple[int, int]  # row, column
Name = tuple[str, str]  # colour, form
Chain = tuple[tuple[str, ...], tuple[int, ...]]  # the words of its hops; the indices of its shapes, one more


def neighbour(cell: Cell, occupied: Iterable[Cell], relation: str) -> Cell | None:
    """The occupied cell next to `cell`, if it is the only one on that side of it in its row or column."""
    down, right = RELATIONS[relation]
    row, column = cell
    next_cell = (row + down, column + right)
    on_that_side = [
        (other_row, other_column)
        for other_row, other_column in occupied
        if (other_row - row) * down + (other_column - column) * right > 0
        and (other_column == column if down else other_row == row)
    ]
    return next_cell if on_that_side == [next_cell] else None


def find_hops(kind: str, cells: Sequence[Cell], names: Sequence[Name]) -> list[list[tuple[str, int]]]:
    """For each shape the hops that start at it: their words, e.g. `"left of"`, and where they lead."""
    if kind == "spatial":
        next_cells = [[(words, neighbour(cell, cells, words)) for words in RELATIONS] for cell in cells]
        return [[(words, cells.index(cell)) for words, cell in hops if cell is not None] for hops in next_cells]
    hops = []
    for index, name in enumerate(names):
        alike = {
            words: [other for other in range(len(names)) if other != index and names[other][part] == name[part]]
            for words, part in KINSHIP.items()
        }
        hops.append([(words, others[0]) for words, others in alike.items() if len(others) == 1])
    return hops


def find_chains(kind: str, cells: Sequence[Cell], names: Sequence[Name], length: int) -> list[Chain]:
    """All chains of so many hops; of length 0 one for each shape."""
    hops = find_hops(kind, cells, names)
    chains = [((), (start,)) for start in range(len(cells))]
    for _ in range(length):
        chains = [
            ((*words, more), (*path, index))
            for words, path in chains
            for more, index in hops[path[-1]]
            if index not in path
        ]
    return chains


def chain_text(words: Sequence[str], start: str) -> str:
    """The question, e.g. `"Which glyph is on the shape left of the shape above the red circle?"`."""
    return "Which glyph is on " + "".join(f"the shape {hop} " for hop in reversed(words)) + f"the {start}?"
