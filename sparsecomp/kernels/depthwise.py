"""Depthwise convolution, channels first: dense, so that nothing has to be laid out anew between sparse convolutions.

Each input map is copied, with its padding and taken apart into phases where there is a stride, to scratch that fits the
L1 cache. Positions are then counted with the pitch of that copy, so that every tap is a constant distance; those beyond
the end of a row are computed and left out when the sums are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsecomp.kernels import tir
from sparsecomp.kernels.conv_geometry import check_addressable
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.window import Maps, Window

WEIGHTS = ("float32", "int32", "int32")  # weights, distances of the taps, phases
DIMS = (
    "plane",
    "width",
    "stride_y",
    "stride_x",
    "phases",
    "pitch",
    "padded",
    "tiles",
    "out_height",
    "out_width",
    "channels",
    "outputs",
    "taps",
    "total",
)
PHASE_FIELDS = 7  # where it starts, first row and rows that are not padding, the same for columns, the first source


@dataclass(frozen=True)
class DepthwiseSchedule:
    """Register shape: `vectors` vectors of `lanes` positions; `step` is the stride of columns, 0 for more than 2."""

    lanes: int
    vectors: int
    step: int

    @property
    def tile(self) -> int:
        """Positions of a tile."""
        return self.lanes * self.vectors


@dataclass(frozen=True)
class Layout:
    """How a padded map lies in scratch.

    Attributes:
        pitch: floats of a row of a phase.
        padded: floats of all phases.
        distances: of the taps from a position, int32 `[taps]`.
        phases: int32 `[phases, 7]`.
    """

    pitch: int
    padded: int
    distances: npt.NDArray[np.int32]
    phases: npt.NDArray[np.int32]

    @classmethod
    def of(cls, window: Window, maps: Maps) -> Layout:
        """The layout for a window on maps of one size."""
        (sy, sx), (dy, dx), (py, px) = window.stride, window.dilation, window.padding
        height, width = window.output(maps.height, maps.width)
        moves = (
            [divmod(k * dy, sy) for k in range(window.kernel[0])],
            [divmod(k * dx, sx) for k in range(window.kernel[1])],
        )
        rows, pitch = height + max(a for a, _ in moves[0]), width + max(a for a, _ in moves[1])
        found = sorted({(p, q) for _, p in moves[0] for _, q in moves[1]})
        base = {phase: index * rows * pitch for index, phase in enumerate(found)}
        distances = [base[p, q] + a * pitch + b for a, p in moves[0] for b, q in moves[1]]
        table = []
        for p, q in found:
            row, count, y = _inside(maps.height, sy, py - p, rows)
            column, width_inside, x = _inside(maps.width, sx, px - q, pitch)
            table.append((base[p, q], row, count, column, width_inside, y, x))
        return cls(pitch, len(found) * rows * pitch, np.array(distances, np.int32), np.array(table, np.int32))

    def positions(self, height: int, width: int) -> int:
        """Positions up to the last one of an output of this size, those that do not count included."""
        return (height - 1) * self.pitch + width


def _inside(size: int, stride: int, before: int, most: int) -> tuple[int, int, int]:
    """Of an axis of a phase: the first index that is not padding, how many there are, where the first comes from."""
    first = max(0, -(-before // stride))
    stop = min(most, (size - 1 + before) // stride + 1)
    return first, max(0, stop - first), first * stride - before


def dims(schedule: DepthwiseSchedule, layout: Layout, window: Window, maps: Maps, outputs: int) -> list[int]:
    """The sizes of a call in the order of `DIMS`, for a convolution with so many outputs.

    Raises:
        ValueError: the maps hold more values than the kernel can address.
    """
    height, width = window.output(maps.height, maps.width)
    plane = maps.height * maps.width
    sizes = {
        "plane": plane,
        "width": maps.width,
        "stride_y": window.stride[0],
        "stride_x": window.stride[1],
        "phases": len(layout.phases),
        "pitch": layout.pitch,
        "padded": layout.padded,
        "tiles": -(-layout.positions(height, width) // schedule.tile),
        "out_height": height,
        "out_width": width,
        "channels": window.groups,
        "outputs": outputs,
        "taps": window.taps,
        "total": maps.images * window.groups * plane,
    }
    check_addressable(max(sizes["total"], maps.images * outputs * height * width))
    return [sizes[name] for name in DIMS]


def scratch_floats(schedule: DepthwiseSchedule, layout: Layout, out_height: int) -> int:
    """Scratch of one thread: the padded map and the sums, each with room for a tile that runs over the end."""
    return layout.padded + out_height * layout.pitch + 3 * schedule.tile


def build(schedule: DepthwiseSchedule, epilogue: Epilogue) -> tir.Expr:
    """The kernel in TIR; item i is output channel `i % outputs` of image `i // outputs`."""
    builder = tir.KernelBuilder("depthwise", WEIGHTS)
    lanes, tile = schedule.lanes, schedule.tile
    with builder.build() as args:
        d = dict(zip(DIMS, args.sizes(*DIMS), strict=True))
        scratch = args["scratch"]
        # Padding is the same for all channels: zeros once, and what lies inside is overwritten for each of them.
        sums = tir.bind(tir.ceil_div(d["padded"] + tile, lanes) * lanes)
        with tir.loop(tir.floor_div(sums, lanes)) as v:
            tir.store(scratch, v * lanes, tir.const(0.0, lanes=lanes), lanes)
        with tir.loop(args.end - args.begin) as step:
            item = tir.bind(args.begin + step)
            image, output = tir.bind(tir.floor_div(item, d["outputs"])), tir.bind(tir.floor_mod(item, d["outputs"]))
            channel = tir.bind(tir.floor_div(output * d["channels"], d["outputs"]))
            _copy_in(args, schedule, d, tir.bind((image * d["channels"] + channel) * d["plane"]))
            with tir.loop(d["tiles"]) as t:
                at = tir.bind(t * tile)
                total = tir.registers(tile)
                for v in range(schedule.vectors):
                    tir.store(total, v * lanes, tir.const(0.0, lanes=lanes), lanes)
                with tir.loop(d["taps"]) as tap:
                    weight = tir.bind(tir.splat(args["w0"][output * d["taps"] + tap], lanes))
                    source = tir.bind(at + args["w1"][tap])
                    for v in range(schedule.vectors):
                        slot = v * lanes
                        product = weight * tir.load(scratch, source + slot, lanes)
                        tir.store(total, slot, tir.load(total, slot, lanes) + product, lanes)
                for v in range(schedule.vectors):
                    tir.store(scratch, sums + at + v * lanes, tir.load(total, v * lanes, lanes), lanes)
            _copy_out(args, schedule, epilogue, d, (item, output), sums)
    return builder.function


def _copy_in(args: tir.Arguments, schedule: DepthwiseSchedule, d: dict[str, tir.Expr], plane: tir.Expr) -> None:
    """Copy a map into the phases."""
    lanes, step, x, scratch = schedule.lanes, schedule.step, args["x"], args["scratch"]
    with tir.loop(d["phases"]) as phase:
        fields = [tir.bind(args["w2"][phase * PHASE_FIELDS + i]) for i in range(PHASE_FIELDS)]
        base, row, rows, column, columns, y, first = fields
        full = tir.bind(tir.floor_div(columns, lanes) if step else tir.const(0, "int32"))
        with tir.loop(rows) as r:
            source = tir.bind(plane + (y + r * d["stride_y"]) * d["width"] + first)
            target = tir.bind(base + (row + r) * d["pitch"] + column)
            with tir.loop(full) as v:
                tir.store(
                    scratch, target + v * lanes, tir.load_step(x, source + v * (lanes * step), lanes, step), lanes
                )
            left = tir.bind(columns - full * lanes)
            start, end = tir.bind(source + full * lanes * d["stride_x"]), tir.bind(target + full * lanes)
            whole = tir.bind(tir.select(start + (lanes * step + 1) <= d["total"], left if step else 0, 0))
            # One vector for what is left of a row: behind it are zeros, or what the next row brings.
            with tir.when(whole > 0):
                vector = tir.load_step(x, start, lanes, step or 1)
                kept = tir.first_lanes(vector, left, lanes)
                tir.store(scratch, end, kept, lanes)
            with tir.when(whole == 0), tir.loop(left) as rest:
                tir.store(scratch, end + rest, tir.load(x, start + rest * d["stride_x"]))


def _copy_out(
    args: tir.Arguments,
    schedule: DepthwiseSchedule,
    epilogue: Epilogue,
    d: dict[str, tir.Expr],
    place: tuple[tir.Expr, tir.Expr],
    sums: tir.Expr,
) -> None:
    """Scale, shift and the epilogue; store the positions of each row that count."""
    lanes, scratch = schedule.lanes, args["scratch"]
    item, output = place
    scale, shift = tir.bind(args["bias"][d["outputs"] + output]), tir.bind(args["bias"][output])
    full = tir.bind(tir.floor_div(d["out_width"], lanes))
    with tir.loop(d["out_height"]) as row:
        source = tir.bind(sums + row * d["pitch"])
        target = tir.bind((item * d["out_height"] + row) * d["out_width"])

        def finish(offset: tir.Expr, width: int, source: tir.Expr = source, target: tir.Expr = target) -> None:
            value = tir.load(scratch, source + offset, width) * tir.splat(scale, width)
            at = tir.bind(target + offset)
            tir.store(args["y"], at, epilogue.apply(args, value, tir.splat(shift, width), at, width), width)

        with tir.loop(full) as v:
            finish(v * lanes, lanes)
        left = tir.bind(d["out_width"] - full * lanes)
        # A whole vector may run over into the next row, which comes after, but not over the end of the map.
        room = tir.bind((item + 1) * d["out_height"] * d["out_width"] - target - full * lanes)
        with tir.when(tir.both(left > 0, room >= lanes)):
            finish(tir.bind(full * lanes), lanes)
        with tir.when(room < lanes), tir.loop(left) as rest:
            finish(full * lanes + rest, 1)
