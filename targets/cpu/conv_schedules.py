"""How the convolution kernel is cut: what its packed weight looks like, and which variant a call takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sparsecomp.kernels.conv_geometry import Geometry
from sparsecomp.kernels.depthwise import DepthwiseSchedule, Layout
from sparsecomp.patterns.quads import MOST_COLUMNS
from sparsecomp.targets.cpu.level import Caches, Level
from sparsecomp.targets.cpu.schedules import L2_SHARE, sparse_l1_share
from sparsecomp.window import Maps, Window

# Share of the L1 cache that a packed block takes; weights and sums stream through the rest. Where few entries are kept
# it is `sparse_l1_share`: 1x1 windows with 80 or 90 % zeros are up to 15 % faster so on a Zen 4, and those with 50 %
# as fast.
L1_SHARE = 0.8
# Uses of a column by a tile, for each of its vectors, from which packing it pays: on a Zen 4 a map of 28x28 that is
# read where it lies is 10 % slower with 13 uses, and 7 % faster with 3. Planes lie on pages of their own, whose
# addresses the processor must look up at every use.
USES_TO_PACK = 6
# Rows that are sorted by their counts together, and the least that a thread gets.
CHUNK = 128
# Cost of a kept weight beside its multiply-adds, in vectors of positions.
STEP_COST = 0.6
# Floats of a cache line, and sets of the L1 cache: a page has 64 lines, and sets are told by the place in it.
LINE = 16
SETS = 64
# What storing run by run adds, relative to the rest, and what the second launch does.
RUNS_COST = 1.06
TAIL_COST = 1.01


@dataclass(frozen=True)
class ConvCall:
    """How one call is cut.

    Attributes:
        vectors: of positions in a tile.
        whole: whether each tile lies within one image.
        direct: whether it is used where it lies, and not packed.
        tiles: of the whole call.
        image_tiles: tiles of an image, if whole.
        splits: parts of the rows of a group; each packs the tile again.
        items: work items.
        skip: positions of an image before its first tile, if whole.
        tail: what computes the rest of each image in a narrower tile of its own, or None.
    """

    vectors: int
    whole: bool
    direct: bool
    tiles: int
    image_tiles: int
    splits: int
    items: int
    skip: int = 0
    tail: ConvCall | None = None

    def share(self, threads: int) -> float:
        """The largest part of the work that one thread gets."""
        return math.ceil(self.items / max(threads, 1)) / max(self.items, 1)

    @property
    def parts(self) -> tuple[ConvCall, ...]:
        """Itself and its tail."""
        return (self,) if self.tail is None else (self, self.tail)


def widest(level: Level) -> tuple[int, ...]:
    """Numbers of vectors that a weight may be packed for.

    Four rows of them are in registers. Wide tiles need fewer loads of weights, narrow ones have room for more columns
    in the L1 cache, so that sums are put away less often; and maps do not fill every width.
    """
    return (2, 4, 7) if level.lanes == 16 else (2, 3)


def block_bytes(shape: tuple[int, int], nonzeros: int, l1: int) -> int:
    """Bytes of the L1 cache for a packed block, for a weight of so many entries."""
    return int((L1_SHARE if 4 * nonzeros > shape[0] * shape[1] else sparse_l1_share(l1)) * l1)


def uses(shape: tuple[int, int], groups: int, nonzeros: int) -> float:
    """How often a tile uses a column of its packed input: the column's entries in a group."""
    return nonzeros / max(shape[1] * groups, 1)


