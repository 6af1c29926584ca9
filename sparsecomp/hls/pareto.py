"""The Pareto front of a network on a device: the least latency for every number of DSP slices, and its picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from sparsecomp.hls.choice import front as choose
from sparsecomp.hls.design import Design, Option, call_of, options_of
from sparsecomp.targets.hls import Cells


@dataclass(frozen=True)
class Point:
    """One end of a trade: no design of so many slices takes fewer cycles, as predicted.

    Attributes:
        cells: that it takes.
        cycles: of one call.
        interval: cycles between calls.
        options: of every layer.
    """

    cells: Cells
    cycles: int
    interval: int
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Front:
    """Points of a Pareto front, fewest slices first.

    Attributes:
        points: slices rise and cycles fall from one to the next.
        clock_ns: nanoseconds of a cycle.
        chosen: the design that the front belongs to.
    """

    points: tuple[Point, ...]
    clock_ns: float
    chosen: Design

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __str__(self) -> str:
        from sparsecomp.report.table import plain

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for heading in ("DSP", "LUT", "FF", "block RAM", "cycles", "latency"):
            table.add_column(heading, justify="right")
        for point in self.points:
            cells = point.cells
            row = [f"{cells.dsp}", f"{cells.lut:.0f}", f"{cells.ff:.0f}", f"{-(-cells.ramb18 // 2)}", f"{point.cycles}"]
            table.add_row(*row, f"{point.cycles * self.clock_ns / 1e6:.3g} ms")
        return plain([table], 80)

    def plot(self, axes: Any = None) -> Any:
        """Draw the front with matplotlib: latency over DSP slices, both in powers of ten, with the chosen design.

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
            axes = Figure(figsize=(6.4, 4.0), layout="constrained").add_subplot(xscale="log", yscale="log")
        milliseconds = self.clock_ns / 1e6
        slices = [point.cells.dsp for point in self.points]
        axes.plot(slices, [point.cycles * milliseconds for point in self.points], marker=".", label="best designs")
        axes.plot([self.chosen.dsp], [self.chosen.cycles[0] * milliseconds], "o", label="this design")
        axes.set_xlabel(f"DSP slices, of {self.chosen.part.cells.dsp} of {self.chosen.part.name}")
        axes.set_ylabel(f"predicted latency of a call in ms, at {self.clock_ns:g} ns a cycle")
        axes.legend()
        return axes


def front(design: Design, *, clock_ns: float = 5.0, points: int = 16, patterns: Sequence[str] | None = None) -> Front:
    """The fastest designs of a network within its part, for numbers of slices in equal ratios.

    Args:
        design: whose network is built.
        clock_ns: nanoseconds of a cycle.
        points: numbers of slices that are tried, at least 2; fewer points come back where more slices do not help.
        patterns: printed patterns that may be used; every one that a weight satisfies if None.

    Raises:
        ValueError: fewer than 2 points.
    """
    if points < 2:
        raise ValueError(f"a front has at least 2 points, asked for {points}")
    network = design.network
    layers = zip(network.layers, network.shapes(), strict=False)
    classes = [options_of(layer, shape, patterns) for layer, shape in layers]
    call, found = call_of(network), []
    for places in choose(call, classes, design.part.cells, points):
        options = tuple(each[at] for each, at in zip(classes, places, strict=True))
        cycles, interval = call.cycles(options)
        found.append(Point(sum((option.cells for option in options), Cells()), cycles, interval, options))
    return Front(tuple(found), clock_ns, design)
