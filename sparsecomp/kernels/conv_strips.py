"""The convolution kernel for windows of several taps: tiles of a few rows, one vector of columns each.

`sparsecomp.kernels.conv` packs a row for every tap. Here a row of the map is packed once for every column of the
window, and all rows of the window read it: a tile of V output rows needs V + 2 vectors for each of the three columns of
a 3 x 3 window, not nine times V. So more columns of the weight fit the L1 cache at once, and the sums are put away less
often. With a stride, columns are picked as they are packed: the map is not taken apart beforehand.

In scratch the vectors of a row lie side by side, one for every channel of the block and column of the window, and row
follows row: what a tap reads for the rows of a tile are vectors a constant distance apart. The columns of the weight
are put in the same order, so that the number of a column says where its first vector is.

What is lost are lanes: a map of 28 columns takes two vectors. Windows of 1 x 1 have nothing to share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparsecomp.kernels import tir
from sparsecomp.kernels.conv import item_of
from sparsecomp.kernels.conv_geometry import check_addressable
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.kernels.quads import Quad, QuadShape, weight_types
from sparsecomp.patterns.quads import MOST_COLUMNS, QUAD, QuadWeight
from sparsecomp.window import Maps, Window

DIMS = (
    "channels",
    "group_channels",
    "height",
    "width",
    "out_height",
    "out_width",
    "outputs",
    "block_channels",
    "block_floats",
    "blocks",
    "chunk",
    "group_chunks",
    "group_rows",
    "splits",
    "parts",
    "bands",
    "strips",
    "padding_y",
    "padding_x",
    "total",
)
_SPARE = 16  # floats
_MOST_VECTORS = 256  # of a channel: packing them is written out in the code


@dataclass(frozen=True)
class StripSchedule(QuadShape):
    """Register shape and form of the kernel; a tile has `vectors` rows.

    Attributes:
        piece: lanes that are stored at once: all, or the largest power of two that a narrower output has.
        pitch: vectors of a row in scratch.
        kernel, stride, dilation: of the window; its rows and columns are written out in the code.
    """

    piece: int
    pitch: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def step(self) -> int:
        """Rows in scratch from one row of the tile to the next: rows that no tap reads have no place."""
        return self.stride[0] if self.kernel[0] > 1 else 1

    @property
    def rows(self) -> dict[int, int]:
        """For every row of the map that a tile reads, counted from the first, its row in scratch."""
        taps = range(0, self.kernel[0] * self.dilation[0], self.dilation[0])
        return {v * self.stride[0] + tap: v * self.step + tap for v in range(self.vectors) for tap in taps}

    @property
    def block_floats(self) -> int:
        """Scratch for a block of columns."""
        return (max(self.rows.values()) + 1) * self.pitch * self.lanes


def channels(window: Window, lanes: int, rows: int, floats: int) -> int:
    """Channels of a block for tiles of so many rows and so much scratch, 0 where there is no kernel for a window.

    There is one for columns no more than two apart, and few taps.
    """
    if window.stride[1] > 2 or window.taps > MOST_COLUMNS:
        return 0
    if rows_read(window, rows) * window.kernel[1] > _MOST_VECTORS:
        return 0
    reach = (window.kernel[0] - 1) * window.dilation[0] + 1
    step = window.stride[0] if window.kernel[0] > 1 else 1
    return min(MOST_COLUMNS // reach, floats // (((rows - 1) * step + reach) * lanes)) // window.kernel[1]


def rows_read(window: Window, rows: int) -> int:
    """Rows of the map that a tile of so many rows reads."""
    taps = range(0, window.kernel[0] * window.dilation[0], window.dilation[0])
    return len({row * window.stride[0] + tap for row in range(rows) for tap in taps})


def arrange(weight: Tensor, window: Window, block: int, pitch: int) -> Tensor:
    """The weight as a matrix whose columns have the numbers of the vectors that they read.

    Args:
        weight: `[O, I / groups, kh, kw]`.
        window: of the convolution.
        block: channels of a block.
        pitch: vectors of a row in scratch, at least `block * kw`.

    Returns:
        `[O, blocks * reach * pitch]`, where `reach` rows are those from the first of the window to its last; columns
        that stand for no tap are zero.
    """
    outputs, inputs, rows, columns = weight.shape
    reach = (rows - 1) * window.dilation[0] + 1
    blocks = -(-inputs // block)
    padded = weight.new_zeros(outputs, blocks * block, rows, columns)
    padded[:, :inputs] = weight
    # [O, blocks, rows, channels of the block, columns]
    lines = padded.reshape(outputs, blocks, block, rows, columns).transpose(2, 3)
    arranged = weight.new_zeros(outputs, blocks, reach, pitch)
    arranged[:, :, :: window.dilation[0], : block * columns] = lines.reshape(outputs, blocks, rows, block * columns)
    return arranged.reshape(outputs, blocks * reach * pitch)


def weights(packed: QuadWeight) -> list[npt.NDArray[np.generic]]:
    """The arrays that the kernel takes as `w0`..`w3`, from an arranged weight in blocks of `reach * pitch` columns."""
    return [packed.values, packed.words, packed.quads, packed.starts]


def sizes_of(packed: QuadWeight, inputs: int, block: int) -> dict[str, int]:
    """What of `DIMS` the packed weight decides: of so many channels in a group, and in a block."""
    return {
        "group_channels": inputs,
        "outputs": packed.shape[0],
        "block_channels": block,
        "blocks": packed.blocks,
        "chunk": packed.chunk,
        "group_chunks": packed.group_chunks,
        "group_rows": packed.group_rows,
    }


def dims(schedule: StripSchedule, sizes: Mapping[str, int], window: Window, maps: Maps, splits: int) -> list[int]:
    """The sizes of a call in the order of `DIMS`.

    Args:
        schedule: of the kernel.
        sizes: from `sizes_of`.
        window: of the convolution.
        maps: of the call.
        splits: of the rows of each group.

    Raises:
        ValueError: the maps hold more values than the kernel can address.
    """
    height, width = window.output(maps.height, maps.width)
    channels = sizes["group_channels"] * window.groups
    of_call = {
        "channels": channels,
        "height": maps.height,
        "width": maps.width,
        "out_height": height,
        "out_width": width,
        "padding_y": window.padding[0],
        "padding_x": window.padding[1],
        "block_floats": schedule.block_floats,
        "splits": splits,
        "parts": splits * window.groups,
        "bands": -(-height // schedule.vectors),
        "strips": -(-width // schedule.lanes),
        "total": maps.images * channels * maps.height * maps.width,
    }
    check_addressable(max(of_call["total"], maps.images * sizes["outputs"] * height * width))
    return [({**sizes, **of_call})[name] for name in DIMS]


def scratch_floats(schedule: StripSchedule, sizes: Mapping[str, int], splits: int) -> int:
    """Scratch of one thread: the packed block, and the sums of its chunks each with a spare row."""
    chunks = -(-sizes["group_chunks"] // splits)
    return schedule.block_floats + chunks * (sizes["chunk"] + 1) * schedule.tile + _SPARE


@dataclass(frozen=True)
class _Tile:
    """Where a work item is: its image, its group, the first row and column of its output, and its sums in scratch."""

    image: tir.Expr
    group: tir.Expr
    y: tir.Expr
    x: tir.Expr
    sums: tir.Expr


def build(schedule: StripSchedule, epilogue: Epilogue) -> tir.Expr:
    """The kernel in TIR; its items are those of `item_of`."""
    builder = tir.KernelBuilder("conv_strips", weight_types(schedule))
    lanes, rows, tile = schedule.lanes, schedule.vectors, schedule.tile
    with builder.build() as args:
        d = dict(zip(DIMS, args.sizes(*DIMS), strict=True))
        sums = d["block_floats"]
        with tir.loop(args.end - args.begin) as step:
            index, group, first_chunk, chunks = item_of(d, args.begin + step)
            strip, band = tir.floor_mod(index, d["strips"]), tir.bind(tir.floor_div(index, d["strips"]))
            # The last tiles end with the map and compute some positions again.
            x = tir.bind(tir.maximum(tir.minimum(strip * lanes, d["out_width"] - lanes), 0))
            y = tir.bind(tir.minimum(tir.floor_mod(band, d["bands"]) * rows, d["out_height"] - rows))
            place = _Tile(tir.bind(tir.floor_div(band, d["bands"])), group, y, x, sums)
            with tir.loop(d["blocks"]) as block:
                _pack_block(args, schedule, d, place, block)
                with tir.loop(chunks) as c:
                    chunk = tir.bind(group * d["group_chunks"] + first_chunk + c)
                    start = tir.bind(chunk * d["blocks"] + block)
                    begin, end = tir.bind(args["w3"][start]), tir.bind(args["w3"][start + 1])
                    row = tir.bind(group * d["group_rows"] + (first_chunk + c) * d["chunk"])
                    waiting = tir.bind(sums + c * (d["chunk"] + 1) * tile)
                    with tir.loop(end - begin) as q:
                        _quad(args, schedule, epilogue, d, place, tir.bind(begin + q), block, (row, waiting))
    return builder.function


def _pack_block(
    args: tir.Arguments, schedule: StripSchedule, d: dict[str, tir.Expr], place: _Tile, block: tir.Expr
) -> None:
    """Pack the lines of a tile for the channels of a block."""
    lanes, (stride, step), columns = schedule.lanes, schedule.stride, schedule.kernel[1]
    x, scratch, zeros = args["x"], args["scratch"], tir.const(0.0, lanes=lanes)
    numbers = tir.vector_of([tir.const(i * step, "int32") for i in range(lanes)])
    first_channel = tir.bind(block * d["block_channels"])
    first = tir.bind(place.y * stride - d["padding_y"])
    column = tir.bind(place.x * step - d["padding_x"])
    moves = [k * schedule.dilation[1] for k in range(columns)]
    span, last = (lanes - 1) * step + 1, max(schedule.rows)
    # The numbers of lanes within the map, for each column of the window.
    bounds = [(tir.bind(-column - move), tir.bind(d["width"] - column - move)) for move in moves]
    lowest = tir.bind(tir.maximum(first, 0) * d["width"] + column)
    highest = tir.bind(tir.minimum(first + last, d["height"] - 1) * d["width"] + column + (moves[-1] + span))
    with tir.loop(tir.minimum(d["block_channels"], d["group_channels"] - first_channel)) as c:
        channel = place.group * d["group_channels"] + first_channel + c
        plane = tir.bind((place.image * d["channels"] + channel) * d["height"] * d["width"])
        begin = tir.bind(c * (columns * lanes))
        # Near both ends of x a vector would read outside of it.
        safe = tir.bind(tir.both(plane + lowest >= 0, plane + highest <= d["total"]))
        for row, own_row in schedule.rows.items():
            y = tir.bind(first + row)
            source = tir.bind(plane + y * d["width"] + column)
            targets = [begin + (own_row * schedule.pitch + k) * lanes for k in range(columns)]
            inside = tir.bind(tir.both(y >= 0, y < d["height"]))
            # Of the next band: what is read of a row is short and the next one far away, which processors do not fetch
            # ahead of. On a Zen 5 maps of 64 x 56 x 56 that come from the L3 cache took 1.2 to 1.8 times as long.
            tir.prefetch(x, source + schedule.vectors * stride * d["width"])
            with tir.when(tir.both(inside, safe)):
                for move, target, (before, behind) in zip(moves, targets, bounds, strict=True):
                    value = tir.bind(tir.load_step(x, source + move, lanes, step))
                    value = tir.select(numbers < tir.splat(behind, lanes), value, zeros)
                    tir.store(scratch, target, tir.select(numbers < tir.splat(before, lanes), zeros, value), lanes)
            with tir.when(tir.negate(inside)):
                for target in targets:
                    tir.store(scratch, target, zeros, lanes)
            with tir.when(tir.both(inside, tir.negate(safe))), tir.loop(columns) as k, tir.loop(lanes) as lane:
                position = tir.bind(column + k * schedule.dilation[1] + lane * step)
                kept = tir.both(position >= 0, position < d["width"])
                at = tir.bind(tir.select(kept, position - column, -column))
                tir.store(
                    scratch, targets[0] + k * lanes + lane, tir.select(kept, tir.load(x, source + at), tir.const(0.0))
                )


class _StripQuad(Quad):
    """A quad whose vectors of a column lie apart."""

    def __init__(self, args: tir.Arguments, schedule: StripSchedule, number: tir.Expr, sums: tir.Expr) -> None:
        super().__init__(args, schedule, number, sums)
        self._apart = schedule.pitch * schedule.step * schedule.lanes

    def _multiply(self, members: tuple[int, ...], factors: list[tir.Expr], at: tir.Expr) -> None:
        shape = self._shape
        lanes, tile = shape.lanes, shape.tile
        for v in range(shape.vectors):
            activation = tir.load(self._columns[0], at + tir.const(v * self._apart, "int64"), lanes)
            activation = tir.bind(activation) if len(members) > 1 else activation
            for member in members:
                slot = member * tile + v * lanes
                total = tir.load(self._total, slot, lanes) + factors[member] * activation
                tir.store(self._total, slot, total, lanes)


def _quad(
    args: tir.Arguments,
    schedule: StripSchedule,
    epilogue: Epilogue,
    d: dict[str, tir.Expr],
    place: _Tile,
    quad: tir.Expr,
    block: tir.Expr,
    target: tuple[tir.Expr, tir.Expr],
) -> None:
    """Add one block of columns to the sums of four rows; after the last block finish them."""
    first_row, sums = target
    lanes, piece, scratch = schedule.lanes, schedule.piece, args["scratch"]
    work = _StripQuad(args, schedule, quad, sums)
    work.begin(block)
    work.add(tir.const(0, "int64"), (scratch, tir.const(lanes, "int64")))
    if piece == lanes:
        with tir.when(block < d["blocks"] - 1):
            work.keep()
    else:
        work.keep()
    with tir.when(block == d["blocks"] - 1):
        for member in range(QUAD):
            output = tir.bind(first_row + work.rows[member])
            with tir.when(work.rows[member] < d["chunk"]):
                scale, shift = tir.bind(args["bias"][d["outputs"] + output]), tir.bind(args["bias"][output])

                def finish(value: tir.Expr, at: tir.Expr, scale: tir.Expr = scale, shift: tir.Expr = shift) -> None:
                    value = value * tir.splat(scale, piece)
                    value = epilogue.apply(args, value, tir.splat(shift, piece), at, piece)
                    tir.store(args["y"], at, value, piece)

                rows = tir.bind((place.image * d["outputs"] + output) * d["out_height"] + place.y)
                for v in range(schedule.vectors):
                    at = tir.bind((rows + v) * d["out_width"] + place.x)
                    total = work.total(member, v)
                    if piece == lanes:
                        finish(total, at)
                        continue
                    # Two pieces that may overlap are a row: the first lanes, and from scratch those that end with it.
                    rest = tir.bind(d["out_width"] - piece)
                    waiting = sums + work.rows[member] * schedule.tile + v * lanes
                    finish(tir.shuffle(total, total, list(range(piece))), at)
                    finish(tir.load(scratch, waiting + rest, piece), tir.bind(at + rest))
