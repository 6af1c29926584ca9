"""The kernel that takes the maps of a strided convolution apart into their phases, so that its loads are contiguous."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecomp.kernels import tir
from sparsecomp.kernels.conv_geometry import Geometry
from sparsecomp.window import Maps, Window

WEIGHTS = ("int32",)  # phases
DIMS = ("height", "width", "stride_y", "stride_x", "phases", "rows", "pitch")


@dataclass(frozen=True)
class OpenSchedule:
    """How a map is taken apart: `step` is the stride of columns that vectors are made for, 1 or 2; 0 for none."""

    lanes: int
    step: int


def dims(window: Window, maps: Maps, geometry: Geometry) -> list[int]:
    """The sizes of a call of `build` in the order of `DIMS`."""
    return [maps.height, maps.width, *window.stride, len(geometry.phases), geometry.rows, geometry.pitch]


def build(schedule: OpenSchedule) -> tir.Expr:
    """The kernel that takes maps apart into their phases, filled up with zeros to one size; item i is channel i."""
    builder = tir.KernelBuilder("conv_open", WEIGHTS)
    lanes, step = schedule.lanes, schedule.step
    zeros = tir.const(0.0, lanes=lanes)
    with builder.build() as args:
        height, width, stride_y, stride_x, phases, rows, pitch = args.sizes(*DIMS)
        with tir.loop(args.end - args.begin) as i, tir.loop(phases) as phase, tir.loop(rows) as row:
            channel = tir.bind(args.begin + i)
            y = tir.bind(row * stride_y + args["w0"][phase * 2])
            first = tir.bind(args["w0"][phase * 2 + 1])
            target = tir.bind(((channel * phases + phase) * rows + row) * pitch)
            source = tir.bind((channel * height + y) * width + first)
            inside = tir.maximum(tir.ceil_div(tir.maximum(width - first, 0), stride_x), 0)
            count = tir.bind(tir.select(y < height, tir.minimum(inside, pitch), 0))
            done = tir.bind(tir.floor_div(count, lanes) * lanes if step else tir.const(0, "int32"))
            with tir.loop(tir.floor_div(done, lanes)) as v:
                vector = tir.load_step(args["x"], source + v * (lanes * step), lanes, step)
                tir.store(args["y"], target + v * lanes, vector, lanes)
            with tir.loop(count - done) as rest:
                value = tir.load(args["x"], source + (done + rest) * stride_x)
                tir.store(args["y"], target + done + rest, value)
            empty = tir.bind(pitch - count)
            full = tir.bind(tir.floor_div(empty, lanes))
            with tir.loop(full) as v:
                tir.store(args["y"], target + count + v * lanes, zeros, lanes)
            with tir.loop(empty - full * lanes) as rest:
                tir.store(args["y"], target + count + full * lanes + rest, tir.const(0.0))
    return builder.function
