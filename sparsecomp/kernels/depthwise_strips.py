"""Depthwise convolution, channels first, without a copy of the map: for wide vectors.

A tile is a strip of `rows` output rows, one vector of columns each, whose sums stay in registers. For every column of
the window each row of the map that the strip needs is loaded once, and used for all taps of that column: unaligned
loads are few beside the multiply-adds. Dense, so that nothing has to be laid out anew between sparse convolutions.

With short vectors the copy that `sparsecomp.kernels.depthwise` makes costs less than it saves.

Max pooling is the same walk over the map with another reduction, and has no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sparsecomp.kernels import tir
from sparsecomp.kernels.conv_geometry import check_addressable
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.window import Maps, Window

WEIGHTS = ("float32",)
DIMS = (
    "height",
    "width",
    "out_height",
    "out_width",
    "padding_y",
    "padding_x",
    "columns",
    "dilation_x",
    "channels",
    "outputs",
    "total",
)
_MOST_ROWS = 64  # of a window: all of them are written out in the code


@dataclass(frozen=True)
class DepthwiseStrips:
    """Form of the kernel.

    Attributes:
        lanes: float32 in a vector.
        rows: output rows of a tile.
        piece: lanes that are stored at once: all, or the largest power of two that a narrower output has.
        taps: rows of the window.
        stride: of the window, rows and columns, which are at most 2.
        dilation: of the rows of the window.
        largest: whether the output is the largest value in the window, a NaN if it has one, and not a sum of products.
    """

    lanes: int
    rows: int
    piece: int
    taps: int
    stride: tuple[int, int]
    dilation: int
    largest: bool = False

    @property
    def nothing(self) -> float:
        """What positions outside of the map count as, and the result begins with."""
        return -math.inf if self.largest else 0.0

    @property
    def loads(self) -> dict[int, list[tuple[int, int]]]:
        """For every row of the map that a tile reads, from its first on, the output rows and taps that use it."""
        found: dict[int, list[tuple[int, int]]] = {}
        for row in range(self.rows):
            for tap in range(self.taps):
                found.setdefault(row * self.stride[0] + tap * self.dilation, []).append((row, tap))
        return dict(sorted(found.items()))


def supports(window: Window) -> bool:
    """Whether there is a kernel for a window: at most 64 rows, and columns no more than two apart."""
    return window.kernel[0] <= _MOST_ROWS and window.stride[1] <= 2


def dims(window: Window, maps: Maps, outputs: int) -> list[int]:
    """The sizes of a call in the order of `DIMS`, for a convolution with so many outputs.

    Raises:
        ValueError: the maps hold more values than the kernel can address.
    """
    height, width = window.output(maps.height, maps.width)
    sizes = {
        "height": maps.height,
        "width": maps.width,
        "out_height": height,
        "out_width": width,
        "padding_y": window.padding[0],
        "padding_x": window.padding[1],
        "columns": window.kernel[1],
        "dilation_x": window.dilation[1],
        "channels": window.groups,
        "outputs": outputs,
        "total": maps.images * window.groups * maps.height * maps.width,
    }
    check_addressable(max(sizes["total"], maps.images * outputs * height * width))
    return [sizes[name] for name in DIMS]


def scratch_floats(schedule: DepthwiseStrips) -> int:
    """Scratch of one thread: the sums of a tile, or one vector."""
    return schedule.rows * schedule.lanes


def build(schedule: DepthwiseStrips, epilogue: Epilogue) -> tir.Expr:
    """The kernel in TIR; item i is output channel `i % outputs` of image `i // outputs`."""
    builder = tir.KernelBuilder("depthwise", WEIGHTS)
    lanes, rows = schedule.lanes, schedule.rows
    with builder.build() as args:
        d = dict(zip(DIMS, args.sizes(*DIMS), strict=True))
        strips = tir.bind(tir.ceil_div(d["out_width"], lanes))
        with tir.loop(args.end - args.begin) as step:
            item = tir.bind(args.begin + step)
            image, output = tir.bind(tir.floor_div(item, d["outputs"])), tir.bind(tir.floor_mod(item, d["outputs"]))
            channel = tir.bind(tir.floor_div(output * d["channels"], d["outputs"]))
            plane = tir.bind((image * d["channels"] + channel) * d["height"] * d["width"])
            weight = tir.bind(output * (schedule.taps * d["columns"]))
            with tir.loop(tir.ceil_div(d["out_height"], rows)) as band, tir.loop(strips) as strip:
                # The last tiles end with the map and compute some positions again.
                y = tir.bind(tir.minimum(band * rows, d["out_height"] - rows))
                x = tir.bind(tir.maximum(tir.minimum(strip * lanes, d["out_width"] - lanes), 0))
                total = tir.registers(rows * lanes)
                for row in range(rows):
                    tir.store(total, row * lanes, tir.const(schedule.nothing, lanes=lanes), lanes)
                _sum(args, schedule, d, (plane, weight), (y, x), total)
                at = tir.bind((item * d["out_height"] + y) * d["out_width"] + x)
                _store(args, schedule, epilogue, d, output, at, total)
    return builder.function


def _sum(
    args: tir.Arguments,
    schedule: DepthwiseStrips,
    d: dict[str, tir.Expr],
    begin: tuple[tir.Expr, tir.Expr],
    place: tuple[tir.Expr, tir.Expr],
    total: tir.Expr,
) -> None:
    """Bring all taps into the sums of a tile, or into its largest values."""
    lanes, step = schedule.lanes, schedule.stride[1]
    plane, weight = begin
    first_y = tir.bind(place[0] * schedule.stride[0] - d["padding_y"])
    first_x = tir.bind(place[1] * step - d["padding_x"])
    span, last = (lanes - 1) * step + 1, max(schedule.loads)
    lowest = plane + tir.maximum(first_y, 0) * d["width"] + first_x
    highest = tir.minimum(first_y + last, d["height"] - 1) * d["width"] + (d["columns"] - 1) * d["dilation_x"]
    inside = tir.bind(tir.both(lowest >= 0, plane + highest + first_x + span <= d["total"]))

    def columns(load: Callable[[tir.Expr], tir.Expr]) -> None:
        with tir.loop(d["columns"]) as k:
            taps = [] if schedule.largest else [weight + tap * d["columns"] + k for tap in range(schedule.taps)]
            factors = [tir.bind(tir.splat(args["w0"][tap], lanes)) for tap in taps]
            column = tir.bind(first_x + k * d["dilation_x"])
            numbers = tir.bind(
                tir.splat(column, lanes) + tir.vector_of([tir.const(i * step, "int32") for i in range(lanes)])
            )
            # As an unsigned number what is left of the map is large.
            kept = tir.reinterpret(f"uint32x{lanes}", numbers) < tir.splat(tir.cast("uint32", d["width"]), lanes)
            for row, uses in schedule.loads.items():
                y = tir.bind(first_y + row)
                with tir.when(tir.both(y >= 0, y < d["height"])):
                    vector = load(tir.bind(plane + y * d["width"] + column))
                    vector = tir.bind(tir.select(kept, vector, tir.const(schedule.nothing, lanes=lanes)))
                    for out, tap in uses:
                        slot = out * lanes
                        before = tir.bind(tir.load(total, slot, lanes))
                        after = _larger(before, vector) if schedule.largest else before + factors[tap] * vector
                        tir.store(total, slot, after, lanes)

    def one_by_one(source: tir.Expr) -> tir.Expr:
        scratch = args["scratch"]
        with tir.loop(lanes) as lane:
            at = tir.bind(tir.maximum(tir.minimum(source + lane * step, d["total"] - 1), 0))
            tir.store(scratch, lane, tir.load(args["x"], at))
        return tir.load(scratch, 0, lanes)

    with tir.when(inside):
        columns(lambda source: tir.load_step(args["x"], source, lanes, step))
    # Near both ends of x a vector would read outside of it.
    with tir.when(tir.negate(inside)):
        columns(one_by_one)


def _larger(before: tir.Expr, value: tir.Expr) -> tir.Expr:
    """The larger of two vectors, and a NaN of either: it compares with nothing."""
    return tir.select(before >= before, tir.select(before >= value, before, value), before)


def _store(
    args: tir.Arguments,
    schedule: DepthwiseStrips,
    epilogue: Epilogue,
    d: dict[str, tir.Expr],
    output: tir.Expr,
    at: tir.Expr,
    total: tir.Expr,
) -> None:
    """Scale, shift and the epilogue; store the rows of a tile from y[at] on."""
    lanes, piece, scratch = schedule.lanes, schedule.piece, args["scratch"]
    scale, shift = tir.bind(args["bias"][d["outputs"] + output]), tir.bind(args["bias"][output])

    def finish(value: tir.Expr, target: tir.Expr) -> None:
        value = value * tir.splat(scale, piece)
        tir.store(args["y"], target, epilogue.apply(args, value, tir.splat(shift, piece), target, piece), piece)

    if piece == lanes:
        for row in range(schedule.rows):
            finish(tir.load(total, row * lanes, lanes), tir.bind(at + row * d["out_width"]))
        return
    # Two pieces that may overlap are a row: the first lanes, and from scratch those that end with it.
    for row in range(schedule.rows):
        tir.store(scratch, row * lanes, tir.load(total, row * lanes, lanes), lanes)
    rest = tir.bind(d["out_width"] - piece)
    for row in range(schedule.rows):
        value = tir.bind(tir.load(total, row * lanes, lanes))
        target = tir.bind(at + row * d["out_width"])
        finish(tir.shuffle(value, value, list(range(piece))), target)
        finish(tir.load(scratch, row * lanes + rest, piece), tir.bind(target + rest))