def packing(level: Level, shape: tuple[int, int], groups: int, vectors: int, l1: int, nonzeros: int) -> dict[str, int]:
    """`chunk`, `block` and `groups` for `QuadWeight.pack`: even blocks that fit the L1 cache."""
    columns = min(MOST_COLUMNS, max(1, block_bytes(shape, nonzeros, l1) // (4 * level.lanes * vectors)))
    blocks = max(1, math.ceil(shape[1] / columns))
    rows = shape[0] // groups
    chunks = max(1, math.ceil(rows / CHUNK))
    chunk = math.ceil(math.ceil(rows / chunks) / 4) * 4
    return {"chunk": max(chunk, 4), "block": max(1, math.ceil(shape[1] / blocks)), "groups": groups}


def call(
    level: Level,
    geometry: Geometry,
    images: int,
    rows: tuple[int, int],
    packed: tuple[int, int, float],
    threads: int,
    caches: Caches,
    *,
    tails: bool = False,
) -> ConvCall:
    """The variant with the least work for the busiest thread.

    Args:
        level: of the schedules.
        geometry: of the maps.
        images: in the batch.
        rows: rows of the weight in a group, and groups.
        packed: the most vectors that the weight was packed for, the columns of its blocks, and the entries of a column.
        threads: that the call may use.
        caches: of a core.
        tails: whether it may have a tail.
    """
    (group_rows, groups), (vectors, block, kept) = rows, packed
    chunks = max(1, math.ceil(group_rows / CHUNK))

    def cut(count: int, whole: bool, skip: int = 0, image_tiles: int = 0) -> ConvCall:
        tile = count * level.lanes
        image_tiles = image_tiles or math.ceil(geometry.length / tile)
        tiles = images * image_tiles if whole else math.ceil(images * geometry.length / tile)
        least = min(chunks, math.ceil(4 * tile * group_rows / (L2_SHARE * caches.l2)))
        splits = row_splits(tiles * groups, chunks, threads, least)
        direct = whole and reads_in_place(level, geometry, count, (block, kept), caches.l1)
        return ConvCall(count, whole, direct, tiles, image_tiles, splits, tiles * groups * splits, skip)

    def with_tail(count: int) -> ConvCall:
        tile = count * level.lanes
        full = geometry.length // tile
        tail = cut(math.ceil((geometry.length - full * tile) / level.lanes), True, full * tile, 1)
        return replace(cut(count, True, 0, full), tail=tail)

    def work(found: ConvCall) -> float:
        extra = RUNS_COST if not found.whole else 1.0 if found.tail is None else TAIL_COST
        return extra * sum(part.share(threads) * part.tiles * (part.vectors + STEP_COST) for part in found.parts)

    calls = [cut(count, False) for count in range(1, vectors + 1)]
    if geometry.pitch == geometry.width:
        counts = [count for count in range(1, vectors + 1) if count * level.lanes <= geometry.length]
        calls += [cut(count, True) for count in counts]
        calls += [with_tail(count) for count in counts if tails and geometry.length % (count * level.lanes)]
    return min(calls, key=lambda found: (work(found), -found.vectors))


def reads_in_place(level: Level, geometry: Geometry, vectors: int, packed: tuple[int, float], l1: int) -> bool:
    """Whether whole tiles of so many vectors use the map where it lies, for blocks of columns with so many entries.

    For a window of 1 x 1 whose planes begin with a cache line or a vector. Planes lie a constant distance apart, so
    their tiles may fall into few sets of the cache: then a block does not fit it.
    """
    plane = geometry.rows * geometry.pitch
    block, kept = packed
    if len(geometry.taps) > 1 or geometry.masked or plane % level.lanes or kept >= USES_TO_PACK * vectors:
        return False
    lines = math.ceil(vectors * level.lanes / LINE)
    apart = SETS // math.gcd(SETS, plane // LINE) if plane % LINE == 0 else SETS
    ways = l1 // (4 * LINE * SETS)
    return block * lines <= ways * min(SETS, apart * lines)


def depthwise_schedule(level: Level, layout: Layout, window: Window, maps: Maps) -> DepthwiseSchedule:
    """The schedule of the depthwise kernel: the fewest vectors in all, and wide tiles, whose sums do not wait."""
    positions = layout.positions(*window.output(maps.height, maps.width))
    widths = range(1, (8 if level.lanes == 16 else 4) + 1)
    vectors = min(widths, key=lambda v: math.ceil(positions / (v * level.lanes)) * (v + STEP_COST))
    return DepthwiseSchedule(level.lanes, vectors, window.stride[1] if window.stride[1] <= 2 else 0)


def row_splits(tiles: int, chunks: int, threads: int, least: int) -> int:
    """The fewest splits of the rows that keep all threads about evenly busy."""
    best, best_share = least, float("inf")
    for splits in range(least, max(least, min(chunks, threads)) + 1):
        # Parts are whole chunks, so a split may be larger than its share.
        share = math.ceil(tiles * splits / threads) * math.ceil(chunks / splits) / (tiles * chunks)
        if share < 0.95 * best_share:
            best, best_share = splits, share
    return best
