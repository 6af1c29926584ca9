"""A design: for every layer the way that it is built, of all that there are, under what a device holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf

import torch

from sparsecomp.hls.choice import Call, fastest, smallest, undominated
from sparsecomp.hls.kernel import Schedule, Tile, queued_trips, schedule, tiles, trips_of
from sparsecomp.hls.network import Linear, Lookup, Network, Patches, Pool, Shape
from sparsecomp.hls.units import cells_of, linear_units, pool_units
from sparsecomp.patterns import Pattern, detect
from sparsecomp.targets.hls import Cells, LayerCost, Part, Reading, linear_cost
from sparsecomp.targets.hls.cost import POOL_DEPTH


@dataclass(frozen=True)
class Option:
    """One way to build a layer.

    Attributes:
        pattern: that the tile is for.
        tile: of a linear, None for other layers.
        trips: for every vector; of a queue the mean in its sample.
        cost: cycles.
        cells: predicted.
        serial: whether a linear requantises without a multiplier, a value in 16 cycles.
    """

    pattern: str
    tile: Tile | None
    trips: int
    cost: LayerCost
    cells: Cells
    serial: bool = False


@dataclass(frozen=True)
class Design:
    """A network with a tile for every linear.

    Attributes:
        network: as imported.
        options: chosen, one for every layer.
        schedules: of linears, None for other layers.
        part: that it is for.
    """

    network: Network
    options: Sequence[Option]
    schedules: Sequence[Schedule | None]
    part: Part

    @property
    def cells(self) -> Cells:
        """Predicted cells of all layers."""
        return sum((option.cells for option in self.options), Cells())

    @property
    def dsp(self) -> int:
        """DSP slices of all layers."""
        return self.cells.dsp

    @property
    def bram(self) -> int:
        """Block RAMs of 36 Kbit of all layers."""
        return -(-self.cells.ramb18 // 2)

    @property
    def cycles(self) -> tuple[int, int]:
        """Of one call, and between calls."""
        return call_of(self.network).cycles(self.options)

    def table(self) -> str:
        """A line for every layer, in Markdown."""
        lines = [
            "| layer | pattern | multipliers | interval | DSP | LUT | FF | BRAM | kept products / DSP / cycle |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for layer, option, made in zip(self.network.layers, self.options, self.schedules, strict=True):
            count = option.tile.rows * option.tile.lanes if option.tile else 0
            form = option.pattern or type(layer).__name__.lower()
            row = [layer.name.replace("|", " "), form, count, option.cost.interval, option.cells.dsp]
            row += [round(option.cells.lut), round(option.cells.ff), f"{option.cells.ramb18 / 2:g}"]
            kept = made.nonzeros * option.cost.vectors if made is not None else 0
            row.append(f"{kept / option.cells.dsp / self.cycles[1]:.2f}" if kept else "")
            lines.append(f"| {' | '.join(map(str, row))} |")
        return "\n".join(lines)

    def __str__(self) -> str:
        cycles, interval = self.cycles
        had = self.part.cells
        return (
            f"{self.table()}\n{self.dsp} of {had.dsp} DSP slices, {self.cells.lut:.0f} of {had.lut} LUT, "
            f"{self.cells.ff:.0f} of {had.ff} FF and {self.bram} of {had.ramb18 // 2} block RAMs of {self.part.name}; "
            f"{cycles} cycles for a call, {interval} between calls (predicted)"
        )


def call_of(network: Network) -> Call:
    """What a call of a network reads."""
    return Call(network.shape.values, network.shape.vectors)


def options_of(layer: Linear | Pool | Lookup, shape: Shape, patterns: Sequence[str] | None = None) -> list[Option]:
    """Ways to build a layer that reads a stream of a shape, without those that another beats in every respect.

    Args:
        layer: to build.
        shape: of what it reads.
        patterns: printed patterns that may be used; every one that the weight satisfies if None.
    """
    out = layer.out(shape)
    if isinstance(layer, Lookup):
        reading = Reading.of_vectors(shape.vectors, shape.width)
        cost = LayerCost(out.vectors, out.width, 1, reading)
        return [Option("", None, 1, cost, cells_of([("look_up", {})]))]
    if isinstance(layer, Pool):
        cost = LayerCost(out.vectors, shape.width, POOL_DEPTH, _windows(layer.patches, shape))
        return [Option("", None, shape.width, cost, cells_of(pool_units(layer, shape)))]
    found = []
    for pattern in _patterns(layer, patterns):
        for tile in tiles(pattern, *layer.weight.shape):
            found += linear_options(layer, shape, pattern, tile)
    return [found[at] for at in undominated(found)]


def _windows(patches: Patches, shape: Shape) -> Reading:
    """How the windows of a picture are read."""
    reach = patches.reach
    columns_out = patches.out(shape)[1]
    return Reading.of_windows(
        (shape.height, shape.columns), shape.width, reach, patches.pads, patches.strides[0], columns_out
    )


def _patterns(layer: Linear, allowed: Sequence[str] | None) -> list[Pattern]:
    found = [Pattern("dense"), *(_of_rows(found.pattern) for found in detect(torch.from_numpy(layer.weight)))]
    if allowed is None:
        return list(dict.fromkeys(found))
    wanted = [_of_rows(Pattern.parse(text)) for text in allowed]
    return [pattern for pattern in dict.fromkeys(found) if _allowed(pattern, wanted)] or found[:1]


def _of_rows(pattern: Pattern) -> Pattern:
    """N:M in place of VENOM's V:N:K:M, as there is no tile whose rows choose from the same columns."""
    return Pattern("nm", n=pattern.n, m=pattern.m) if pattern.kind == "venom" else pattern


