"""The report as plain text: a table whose lines fit the width, by rich."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sparsecomp.planner import SiteChoice
from sparsecomp.report.cells import HEADERS, SHORT_HEADERS, cells, details, short_cells

FULL_WIDTH = 170
"""From this width on the table has every column; below, reasons, patterns and costs follow as lines."""

_RIGHT = ("tokens", "density", "us / dense", "MB / dense", "MB")


def render_table(summary: Sequence[str], choices: Sequence[SiteChoice], width: int) -> str:
    """Print the summary and the sites.

    Args:
        summary: sentences above the table.
        choices: the sites.
        width: no line is longer.
    """
    parts: list[str | Padding | Table] = list(summary)
    if choices and width >= FULL_WIDTH:
        parts.append(_table(HEADERS, [cells(choice) for choice in choices], lines=True))
    elif choices:
        parts.append(_table(SHORT_HEADERS, [short_cells(choice) for choice in choices], lines=False))
        for choice in choices:
            first, *others = details(choice)
            parts += [first, *(Padding(Text(line), (0, 0, 0, 4)) for line in others)]
    if any(choice.dynamic for choice in choices):
        parts.append("* may change from call to call; the costs are for the number shown")
    return plain(parts, width)


def plain(parts: Iterable[str | Padding | Table], width: int) -> str:
    """Lines and tables as plain text."""
    # A console of its own: the user's terminal has colours and a width that do not belong in a string.
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    for part in parts:
        # Text, not str: square brackets are markup to rich, and candidates are printed with them.
        console.print(Text(part) if isinstance(part, str) else part)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, lines: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_lines=lines)
    for header in headers:
        table.add_column(header, justify="right" if header in _RIGHT else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # see plain
    return table
