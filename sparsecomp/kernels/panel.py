"""The panel kernel: V outputs that share their columns lie in the vector lanes.

Activations stay row-major: every kept column is one vector of weights and one broadcast per token. A register tile
holds `tokens` x `vectors` sums; panels wider than that are taken in parts.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsecomp.kernels import tir
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.patterns.panel import PanelWeight

WEIGHTS = ("float32", "int32", "int32")  # values, columns, ptr
DIMS = ("tokens", "inputs", "outputs", "group", "splits")
_FEW_TOKENS = 4
SCRATCH_FLOATS = 16
"""Scratch of one thread: one vector of the last panel of an odd number of outputs."""


@dataclass(frozen=True)
class PanelSchedule:
    """Register tile of a panel of `v` rows: `tokens` x `vectors` vectors of `lanes` outputs.

    `width` is the stored part of a panel whose values lie together, so that a register tile reads whole cache lines.
    """

    v: int
    lanes: int
    vectors: int
    tokens: int
    width: int

    def __post_init__(self) -> None:
        for whole, part in ((self.v, self.width), (self.width, self.lanes), (self.v, self.lanes * self.vectors)):
            if whole % part:
                raise ValueError(f"{self} does not divide evenly: {whole} is no multiple of {part}")


def weights(packed: PanelWeight, width: int) -> list[npt.NDArray[np.generic]]:
    """The arrays that the kernel takes as `w0`..`w2`; the values of a panel by parts of `width` rows."""
    values = packed.values.numpy()
    parts = packed.v // width
    if parts > 1:
        panels = np.split(values, packed.ptr.numpy()[1:-1])
        values = np.concatenate([panel.reshape(-1, parts, width).transpose(1, 0, 2).reshape(-1) for panel in panels])
    return [values, packed.cols.numpy(), packed.ptr.numpy()]


def build(schedule: PanelSchedule, epilogue: Epilogue) -> tir.Expr:
    """The kernel in TIR. Item i is the group `i // splits` of tokens for the part `i % splits` of the panels.

    Within an item a panel meets all the tokens of the group, so its weights come from the L2 cache but for the first.
    """
    builder = tir.KernelBuilder("panel", WEIGHTS)
    with builder.build() as args:
        tokens, inputs, outputs, group, splits = args.sizes(*DIMS)
        panels = tir.bind(tir.ceil_div(outputs, schedule.v))
        with tir.loop(args.end - args.begin) as step:
            item = tir.bind(args.begin + step)
            token = tir.bind(tir.floor_div(item, splits) * group)
            count = tir.bind(tir.minimum(group, tokens - token))
            split = tir.bind(tir.floor_mod(item, splits))
            first = tir.bind(tir.floor_div(split * panels, splits))
            last = tir.bind(tir.floor_div((split + 1) * panels, splits))
            with tir.loop(last - first) as index:
                panel = tir.bind(first + index)
                begin, end = tir.bind(args["w2"][panel]), tir.bind(args["w2"][panel + 1])
                tiles = tir.bind(tir.ceil_div(count, schedule.tokens))
                with tir.loop(schedule.v // (schedule.lanes * schedule.vectors)) as part:
                    lane0 = tir.bind(part * (schedule.lanes * schedule.vectors))
                    with tir.loop(tiles) as t:
                        place = (tir.bind(token + t * schedule.tokens), tokens, inputs, outputs)
                        _tile(args, schedule, epilogue, place, (panel, lane0, begin, end), (t, tiles))
    return builder.function


def _tile(
    args: tir.Arguments,
    schedule: PanelSchedule,
    epilogue: Epilogue,
    place: tuple[tir.Expr, tir.Expr, tir.Expr, tir.Expr],
    panel_part: tuple[tir.Expr, tir.Expr, tir.Expr, tir.Expr],
    turn: tuple[tir.Expr, tir.Expr],
) -> None:
    token, tokens, inputs, outputs = place
    panel, lane0, begin, end = panel_part
    lanes, vectors = schedule.lanes, schedule.vectors
    total = tir.registers(schedule.tokens * vectors * lanes)
    slots = [(t, v, (t * vectors + v) * lanes) for t in range(schedule.tokens) for v in range(vectors)]
    row = tir.bind(panel * schedule.v + lane0)
    for t, v, slot in slots:
        tir.store(total, slot, tir.const(0.0, lanes=lanes), lanes)
        # By the time that the sums are done the lines of y are there.
        tir.prefetch(args["y"], tir.minimum(token + t, tokens - 1) * outputs + row + v * lanes)
    # Tokens past the end repeat the last one and are not stored.
    sources = [tir.bind(tir.minimum(token + t, tokens - 1) * inputs) for t in range(schedule.tokens)]
    # Vector v of the tile lies in the stored part `lane / width` of the panel.
    stored = [(lane0 + v * lanes, tir.floor_div(lane0 + v * lanes, schedule.width)) for v in range(vectors)]
    starts = [
        tir.bind(begin * schedule.v + (end - begin) * part * schedule.width + (lane - part * schedule.width))
        for lane, part in stored
    ]
    # The next panel's weights may lie in memory: every step asks for a part, so that no step has to wait. With few
    # tokens the loop is bound by memory anyway, and the processor sees by itself what comes next.
    asks = schedule.tokens > _FEW_TOKENS
    if asks:
        t, tiles = turn
        ahead = tir.bind(tir.ceil_div(schedule.v, tiles))
        following = tir.bind(end * schedule.v + t * (end - begin) * ahead)
    with tir.loop(end - begin) as step:
        column = tir.bind(args["w1"][begin + step])
        if asks:
            tir.prefetch(args["w0"], following + step * ahead)
        weight = [tir.bind(tir.load(args["w0"], starts[v] + step * schedule.width, lanes)) for v in range(vectors)]
        for t in range(schedule.tokens):
            activation = tir.bind(tir.splat(args["x"][sources[t] + column], lanes))
            for v in range(vectors):
                slot = (t * vectors + v) * lanes
                tir.store(total, slot, tir.load(total, slot, lanes) + activation * weight[v], lanes)
    for t, v, slot in slots:
        output = tir.bind(row + v * lanes)
        at = tir.bind((token + t) * outputs + output)
        inside = tir.bind(tir.minimum(lanes, outputs - output))
        with tir.when(token + t < tokens):
            with tir.when(inside == lanes):
                bias = tir.load(args["bias"], output, lanes)
                value = epilogue.apply(args, tir.load(total, slot, lanes), bias, at, lanes)
                tir.store(args["y"], at, value, lanes)
            # The last panel of an odd number of outputs: only its own lanes exist in y. They go through scratch, since
            # an index known only at run time would force the sums out of the registers everywhere.
            with tir.when(inside < lanes):
                tir.store(args["scratch"], 0, tir.load(total, slot, lanes), lanes)
                with tir.loop(inside) as i:
                    value = epilogue.apply(args, args["scratch"][i], args["bias"][output + i], at + i, 1)
                    tir.store(args["y"], at + i, value)


def reference(
    x: npt.NDArray[np.float32],
    packed: PanelWeight,
    bias: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32] | None,
    epilogue: Epilogue,
) -> npt.NDArray[np.float32]:
    """What the kernel computes, panel by panel: x `[tokens, I]` gives `[tokens, O]`."""
    outputs = packed.shape[0]
    columns, values, ptr = packed.cols.numpy(), packed.values.numpy(), packed.ptr.numpy()
    total = np.zeros((x.shape[0], outputs), np.float64)
    for panel, (begin, end) in enumerate(itertools.pairwise(ptr)):
        rows = slice(panel * packed.v, min((panel + 1) * packed.v, outputs))
        sums = x[:, columns[begin:end]].astype(np.float64) @ values[begin:end]
        total[:, rows] = sums[:, : rows.stop - rows.start]
    return epilogue.reference(total.astype(np.float32), bias, residual)
