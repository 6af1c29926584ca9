"""Schedules: how a packed weight is cut for the caches, and which variant of a kernel a call takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsecomp.kernels.gathered import GatherSchedule
from sparsecomp.kernels.panel import PanelSchedule
from sparsecomp.patterns.quads import MOST_COLUMNS
from sparsecomp.targets.cpu.level import Level

# Cost of a kept weight beside its multiply-adds, in vectors of tokens: its part of the loads of weights and indices.
ROW_STEP_COST = 0.3
# The same for a kept column of a panel, in tokens: the weights' own loads.
PANEL_STEP_COST = 0.7
_LINE = 16  # floats
_SMALL_L1 = 32768
L2_SHARE = 0.5
"""Share of the L2 cache that waiting sums may take."""
ROW_VECTORS = (1, 2, 3, 4)
"""Vectors of tokens that the row kernel is built for, up to those of the level: four rows of them are in registers."""
GROUP_TOKENS = 96
"""Tokens that meet a panel while its weights are in the L2 cache."""


@dataclass(frozen=True)
class Call:
    """How one call is cut.

    Attributes:
        variant: vectors of tokens of the row kernel, or tokens of the panel kernel's register tile.
        tiles: tiles of tokens that the whole call computes, the last perhaps not full.
        splits: parts that the rows (or panels) are cut into, so that every thread has work.
        group: tokens of an item (panel kernel).
        parts: chunks of rows (or panels) that the splits are made of.
        items: work items.
    """

    variant: int
    tiles: int
    splits: int
    group: int
    parts: int
    items: int

    def share(self, threads: int) -> float:
        """The largest part of the work that one thread gets; parts are whole, so splits may be of unequal size."""
        largest = math.ceil(self.items / threads) * math.ceil(self.parts / self.splits)
        return min(1.0, largest / (self.items // self.splits * self.parts))


def spread(level: Level) -> str:
    """How the four weights of a step come into all lanes, see `sparsecomp.kernels.quads.QuadShape`.

    Measured on a Zen 5: one load and four shuffles are up to 1.25 times as fast as four broadcasts with vectors of 8
    lanes, and about equal with 4.
    """
    return "load" if level.lanes == 4 else "shuffle"


def row_packing(level: Level, shape: tuple[int, int], l1: int, nonzeros: int) -> dict[str, int]:
    """`chunk` and `block` for `QuadWeight.pack`: even chunks; even blocks of whole lines that fit the L1 cache.

    Where few entries are kept, the sums that return after each block weigh more than what larger blocks displace from
    the cache.
    """
    share = level.l1_share if 4 * nonzeros > shape[0] * shape[1] else sparse_l1_share(l1)
    columns = min(MOST_COLUMNS, int(share * l1) // (4 * level.lanes * level.vectors))
    columns = max(_LINE, columns // _LINE * _LINE)
    blocks = max(1, math.ceil(shape[1] / columns))
    return {"chunk": _chunk(level, shape[0]), "block": max(1, math.ceil(shape[1] / (blocks * _LINE))) * _LINE}


def sparse_l1_share(l1: int) -> float:
    """The share of the L1 cache for blocks of a weight that keeps a quarter of its entries or less.

    On a Zen 5 (48 KB) blocks of 0.9 of it are 3 % slower than of 0.75 at 50 % zeros, and 2 % faster at 90 %. On a Zen 4
    (32 KB) all of it is 2 to 6 % faster than 0.75 at 80 and 90 %, and 2 % than 0.9.
    """
    return 1.0 if l1 <= _SMALL_L1 else 0.9


def together(chunk: int, tile: int, l2: int) -> int:
    """Chunks whose sums wait at once, so that a block of the tile serves all of them: they share the L2 cache.

    On a Zen 5 shares of 0.2 to 1.2 of it differ by less than 2 %.
    """
    return max(1, int(L2_SHARE * l2) // (4 * tile * (chunk + 1)))


def gathers(level: Level, call: Call, outputs: int, l2: int) -> int:
    """How often a call puts each value of x into a tile."""
    chunks = math.ceil(call.parts / call.splits)
    return call.splits * math.ceil(chunks / together(_chunk(level, outputs), call.variant * level.lanes, l2))


def _chunk(level: Level, outputs: int) -> int:
    """Rows of a chunk: whole vectors, and an even number of chunks where there are several, for two or four threads."""
    chunks = math.ceil(outputs / level.chunk)
    if chunks > 1:
        chunks += chunks % 2
    return math.ceil(outputs / chunks / level.lanes) * level.lanes


def row_call(level: Level, tokens: int, shape: tuple[int, int], threads: int) -> Call:
    """The variant with the least work for the busiest thread: wide tiles cost less per token, if they are full."""
    parts = math.ceil(shape[0] / _chunk(level, shape[0]))

    def cut(vectors: int) -> Call:
        tiles = math.ceil(tokens / (vectors * level.lanes))
        splits = _splits(tiles, parts, threads)
        return Call(vectors, tiles, splits, 0, parts, tiles * splits)

    def work(call: Call) -> float:
        return call.share(threads) * call.tiles * (call.variant + ROW_STEP_COST)

    calls = [cut(v) for v in ROW_VECTORS if v <= level.vectors]
    return min(calls, key=lambda call: (work(call), -call.variant))


def _splits(tiles: int, parts: int, threads: int) -> int:
    """The fewest splits that keep all threads busy; each costs another pass over the tile's activations."""
    best, best_share = 1, 1.0
    for splits in range(1, max(1, min(parts, threads)) + 1):
        # Parts are whole chunks, so a split may be larger than its share.
        share = math.ceil(tiles * splits / threads) * math.ceil(parts / splits) / (tiles * max(parts, 1))
        if share < 0.95 * best_share or splits == 1:
            best, best_share = splits, share
    return best


def gather_schedule(level: Level) -> GatherSchedule:
    """Sixteen entries a step: enough sums to hide the latency of the multiply-add."""
    lanes = min(8, level.lanes)
    return GatherSchedule(lanes, 16 // lanes)


def panel_schedule(level: Level, v: int, tokens: int) -> PanelSchedule:
    """The register tile for panels of `v` rows with `tokens` tokens; with one token all of the panel at once."""
    lanes = min(level.lanes, v)
    vectors = v // lanes if tokens == 1 else min(2, v // lanes)
    return PanelSchedule(v, lanes, vectors, tokens, panel_width(level, v))


def panel_width(level: Level, v: int) -> int:
    """Rows of a panel whose values are stored together: those of the register tile with several tokens."""
    return min(2 * level.lanes, v)


def panel_call(level: Level, v: int, tokens: int, shape: tuple[int, int], threads: int) -> Call:
    """The register tile with the least work, and groups of tokens, or splits of the panels, for every thread."""
    tile = min((1, 2, 4, level.panel_tokens), key=lambda t: (math.ceil(tokens / t) * (t + PANEL_STEP_COST), -t))
    return panel_cut(tile, tokens, math.ceil(shape[0] / v), threads)


def panel_cut(tile: int, tokens: int, panels: int, threads: int) -> Call:
    """How so many panels and tokens are shared out, for a register tile of `tile` tokens."""
    tiles = math.ceil(tokens / tile)
    groups = max(1, math.ceil(tokens / GROUP_TOKENS))
    if groups > 1:
        groups = math.ceil(groups / threads) * threads
    group = math.ceil(tiles / groups) * tile
    groups = math.ceil(tokens / group)
    splits = 1 if groups >= threads else max(1, min(threads, panels))
    return Call(tile, tiles, splits, group, max(1, panels), groups * splits)
