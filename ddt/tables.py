"""Markdown tables."""

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str | None = None) -> str:
    """Return a Markdown table with padded columns, legible as plain text too.

    align: "l" or "r" per column; None aligns the first column left and the others right.
    """
    align = align or "l" + "r" * (len(head) - 1)
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    padded = [
        [cell.rjust(width) if side == "r" else cell.ljust(width) for cell, width, side in zip(*row, strict=True)]
        for row in ((line, widths, align) for line in cells)
    ]
    rule = ["-" * (width - 1) + (":" if side == "r" else "-") for width, side in zip(widths, align, strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (padded[0], rule, *padded[1:]))
