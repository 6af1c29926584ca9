"""The Pareto front of a plan: the least estimated loss at every latency, solved along the budgets, and its picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from sparsecomp.planner.budget import Budget, milliseconds
from sparsecomp.planner.plan import Plan
from sparsecomp.planner.select import groups_of, least_us, select


@dataclass(frozen=True)
class Point:
    """One end of a trade: no option is faster at this loss, or loses less at this latency.

    Attributes:
        us: predicted microseconds of one call of the model.
        speedup: over the dense model.
        loss: estimated.
        plan: that gives it.
    """

    us: float
    speedup: float
    loss: float
    plan: Plan


@dataclass(frozen=True)
class Front:
    """Points of a Pareto front, fastest first.

    Attributes:
        points: latency rises and loss falls from one to the next.
        quality: what the loss is.
        chosen: the plan that the front belongs to.
    """

    points: tuple[Point, ...]
    quality: str
    chosen: Plan

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __str__(self) -> str:
        from sparsecomp.report.table import plain

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for heading in ("latency", "times as fast", f"estimated loss ({self.quality})"):
            table.add_column(heading, justify="right")
        for point in self.points:
            table.add_row(milliseconds(point.us), f"{point.speedup:.2f}", f"{point.loss:.3g}")
        return plain([table], 80)

    def plot(self, axes: Any = None) -> Any:
        """Draw the front with matplotlib: loss over latency, with the plan's own choice.

        Args:
            axes: of matplotlib, to draw into; new ones if None.

        Returns:
            The axes; `axes.figure.savefig("front.png")` writes the picture.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if axes is None:
            try:
                from matplotlib.figure import Figure
            except ImportError as error:
                raise ImportError("the picture needs matplotlib: pip install 'sparsecomp[plot]'") from error
            # Not through pyplot, which would keep the figure and may want a screen.
            axes = Figure(figsize=(6.4, 4.0), layout="constrained").add_subplot()
        axes.plot([p.us / 1e3 for p in self.points], [p.loss for p in self.points], marker=".", label="best options")
        summary = self.chosen.summary
        if summary is not None:
            label = "this plan" if self.chosen.budget is None else f"this plan, {self.chosen.budget}"
            axes.plot([summary.planned_us / 1e3], [summary.estimated_loss], "o", label=label)
            axes.axvline(summary.dense_us / 1e3, linestyle=":", color="gray", label="dense")
        axes.set_xlabel("predicted latency in ms")
        axes.set_ylabel(f"estimated loss ({self.quality})")
        axes.legend()
        return axes


def front(plan: Plan, points: int) -> Front:
    """Solve for evenly spaced latencies between the fastest options and no loss; see `Plan.pareto`."""
    if points < 2:
        raise ValueError(f"a front has at least 2 points, asked for {points}")
    groups = groups_of(plan)
    summary = plan.summary
    assert summary is not None
    low = least_us(plan)
    high = summary.call_us(summary.rest_us + sum(group.options[0].us for group in groups))
    found: dict[float, Point] = {}
    for step in range(points):
        # The last digits of the sum that is the limit must not make the fastest choice infeasible.
        limit = (low + (high - low) * step / (points - 1)) * (1 + 1e-9)
        best = select(plan, Budget("max_latency", 1e-6 * limit)).summary
        assert best is not None
        # Of all choices with that loss the fastest, so that no point is dominated by a tie.
        tight = select(plan, Budget("max_quality_loss", best.estimated_loss * (1 + 1e-9)))
        summary_of = tight.summary
        assert summary_of is not None
        if not found or summary_of.estimated_loss < min(found):
            point = Point(summary_of.planned_us, summary_of.speedup, summary_of.estimated_loss, tight)
            found[point.loss] = point
    return Front(tuple(found.values()), summary.quality, plan)
