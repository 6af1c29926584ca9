"""Which tile every layer gets: the fastest pipeline of a number of DSP slices, or the smallest that is fast enough.

For every interval that the pipeline could have, each layer may take the tiles that keep up with it; which of them is a
multiple-choice knapsack (`sparsecomp.planner.knapsack`), of latency under DSP slices or the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2

import torch

from sparsecomp.hls.kernel import Schedule, Tile, schedule, tiles, trips_of
from sparsecomp.hls.network import Linear, Lookup, Network, Pool, Shape
from sparsecomp.patterns import Pattern, detect
from sparsecomp.planner.knapsack import Item, solve
from sparsecomp.targets.hls import LayerCost, Part, cycles_of, linear_cost
from sparsecomp.targets.hls.cost import DEPTH, REQUANTISE_DSP

_MOST_INTERVALS = 24


@dataclass(frozen=True)
class Option:
    """One way to build a layer.

    Attributes:
        pattern: that the tile is for.
        tile: of a linear, None for other layers.
        trips: for every vector.
        cost: of it.
    """

    pattern: str
    tile: Tile | None
    trips: int
    cost: LayerCost


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
    def dsp(self) -> int:
        """DSP slices of all layers."""
        return sum(option.cost.dsp for option in self.options)

    @property
    def bram(self) -> int:
        """Block RAMs of all layers."""
        return sum(option.cost.bram for option in self.options)

    @property
    def cycles(self) -> tuple[int, int]:
        """Of one call, and between calls."""
        return _cycles(self.network, self.options)

    def table(self) -> str:
        """A line for every layer, in Markdown."""
        lines = ["| layer | pattern | multipliers | interval | DSP | BRAM |", "| --- | --- | --- | --- | --- | --- |"]
        for layer, option in zip(self.network.layers, self.options, strict=True):
            count = option.tile.rows * option.tile.lanes if option.tile else 0
            form = option.pattern or type(layer).__name__.lower()
            cells = (layer.name.replace("|", " "), form, count, option.cost.interval, option.cost.dsp, option.cost.bram)
            lines.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(lines)

    def __str__(self) -> str:
        cycles, interval = self.cycles
        return (
            f"{self.table()}\n{self.dsp} of {self.part.dsp} DSP slices and {self.bram} of {self.part.bram} block RAMs "
            f"of {self.part.name}; {cycles} cycles for a call, {interval} between calls (predicted)"
        )


def options_of(layer: Linear | Pool | Lookup, shape: Shape, patterns: Sequence[str] | None = None) -> list[Option]:
    """Ways to build a layer that reads a stream of a shape, without those that another beats in every respect.

    Args:
        layer: to build.
        shape: of what it reads.
        patterns: printed patterns that may be used; every one that the weight satisfies if None.
    """
    out = layer.out(shape)
    if isinstance(layer, Lookup):
        return [Option("", None, 1, LayerCost(out.vectors, out.width, 1, False, 0, 0))]
    if isinstance(layer, Pool):
        interval = layer.patches.taps * shape.width
        dsp = REQUANTISE_DSP if layer.requantise is not None else 0
        return [Option("", None, interval, LayerCost(out.vectors, interval, interval + DEPTH, True, dsp, 0))]
    found = []
    for pattern in _patterns(layer, patterns):
        found += [linear_option(layer, out, pattern, tile) for tile in tiles(pattern, *layer.weight.shape)]
    kept: list[Option] = []
    for option in sorted(found, key=_rank):
        if not kept or option.cost.interval < kept[-1].cost.interval or option.cost.after < kept[-1].cost.after:
            kept.append(option)
    return kept


def _rank(option: Option) -> tuple[int, int, int, int]:
    """Among equals the least multiplexing comes first: rows that share their inputs share what chooses them."""
    choices = option.tile.multiplexers * option.tile.m if option.tile else 0
    return option.cost.dsp, option.cost.interval, option.cost.after, choices


def _patterns(layer: Linear, allowed: Sequence[str] | None) -> list[Pattern]:
    found = [Pattern("dense"), *(found.pattern for found in detect(torch.from_numpy(layer.weight)))]
    if allowed is None:
        return list(dict.fromkeys(found))
    wanted = [Pattern.parse(text) for text in allowed]
    return [pattern for pattern in dict.fromkeys(found) if _allowed(pattern, wanted)] or found[:1]


def _allowed(pattern: Pattern, wanted: Sequence[Pattern]) -> bool:
    """Of its own kind: dense and unstructured admit every weight, but a tile for them is another design."""
    return any(each.kind == pattern.kind and each.admits(pattern) for each in wanted)


def linear_option(layer: Linear, out: Shape, pattern: Pattern, tile: Tile) -> Option:
    """A linear in a tile of a pattern.

    Args:
        layer: to build; its weight need not satisfy the pattern, but then it takes more trips.
        out: the stream that it gives.
        pattern: that the tile is for.
        tile: of its loop.
    """
    trips = trips_of(layer.weight, tile)
    select = tile.multiplexers * ceil(log2(tile.m)) if tile.m > 1 else 0
    cost = linear_cost(
        vectors=out.vectors,
        width=layer.weight.shape[1],
        outputs=layer.weight.shape[0],
        trips=trips,
        rows=tile.rows,
        multipliers=tile.rows * tile.lanes,
        whole=layer.patches is not None or layer.order is not None,
        rom_bits=trips * (8 * tile.rows * tile.lanes + select),
    )
    return Option(str(pattern), tile, trips, cost)


def _cycles(network: Network, options: Sequence[Option]) -> tuple[int, int]:
    return cycles_of([option.cost for option in options], network.shape.values, network.shape.vectors)


def design(
    network: Network,
    part: Part,
    *,
    max_dsp: int | None = None,
    max_cycles: int | None = None,
    patterns: Sequence[str] | None = None,
) -> Design:
    """Choose the tile of every layer.

    Args:
        network: to build.
        part: to build it on.
        max_dsp: DSP slices that it may take; those of the part if None.
        max_cycles: that a call may take; then the fewest DSP slices are sought, otherwise the fewest cycles.
        patterns: printed patterns that may be used.

    Raises:
        ValueError: no choice fits; the message names the layer that needs most, or the least cycles.
    """
    limit = part.dsp if max_dsp is None else min(max_dsp, part.dsp)
    classes = [
        options_of(layer, shape, patterns) for layer, shape in zip(network.layers, network.shapes(), strict=False)
    ]
    least = [min(option.cost.dsp for option in options) for options in classes]
    if sum(least) > limit:
        worst = max(range(len(least)), key=lambda at: least[at])
        raise ValueError(
            f"the design needs {sum(least)} DSP slices at least, {sum(least) - limit} more than the {limit} given; "
            f"layer {network.layers[worst].name!r} needs most, {least[worst]}"
        )
    best = _fastest(network, classes, limit)
    if max_cycles is not None:
        if _cycles(network, best)[0] > max_cycles:
            raise ValueError(
                f"a call takes {_cycles(network, best)[0]} cycles on {limit} DSP slices, more than the {max_cycles} "
                f"given"
            )
        best = _smallest(network, classes, max_cycles, best)
    schedules = [
        schedule(layer.weight, option.tile) if isinstance(layer, Linear) and option.tile is not None else None
        for layer, option in zip(network.layers, best, strict=True)
    ]
    made = Design(network, best, schedules, part)
    if made.bram > part.bram:
        worst = max(range(len(best)), key=lambda at: best[at].cost.bram)
        raise ValueError(
            f"the design needs {made.bram} block RAMs of 36 Kbit, {made.bram - part.bram} more than {part.name} has; "
            f"layer {network.layers[worst].name!r} needs most, {best[worst].cost.bram}"
        )
    return made


def _intervals(classes: Sequence[Sequence[Option]]) -> list[int]:
    """Cycles of a call that the slowest layer may take, fewest first; thinned where there are many."""
    spans = sorted({_span(option) for options in classes for option in options})
    feasible = [span for span in spans if all(any(_span(option) <= span for option in each) for each in classes)]
    step = -(-len(feasible) // _MOST_INTERVALS)
    return feasible[::step]


def _span(option: Option) -> int:
    return option.cost.vectors * option.cost.interval


def _fastest(network: Network, classes: Sequence[Sequence[Option]], limit: int) -> list[Option]:
    found = []
    for span in _intervals(classes):
        within = [[option for option in options if _span(option) <= span] for options in classes]
        items = [[Item(_own(option), option.cost.dsp) for option in options] for options in within]
        picked = solve(items, limit)
        if picked is not None:
            found.append([options[at] for options, at in zip(within, picked, strict=True)])
    if not found:  # intervals were thinned: the slowest of all is always possible
        found.append([min(options, key=lambda option: option.cost.dsp) for options in classes])
    return min(found, key=lambda options: (_cycles(network, options)[0], sum(option.cost.dsp for option in options)))


def _smallest(
    network: Network, classes: Sequence[Sequence[Option]], cycles: int, fastest: list[Option]
) -> list[Option]:
    found = [fastest]
    for span in _intervals(classes):
        within = [[option for option in options if _span(option) <= span] for options in classes]
        items = [[Item(option.cost.dsp, _own(option)) for option in options] for options in within]
        slowest = [max(options, key=_span) for options in within]
        shared = _cycles(network, slowest)[0] - sum(map(_own, slowest))
        picked = solve(items, cycles - shared)
        if picked is not None:
            chosen = [options[at] for options, at in zip(within, picked, strict=True)]
            if _cycles(network, chosen)[0] <= cycles:
                found.append(chosen)
    return min(found, key=lambda options: (sum(option.cost.dsp for option in options), _cycles(network, options)[0]))


def _own(option: Option) -> int:
    """What a layer adds to a call's cycles: of one that waits for a picture all of it, else what follows its input."""
    return option.cost.after + (_span(option) if option.cost.whole else 0)