def _allowed(pattern: Pattern, wanted: Sequence[Pattern]) -> bool:
    """Of its own kind: dense and unstructured admit every weight, but a tile for them is another design."""
    return any(each.kind == pattern.kind and each.admits(pattern) for each in wanted)


def linear_options(layer: Linear, shape: Shape, pattern: Pattern, tile: Tile) -> list[Option]:
    """A linear in a tile of a pattern, requantised with and without a multiplier; none if its queue takes no such tile.

    Args:
        layer: to build; its weight need not satisfy the pattern, but then it takes more trips.
        shape: the stream that it reads.
        pattern: that the tile is for.
        tile: of its loop.
    """
    out, width = layer.out(shape), layer.weight.shape[1]
    if layer.skip is not None:
        trips = queued_trips(layer.weight, tile, layer.skip.stays)
        stored = -(-len(layer.weight) // tile.rows) * -(-width // tile.word)
    else:
        trips = stored = trips_of(layer.weight, tile)
    if trips is None:
        return []
    if layer.patches is not None:
        reading, chunks = _windows(layer.patches, shape), shape.width
    else:
        reading, chunks = Reading.of_vectors(shape.vectors, shape.width, layer.order is not None), width
    return [
        Option(
            str(pattern),
            tile,
            trips,
            linear_cost(
                vectors=out.vectors,
                reading=reading,
                chunks=chunks,
                outputs=layer.weight.shape[0],
                trips=trips,
                rows=tile.rows,
                serial=serial,
            ),
            cells_of(linear_units(layer, shape, tile, stored, serial)),
            serial,
        )
        for serial in (False, True)
    ]


def design(
    network: Network,
    part: Part,
    *,
    max_dsp: int | None = None,
    max_cycles: int | None = None,
    max_interval: int | None = None,
    patterns: Sequence[str] | None = None,
) -> Design:
    """Choose the tile of every layer: the fewest cycles of a call, or the fewest DSP slices that keep given cycles.

    Args:
        network: to build.
        part: to build it on.
        max_dsp: DSP slices that it may take; those of the part if None.
        max_cycles: that a call may take.
        max_interval: cycles between calls, which no layer may exceed.
        patterns: printed patterns that may be used.

    Raises:
        ValueError: no choice fits; the message names the layer that needs most, or the least cycles.
    """
    limits = part.cells if max_dsp is None else replace(part.cells, dsp=min(max_dsp, part.cells.dsp))
    classes = [
        options_of(layer, shape, patterns) for layer, shape in zip(network.layers, network.shapes(), strict=False)
    ]
    if max_interval is not None:
        classes = _within(network, classes, max_interval)
    _check(network, classes, limits, part)
    call = call_of(network)
    best = fastest(call, classes, limits)
    if best is None:
        raise ValueError(_all_at_once(network, classes, limits, part))
    options = [each[at] for each, at in zip(classes, best, strict=True)]
    if max_cycles is not None and call.cycles(options)[0] > max_cycles:
        raise ValueError(
            f"a call takes {call.cycles(options)[0]} cycles on {limits.dsp} DSP slices of {part.name}, more than "
            f"the {max_cycles} given"
        )
    if max_cycles is not None or max_interval is not None:
        best = smallest(call, classes, limits, inf if max_cycles is None else max_cycles, best)
        options = [each[at] for each, at in zip(classes, best, strict=True)]
    schedules = [
        schedule(layer.weight, option.tile, layer.skip is not None)
        if isinstance(layer, Linear) and option.tile is not None
        else None
        for layer, option in zip(network.layers, options, strict=True)
    ]
    return Design(network, options, schedules, part)


def _within(network: Network, classes: Sequence[list[Option]], interval: int) -> list[list[Option]]:
    """The options that keep an interval."""
    kept = [[option for option in options if option.cost.span <= interval] for options in classes]
    for layer, options, left in zip(network.layers, classes, kept, strict=True):
        if not left:
            least = min(option.cost.span for option in options)
            raise ValueError(
                f"layer {layer.name!r} takes {least} cycles for a call at least, more than the {interval} given "
                "between calls"
            )
    return kept


def _check(network: Network, classes: Sequence[Sequence[Option]], limits: Cells, part: Part) -> None:
    """Raise where the least that the layers need of one kind of cell is more than there is."""
    for field, name, unit in _KINDS:
        least = [min(getattr(option.cells, field) for option in options) / unit for options in classes]
        limit = getattr(limits, field) / unit
        if sum(least) > limit:
            worst = max(range(len(least)), key=lambda at: least[at])
            given = "given" if getattr(part.cells, field) / unit > limit else f"that {part.name} has"
            raise ValueError(
                f"the design needs {_count(sum(least))} {name} at least, {_count(sum(least) - limit)} more than the "
                f"{_count(limit)} {given}; layer {network.layers[worst].name!r} needs most, {_count(least[worst])}"
            )


def _all_at_once(network: Network, classes: Sequence[Sequence[Option]], limits: Cells, part: Part) -> str:
    """That each kind of cell could be kept, but not all of them; with the layer that takes the largest share of one."""
    shares = [
        (min(getattr(option.cells, field) for option in options) / getattr(limits, field), at, name, field, unit)
        for field, name, unit in _KINDS
        for at, options in enumerate(classes)
        if getattr(limits, field)
    ]
    _, worst, name, field, unit = max(shares)
    had = ", ".join(f"{_count(getattr(limits, field) / unit)} {name}" for field, name, unit in _KINDS)
    needs = min(getattr(option.cells, field) for option in classes[worst]) / unit
    return (
        f"no choice of tiles keeps all of {had} at once ({part.name}); layer {network.layers[worst].name!r} takes the "
        f"largest share of one kind, {_count(needs)} {name} at least"
    )


_KINDS = (
    ("dsp", "DSP slices", 1),
    ("ramb18", "block RAMs of 36 Kbit", 2),
    ("lut", "look-up tables", 1),
    ("ff", "flip-flops", 1),
)
"""Cells by field, with how many make one of those that people count."""


def _count(amount: float) -> str:
    """In halves, rounded up."""
    return f"{ceil(2 * amount - 1e-6) / 2:.10g}"
