"""The kernel of a linear layer on an FPGA: one tile loop that serves every pattern.

The loop has an initiation interval of one. A trip reads one word of `groups * m` consecutive inputs. Each of `rows`
outputs multiplies `groups * n` of them, n from every m, and adds the products to its sum:

    for trip:  for r in rows:  for l in groups * n:
        sum[r] += weight[trip][r][l] * word[l // n * m + select[trip][r // shared][l]]

So N:M needs `n / m` of the multipliers of a dense loop that reads as much, and an m-to-1 multiplexer before each;
rows that share their inputs share the multiplexer; with n = m = 1 there is none. Words without a nonzero take no trip,
and a word with more than n nonzeros in a group takes several: that is how blocks and unstructured weights run.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

from sparsecomp.hls.network import Integers
from sparsecomp.patterns import Pattern

MOST_MULTIPLIERS = 1024
"""Of one layer."""
MOST_WORD = 256
"""Inputs that a trip reads at most."""
_FREE = [(n, 16) for n in (1, 2, 4, 8)]
"""Groups where nonzeros lie anywhere."""


@dataclass(frozen=True)
class Tile:
    """How much of a weight a trip takes.

    Attributes:
        rows: outputs in parallel.
        groups: groups of inputs in parallel.
        n: multipliers of a group in every row.
        m: inputs of a group, which a multiplexer chooses from.
        shared: consecutive rows that share their inputs, and so the multiplexer.
    """

    rows: int
    groups: int
    n: int = 1
    m: int = 1
    shared: int = 1

    def __post_init__(self) -> None:
        if min(self.rows, self.groups, self.n, self.m, self.shared) < 1 or self.n > self.m or self.rows % self.shared:
            raise ValueError(f"no such tile: {self}; n is at most m, and shared divides rows")

    @property
    def word(self) -> int:
        """Inputs that a trip reads."""
        return self.groups * self.m

    @property
    def lanes(self) -> int:
        """Multipliers of every row."""
        return self.groups * self.n

    @property
    def multiplexers(self) -> int:
        """Choices of one of m inputs."""
        return self.rows // self.shared * self.lanes if self.m > 1 else 0


@dataclass(frozen=True)
class Schedule:
    """The trips of a weight, as read-only memories.

    Attributes:
        tile: of the loop.
        words: `[trips]`, the word that each reads.
        last: bool `[trips]`, whether it ends a group of rows.
        weights: `[trips, rows, lanes]`.
        select: `[trips, rows / shared, lanes]`, 0 to m - 1.
        row_groups: groups of rows: ceil(O / rows).
        nonzeros: products that are needed.
    """

    tile: Tile
    words: Integers
    last: npt.NDArray[np.bool_]
    weights: Integers
    select: Integers
    row_groups: int
    nonzeros: int

    @property
    def trips(self) -> int:
        """Trips for one vector."""
        return len(self.words)


def tiles(pattern: Pattern, out_features: int, in_features: int) -> list[Tile]:
    """The tiles worth a look for a weight of a pattern, of at most `MOST_MULTIPLIERS` multipliers."""
    # A trip may also take fewer of a group than the pattern keeps, and a word then takes several.
    sizes = [(n, pattern.m) for n in range(1, pattern.n + 1) if pattern.n % n == 0]
    rows_unit = pattern.v
    if pattern.kind == "unstructured":
        sizes = _FREE
    elif pattern.kind in ("dense", "block"):
        rows_unit = pattern.rows
        # Single columns of a block row lie anywhere: chosen by a multiplexer that all of its rows share.
        sizes = [(1, 1), *_FREE] if pattern.kind == "block" and pattern.cols == 1 else [(1, 1)]
    found = []
    for n, m in sizes:
        for rows in _sizes(rows_unit, max(rows_unit, out_features)):
            shared = rows_unit if m > 1 else 1
            first = pattern.cols if pattern.kind == "block" else 1
            for groups in _sizes(first, max(first, in_features // m)):
                tile = Tile(rows, groups, n, m, shared)
                if tile.rows * tile.lanes <= MOST_MULTIPLIERS and (tile.word <= MOST_WORD or groups == first):
                    found.append(tile)
    return found


def _sizes(first: int, most: int) -> list[int]:
    """`first` times powers of two, times three of these, and what divides `most`, which leaves no lane without work."""
    powers = [first]
    while powers[-1] * 2 <= most:
        powers.append(powers[-1] * 2)
    divisors = [size for size in range(first, min(most, MOST_MULTIPLIERS) + 1, first) if most % size == 0]
    return sorted({*powers, *divisors, *(size * 3 for size in powers if size * 3 <= most)})


def trips_of(weight: Integers, tile: Tile) -> int:
    """Trips for one vector, as `schedule` gives them."""
    return int(_counts(_tiled(weight, tile), tile).sum())


def queued_trips(weight: Integers, tile: Tile, stays: npt.NDArray[np.bool_]) -> int | None:
    """Trips for one vector where a queue holds the words of which an input stays; None if a word takes several.

    Args:
        weight: `[O, I]`.
        tile: of the loop.
        stays: `[samples, I]`, which inputs stayed in a sample: the mean of their trips is given, rounded up.
    """
    counts = _counts(_tiled(weight, tile), tile)
    if counts.max() > 1:
        return None
    words = np.pad(stays, ((0, 0), (0, -stays.shape[1] % tile.word))).reshape(len(stays), -1, tile.word).any(axis=2)
    # A vector of which nothing stays takes a trip of zeros.
    return ceil(len(counts) * float(np.maximum(words.sum(axis=1), 1).mean()))


def schedule(weight: Integers, tile: Tile, every: bool = False) -> Schedule:
    """The trips of a weight `[O, I]`: any weight in any tile, though only some in few trips.

    Args:
        weight: `[O, I]`.
        tile: of the loop.
        every: whether every word takes one trip in every group of rows, in order, as a queue needs it.
    """
    tiled = _tiled(weight, tile)
    counts = _counts(tiled, tile)
    if every:
        counts = np.maximum(counts, 1)
    starts = (np.cumsum(counts) - counts.reshape(-1)).reshape(counts.shape)
    trips = int(counts.sum())
    kept = _kept(tiled, tile)
    ranks = np.cumsum(kept, axis=-1) - 1 if tile.n < tile.m else np.broadcast_to(np.arange(tile.m), kept.shape)
    at, share, word, group, place = np.nonzero(kept)
    rank = ranks[at, share, word, group, place]
    trip = starts[at, word] + rank // tile.n
    lane = group * tile.n + rank % tile.n
    select = np.zeros((trips, tile.rows // tile.shared, tile.lanes), np.int64)
    select[trip, share, lane] = place
    weights = np.zeros((trips, tile.rows, tile.lanes), np.int64)
    for row in range(tile.shared):
        weights[trip, share * tile.shared + row, lane] = tiled[at, share, row, word, group, place]
    flat = counts.reshape(-1)
    words = np.repeat(np.tile(np.arange(counts.shape[1]), len(counts)), flat)
    last = np.zeros(trips, np.bool_)
    last[np.cumsum(counts.sum(axis=1)) - 1] = True
    return Schedule(tile, words, last, weights, select, len(counts), int(np.count_nonzero(weight)))


def _tiled(weight: Integers, tile: Tile) -> Integers:
    """`[row groups, rows / shared, shared, words, groups, m]`, padded with zeros."""
    rows, cols = (-size % part for size, part in zip(weight.shape, (tile.rows, tile.word), strict=True))
    padded = np.pad(weight, ((0, rows), (0, cols)))
    shape = (len(padded) // tile.rows, tile.rows // tile.shared, tile.shared)
    return padded.reshape(*shape, padded.shape[1] // tile.word, tile.groups, tile.m)


def _kept(tiled: Integers, tile: Tile) -> npt.NDArray[np.bool_]:
    """Which inputs a multiplexer must give, `[row groups, rows / shared, words, groups, m]`."""
    return np.any(tiled != 0, axis=2)


def _counts(tiled: Integers, tile: Tile) -> Integers:
    """Trips of every word, `[row groups, words]`: at least one in every group of rows."""
    most = _kept(tiled, tile).sum(axis=-1).max(axis=(1, 3))
    counts = -(-most // tile.n)
    if tile.n == tile.m:
        counts = np.minimum(counts, 1)
    counts[counts.sum(axis=1) == 0, 0] = 1
    return counts.astype(np.int64)
