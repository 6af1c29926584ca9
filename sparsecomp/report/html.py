"""The report as one HTML page: no script, no request, every text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sparsecomp.planner import SiteChoice
from sparsecomp.report.cells import HEADERS, cells

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }
table { border-collapse: collapse; }
th, td { padding: 4px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
td { white-space: pre-line; }
th { position: sticky; top: 0; background: #f4f4f4; }
tr.sparse td:nth-child(7) { color: #06622f; font-weight: 600; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818; } th { background: #262626; } th, td { border-color: #333; }
  tr.sparse td:nth-child(7) { color: #6fd69a; }
}
"""


def render_html(summary: Sequence[str], choices: Sequence[SiteChoice]) -> str:
    """The page for a summary and the sites."""
    head = "".join(f"<th>{escape(header)}</th>" for header in HEADERS)
    rows = "\n".join(_row(choice) for choice in choices)
    notes = "\n".join(f"<p>{escape(line)}</p>" for line in summary)
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>" if choices else ""
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head><meta charset="utf-8"><title>sparsecomp report</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>sparsecomp report</h1>\n{notes}\n{table}\n</body>\n</html>\n"
    )


def _row(choice: SiteChoice) -> str:
    kind = "dense" if choice.chosen.is_dense else "sparse"
    return f'<tr class="{kind}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells(choice)) + "</tr>"
