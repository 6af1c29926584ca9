"""How the kernels that work in strips of a map are cut: their packed weights, and the tiles of a call."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsecomp.kernels import conv_strips
from sparsecomp.kernels.depthwise_strips import DepthwiseStrips
from sparsecomp.targets.cpu import conv_schedules
from sparsecomp.targets.cpu.level import Caches, Level
from sparsecomp.targets.cpu.schedules import L2_SHARE
from sparsecomp.window import Maps, Window

# Most rows of a tile of the depthwise kernel, whose sums are in registers, and what a tile costs beside them, in rows.
DEPTHWISE_ROWS = {16: 14, 8: 7, 4: 7}
TILE_COST = 2


def piece(level: Level, width: int) -> int:
    """Lanes that are stored at once: a vector, or the largest power of two that a narrower output has."""
    return 1 << (min(width, level.lanes).bit_length() - 1)


@dataclass(frozen=True)
class StripCall:
    """How a call of the kernel in strips is cut.

    Attributes:
        vectors: rows of a tile.
        tiles: of the whole call.
        splits: parts of the rows of a group; each packs the tile again.
        items: work items.
    """

    vectors: int
    tiles: int
    splits: int
    items: int

    def share(self, threads: int) -> float:
        """The largest part of the work that one thread gets."""
        return math.ceil(self.items / max(threads, 1)) / max(self.items, 1)


@dataclass(frozen=True)
class StripPacking:
    """How a weight is packed.

    Attributes:
        block: channels of a block.
        pitch: vectors of a row in scratch.
        chunk: rows of a chunk.
    """

    block: int
    pitch: int
    chunk: int


def packing(
    level: Level, shape: tuple[int, int], window: Window, vectors: int, l1: int, nonzeros: int
) -> StripPacking | None:
    """Even blocks of channels that fit the L1 cache, for tiles of so many rows; None where there is no kernel."""
    floats = conv_schedules.block_bytes(shape, nonzeros, l1) // 4
    most = conv_strips.channels(window, level.lanes, vectors, floats)
    if not most:
        return None
    channels = shape[1] // window.taps
    block = math.ceil(channels / math.ceil(channels / most))
    chunk = conv_schedules.packing(level, shape, window.groups, vectors, l1, nonzeros)["chunk"]
    return StripPacking(block, most * window.kernel[1], chunk)


def call(
    level: Level, window: Window, maps: Maps, group_rows: int, vectors: int, threads: int, caches: Caches
) -> StripCall:
    """The rows of a tile with the least work for the busiest thread.

    Args:
        level: of the schedules.
        window: of the convolution.
        maps: of the call.
        group_rows: rows of the weight in a group.
        vectors: the most rows that the weight was packed for.
        threads: that the call may use.
        caches: of a core.
    """
    height, width = window.output(maps.height, maps.width)
    chunks = max(1, math.ceil(group_rows / conv_schedules.CHUNK))

    def cut(count: int) -> StripCall:
        tiles = maps.images * math.ceil(height / count) * math.ceil(width / level.lanes)
        least = min(chunks, math.ceil(4 * count * level.lanes * group_rows / (L2_SHARE * caches.l2)))
        splits = conv_schedules.row_splits(tiles * window.groups, chunks, threads, least)
        return StripCall(count, tiles, splits, tiles * window.groups * splits)

    def work(found: StripCall) -> float:
        return found.share(threads) * found.tiles * (found.vectors + conv_schedules.STEP_COST)

    calls = [cut(count) for count in range(1, min(vectors, height) + 1)]
    return min(calls, key=lambda found: (work(found), -found.vectors))


def depthwise(level: Level, window: Window, maps: Maps, *, largest: bool = False) -> DepthwiseStrips:
    """The schedule of the depthwise kernel, or of max pooling: tall tiles, of which few rows are computed twice."""
    height, width = window.output(maps.height, maps.width)
    most = min(height, DEPTHWISE_ROWS[level.lanes])
    rows = min(range(1, most + 1), key=lambda count: math.ceil(height / count) * (count + TILE_COST))
    form = (window.kernel[0], window.stride, window.dilation[0], largest)
    return DepthwiseStrips(level.lanes, rows, piece(level, width), *form)
