"""Which way every layer is built: the fastest pipeline that a device holds, or the smallest that is fast enough.

For every interval that the pipeline could have, each layer may take the ways that keep up with it; which of them is a
multiple-choice knapsack (`sparsecomp.planner.knapsack`): latency under DSP slices, look-up tables, flip-flops and block
RAMs, or slices under latency and the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import log1p
from typing import Protocol

from sparsecomp.planner.knapsack import Item, solve
from sparsecomp.targets.hls import Cells, LayerCost, cycles_of

_MOST_INTERVALS = 24


class Way(Protocol):
    """One way to build a layer."""

    @property
    def cost(self) -> LayerCost:
        """Cycles."""

    @property
    def cells(self) -> Cells:
        """Of the device."""


Classes = Sequence[Sequence[Way]]


@dataclass(frozen=True)
class Call:
    """What a call reads.

    Attributes:
        values: of the input.
        vectors: of the input.
    """

    values: int
    vectors: int

    def cycles(self, ways: Sequence[Way]) -> tuple[int, int]:
        """Of one call, and between calls."""
        return cycles_of([way.cost for way in ways], self.values, self.vectors)


def undominated(ways: Sequence[Way]) -> list[int]:
    """Places of the ways that no other is at least as good as in every respect, fewest slices first.

    Less than a tenth of the look-up tables is no respect, and flip-flops go with them: so the ways stay a few hundred.
    """
    measures = [_measures(way) for way in ways]
    kept: list[int] = []
    for at in sorted(range(len(ways)), key=lambda at: (measures[at], ways[at].cells.lut)):
        if not any(all(a <= b for a, b in zip(measures[other], measures[at], strict=True)) for other in kept):
            kept.append(at)
    return kept


def _measures(way: Way) -> tuple[int, ...]:
    return way.cells.dsp, way.cost.interval, way.cost.after, way.cells.ramb18, int(10 * log1p(way.cells.lut))


def fastest(call: Call, classes: Classes, limits: Cells) -> list[int] | None:
    """Places of the ways of least latency, and of these those of fewest slices; None if no choice keeps the limits."""
    found = []
    for span, within in _spans(classes):
        items = [
            [Item(way.cost.after, way.cells.dsp, others=_counts(way.cells)[1:]) for way in ways] for ways in within
        ]
        picked = solve(items, limits.dsp, _counts(limits)[1:])
        if picked is not None:
            found.append(_places(classes, span, picked))
    if not found:
        return None
    best = min(found, key=lambda places: _rank(call, classes, places))
    return smallest(call, classes, limits, call.cycles(_ways(classes, best))[0], best)


def smallest(call: Call, classes: Classes, limits: Cells, cycles: float, known: list[int]) -> list[int]:
    """Places of the ways of fewest slices whose call takes some cycles at most; what is known to, if none is better."""
    found = [known]
    for span, within in _spans(classes):
        items = [[Item(way.cells.dsp, way.cost.after, others=_counts(way.cells)) for way in ways] for ways in within]
        # What a call takes beyond the sum of what follows each layer's input, where all are as slow as they may be.
        slow = [max(ways, key=lambda way: way.cost.span) for ways in within]
        shared = call.cycles(slow)[0] - sum(way.cost.after for way in slow)
        most = sum(max(way.cost.after for way in ways) for ways in within)
        picked = solve(items, min(cycles - shared, most), _counts(limits))
        if picked is not None:
            places = _places(classes, span, picked)
            if call.cycles(_ways(classes, places))[0] <= cycles:
                found.append(places)
    return min(found, key=lambda places: _rank(call, classes, places)[::-1])


def front(call: Call, classes: Classes, limits: Cells, points: int) -> list[list[int]]:
    """The fastest choices of numbers of slices, from the fewest that are possible to those of the fastest of all.

    Args:
        call: that is timed.
        classes: ways of every layer.
        limits: of all cells.
        points: numbers of slices that are tried, in equal ratios.
    """
    best = fastest(call, classes, limits)
    found = [] if best is None else [best]
    if best is not None:
        most = _total(classes, best).dsp
        least = max(1, sum(min(way.cells.dsp for way in ways) for ways in classes))
        for step in range(points - 1):
            dsp = round(least * (most / least) ** (step / (points - 1)))
            at_most = fastest(call, classes, replace(limits, dsp=dsp))
            if at_most is not None:
                found.append(at_most)
    kept: list[list[int]] = []
    for places in sorted(found, key=lambda places: _rank(call, classes, places)[::-1]):
        if not kept or _rank(call, classes, places)[0] < _rank(call, classes, kept[-1])[0]:
            kept.append(places)
    return kept


def _spans(classes: Classes) -> Iterator[tuple[int, list[list[Way]]]]:
    """Cycles of a call that the slowest layer may take, fewest first, with the ways that keep up; a few of many."""
    every = sorted({way.cost.span for ways in classes for way in ways})
    fastest_of_slowest = max(min(way.cost.span for way in ways) for ways in classes)
    possible = [span for span in every if span >= fastest_of_slowest]
    step = -(-len(possible) // _MOST_INTERVALS)
    for span in dict.fromkeys([*possible[::step], possible[-1]]):
        yield span, [[way for way in ways if way.cost.span <= span] for ways in classes]


def _places(classes: Classes, span: int, picked: Sequence[int]) -> list[int]:
    """Of ways among those that keep up with a span, among all."""
    within = [[at for at, way in enumerate(ways) if way.cost.span <= span] for ways in classes]
    return [places[at] for places, at in zip(within, picked, strict=True)]


def _counts(cells: Cells) -> tuple[float, ...]:
    return cells.dsp, cells.lut, cells.ff, cells.ramb18


def _ways(classes: Classes, places: Sequence[int]) -> list[Way]:
    return [ways[at] for ways, at in zip(classes, places, strict=True)]


def _total(classes: Classes, places: Sequence[int]) -> Cells:
    return sum((way.cells for way in _ways(classes, places)), Cells())


def _rank(call: Call, classes: Classes, places: Sequence[int]) -> tuple[int, int]:
    """Cycles, slices."""
    return call.cycles(_ways(classes, places))[0], _total(classes, places).dsp
