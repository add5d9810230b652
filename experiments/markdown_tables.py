"""Markdown tables from rows of cells."""


def markdown(header: str, rows: list[list[str]]) -> str:
    """A table; the header's columns are separated by `|`."""
    columns = [cell.strip() for cell in header.split("|")]
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])
