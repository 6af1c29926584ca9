"""A plan as plain text: what it means for the model, and what every layer is to be pruned to."""

from __future__ import annotations

import shutil

from rich import box
from rich.table import Table
from rich.text import Text

from sparsecomp.planner.budget import milliseconds
from sparsecomp.planner.plan import Plan, SiteChoice
from sparsecomp.report.table import plain

MIN_WIDTH = 60


def plan_text(plan: Plan, width: int | None = None) -> str:
    """The plan as text.

    Args:
        plan: under a budget or not.
        width: no line is longer; the terminal's if None. Below `MIN_WIDTH` it is taken as that.
    """
    if width is None:
        width = shutil.get_terminal_size((120, 24)).columns
    width = max(width, MIN_WIDTH)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in _HEADERS:
        table.add_column(heading, justify="right" if heading in _RIGHT else "left", overflow="fold")
    for site in plan:
        table.add_row(*map(Text, _cells(site)))
    return plain([*_summary(plan), *([table] if len(plan) else [])], width)


_HEADERS = ("layer", "shape", "tokens", "prune to", "runs as", "us / dense", "loss")
_RIGHT = ("tokens", "us / dense", "loss")


def _summary(plan: Plan) -> list[str]:
    lines = [f"target {plan.target}, {plan.threads} thread{'s' if plan.threads != 1 else ''}"]
    pruned = sum(bool(site.prune) for site in plan)
    lines.append(f"{pruned} of {len(plan)} sites are pruned" + (f" under a {plan.budget}" if plan.budget else ""))
    if (summary := plan.summary) is not None:
        lines.append(
            f"predicted {milliseconds(summary.planned_us)} instead of {milliseconds(summary.dense_us)} dense "
            f"({summary.speedup:.2f} times as fast); {milliseconds(summary.rest_us)} of both outside of the "
            "layers that can be pruned"
        )
        measured = "" if summary.measured_loss is None else f", measured {summary.measured_loss:.3g}"
        lines.append(f"loss ({summary.quality}): estimated {summary.estimated_loss:.3g}{measured}")
    return lines


def _cells(site: SiteChoice) -> tuple[str, ...]:
    option = next((item for item in site.options if (item.prune, item.skip) == (site.prune, site.skip)), None)
    dense = site.dense_us
    us = option.us if option is not None else site.chosen_us
    return (
        site.name or "(model)",
        f"{site.shape[1]} to {site.shape[0]}",
        f"{site.tokens}{'*' if site.dynamic else ''}",
        " ".join(str(part) for part in (site.prune, site.skip) if part),
        str(site.chosen),
        "" if dense is None or us is None else f"{us:.0f} / {dense:.0f}",
        "" if option is None else f"{option.loss:.2g}",
    )
