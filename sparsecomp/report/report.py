"""The report of `explain`: a table for the terminal, JSON for programs, HTML for sharing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sparsecomp.planner import Plan, SiteChoice
from sparsecomp.report.html import render_html
from sparsecomp.report.table import render_table

MIN_WIDTH = 60
MAX_WIDTH = 220


@dataclass
class Report:
    """What a model would become on a target.

    Attributes:
        plan: the choice for every site; `report.plan.save(path)` writes it for editing.
        target: description of the target.
        notes: what concerns the whole model, such as why a call would run dense.
        graphs: into how many graphs Dynamo cut the model.
    """

    plan: Plan
    target: str = ""
    notes: list[str] = field(default_factory=list)
    graphs: int = 1

    def __iter__(self) -> Iterator[SiteChoice]:
        return iter(self.plan)

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def rewritten(self) -> list[SiteChoice]:
        """The sites that would run sparse kernels."""
        return [choice for choice in self.plan if not choice.chosen.is_dense]

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights of the sites that would run sparse kernels."""
        return sum(choice.packed_bytes or 0 for choice in self.rewritten)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same weights as the model holds them."""
        return sum(choice.dense_bytes for choice in self.rewritten)

    @property
    def dense_us(self) -> float:
        """Microseconds of all sites if every one stayed dense, as far as known."""
        return sum(choice.dense_us or 0.0 for choice in self.plan)

    @property
    def chosen_us(self) -> float:
        """Microseconds of all sites as chosen, as far as known."""
        return sum(choice.chosen_us or 0.0 for choice in self.plan)

    def summary(self) -> list[str]:
        """The sentences above the table."""
        threads = f"{self.plan.threads} thread{'s' if self.plan.threads != 1 else ''}"
        lines = [f"target {self.target or self.plan.target}, {threads}"]
        if not len(self.plan):
            lines.append(
                "no site was found: the model has no linear layer with a constant weight that runs for these inputs"
            )
        elif not self.rewritten:
            lines.append(f"none of {_count(len(self.plan), 'site')} would run a sparse kernel")
        else:
            lines.append(f"{len(self.rewritten)} of {_count(len(self.plan), 'site')} would run sparse kernels")
            if self.chosen_us and self.dense_us:
                lines[-1] += (
                    f": {self.chosen_us:.0f} us instead of {self.dense_us:.0f} us dense "
                    f"({self.dense_us / self.chosen_us:.1f} times as fast), all sites together"
                )
            lines.append(f"their weights take {_bytes(self.packed_bytes)} packed, {_bytes(self.dense_bytes)} dense")
        if self.graphs != 1:
            lines.append(f"Dynamo cut the model into {_count(self.graphs, 'graph')}")
        return lines + [f"note: {note}" for note in self.notes]

    def to_text(self, width: int | None = None) -> str:
        """The report as plain text.

        Args:
            width: no line is longer; the terminal's if None. Below `MIN_WIDTH` it is taken as that.
        """
        if width is None:
            width = shutil.get_terminal_size((120, 24)).columns
        return render_table(self.summary(), list(self.plan), min(max(width, MIN_WIDTH), MAX_WIDTH))

    def __str__(self) -> str:
        return self.to_text()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {
            "plan": self.plan.to_dict(),
            "target_description": self.target,
            "notes": list(self.notes),
            "graphs": self.graphs,
            "sites": len(self.plan),
            "rewritten": [choice.name for choice in self.rewritten],
            "packed_bytes": self.packed_bytes,
            "dense_bytes": self.dense_bytes,
            "dense_us": self.dense_us,
            "chosen_us": self.chosen_us,
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """The report as one HTML page without scripts."""
        return render_html(self.summary(), list(self.plan))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _bytes(number: int) -> str:
    return f"{number / 1e6:.2f} MB" if number >= 100_000 else f"{number / 1e3:.1f} kB"
