"""Kernels for one or a few tokens: each row of the weight is one dot product, vectorised over its kept columns.

Bound by the bytes of the weight where the caches do not hold it. `build_gather` reads 16-bit indices, four of them in
one 64-bit load: loads are what limits the loop, shifts are free beside them. `build_mask` reads one bit per entry and
spreads packed values over their columns by one shuffle (x86: `pshufb` with a control vector for every 4-bit mask, or
`vexpandps`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sparsecomp.kernels import tir
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.patterns.gathered import MASK_BITS, GatherWeight, MaskWeight

GATHER_WEIGHTS = ("float32", "uint64", "int32")  # values, columns (four in a word), ptr
MASK_WEIGHTS = ("float32", "uint16", "int32", "uint8")  # values, masks, ptr, shuffle controls
DIMS = ("tokens", "inputs", "outputs")
_INDICES_PER_WORD = 4
_NIBBLE = 4
# Entries ahead of the loop whose values are asked for: the hardware alone leaves a quarter of the bandwidth unused.
_AHEAD = 512


@dataclass(frozen=True)
class GatherSchedule:
    """`sums` vectors of `lanes` sums grow at once, to hide the latency of the multiply-add."""

    lanes: int
    sums: int

    @property
    def group(self) -> int:
        """Entries that one step takes, and that rows are padded to."""
        return self.lanes * self.sums


@dataclass(frozen=True)
class MaskSchedule:
    """How packed values reach their columns: by `pshufb`, or by `expand` (AVX-512)."""

    spread: Literal["pshufb", "expand"]


def gather_weights(packed: GatherWeight) -> list[npt.NDArray[np.generic]]:
    """The arrays that the gather kernel takes as `w0`..`w2`."""
    return [packed.values, packed.columns.view(np.uint64), packed.ptr]


def mask_weights(packed: MaskWeight) -> list[npt.NDArray[np.generic]]:
    """The arrays that the mask kernel takes as `w0`..`w3`."""
    return [packed.values, packed.masks, packed.ptr, shuffle_controls()]


def shuffle_controls() -> npt.NDArray[np.uint8]:
    """`[16, 16]`: for every 4-bit mask the `pshufb` control that moves the next packed floats to the kept lanes.

    A control byte with its high bit set gives zero, so lanes that are not kept need no second instruction.
    """
    controls = np.full((1 << _NIBBLE, 4 * _NIBBLE), 0x80, np.uint8)
    for mask in range(1 << _NIBBLE):
        kept = [lane for lane in range(_NIBBLE) if mask >> lane & 1]
        for position, lane in enumerate(kept):
            controls[mask, 4 * lane : 4 * lane + 4] = np.arange(4 * position, 4 * position + 4)
    return controls


def build_gather(schedule: GatherSchedule, epilogue: Epilogue) -> tir.Expr:
    """The gather kernel in TIR; item i is row i of the weight."""
    lanes = schedule.lanes
    builder = tir.KernelBuilder("gather", GATHER_WEIGHTS)
    with builder.build() as args:
        tokens, inputs, outputs = args.sizes(*DIMS)
        with tir.loop(tokens) as token, tir.loop(args.end - args.begin) as step:
            row = tir.bind(args.begin + step)
            total = tir.registers(schedule.group)
            for s in range(schedule.sums):
                tir.store(total, s * lanes, tir.const(0.0, lanes=lanes), lanes)
            source = tir.bind(token * inputs)
            first, last = tir.bind(args["w2"][row]), tir.bind(args["w2"][row + 1])
            with tir.loop(last - first) as index:
                group = tir.bind(first + index)
                tir.prefetch(args["w0"], group * schedule.group + _AHEAD)
                for s, activations in enumerate(_gathered(args, group, source, schedule)):
                    values = tir.load(args["w0"], group * schedule.group + s * lanes, lanes)
                    tir.store(total, s * lanes, tir.load(total, s * lanes, lanes) + values * activations, lanes)
            _store_row(args, epilogue, total, (schedule.sums, lanes), row, tir.bind(token * outputs + row))
    return builder.function


def _gathered(args: tir.Arguments, group: tir.Expr, source: tir.Expr, schedule: GatherSchedule) -> list[tir.Expr]:
    """Activations at the columns of a group, a vector for each of its sums."""
    words = schedule.group // _INDICES_PER_WORD
    scalars = []
    for w in range(words):
        word = tir.bind(args["w1"][group * words + w])
        for position in range(_INDICES_PER_WORD):
            shifted = word >> tir.const(16 * position, "uint64") if position else word
            column = shifted & tir.const(0xFFFF, "uint64") if position < _INDICES_PER_WORD - 1 else shifted
            scalars.append(args["x"][source + tir.cast("int32", column)])
    return [tir.vector_of(scalars[start : start + schedule.lanes]) for start in range(0, len(scalars), schedule.lanes)]


def build_mask(schedule: MaskSchedule, epilogue: Epilogue) -> tir.Expr:
    """The mask kernel in TIR; item i is row i of the weight."""
    spread = {"pshufb": _spread_pshufb, "expand": _spread_expand}[schedule.spread]
    lanes = MASK_BITS if schedule.spread == "expand" else _NIBBLE
    sums = MASK_BITS // lanes
    builder = tir.KernelBuilder("mask", MASK_WEIGHTS)
    with builder.build() as args:
        tokens, inputs, outputs = args.sizes(*DIMS)
        words = tir.bind(tir.ceil_div(inputs, MASK_BITS))
        full = tir.bind(tir.floor_div(inputs, MASK_BITS))
        with tir.loop(tokens) as token, tir.loop(args.end - args.begin) as step:
            row = tir.bind(args.begin + step)
            source = tir.bind(token * inputs)
            total = tir.registers(MASK_BITS)
            for s in range(sums):
                tir.store(total, s * lanes, tir.const(0.0, lanes=lanes), lanes)
            # 64-bit, as addresses are: nothing has to be extended in the loop.
            at = tir.registers(1, "int64")
            tir.store(at, 0, tir.cast("int64", args["w2"][row]))
            with tir.loop(full) as w:
                mask = tir.bind(tir.cast("int64", args["w1"][row * words + w]))
                start = tir.bind(at[0])
                tir.prefetch(args["w0"], start + _AHEAD)
                for s, vector in enumerate(spread(args, mask, start)):
                    activation = tir.load(args["x"], source + w * MASK_BITS + s * lanes, lanes)
                    tir.store(total, s * lanes, tir.load(total, s * lanes, lanes) + vector * activation, lanes)
                tir.store(at, 0, start + tir.popcount(mask))
            # The last inputs fill no word: one by one, so that nothing is read past the end of x.
            rest = tir.registers(1)
            tir.store(rest, 0, tir.const(0.0))
            with tir.when(full < words):
                mask = tir.bind(tir.cast("int64", args["w1"][row * words + full]))
                with tir.loop(inputs - full * MASK_BITS) as bit:
                    kept = tir.bind((mask >> tir.cast("int64", bit)) & 1)
                    value = tir.select(kept == 1, args["w0"][at[0]], tir.const(0.0))
                    tir.store(rest, 0, rest[0] + value * args["x"][source + full * MASK_BITS + bit])
                    tir.store(at, 0, at[0] + kept)
            tir.store(total, 0, total[0] + rest[0])
            _store_row(args, epilogue, total, (sums, lanes), row, tir.bind(token * outputs + row))
    return builder.function


def _spread_pshufb(args: tir.Arguments, mask: tir.Expr, start: tir.Expr) -> list[tir.Expr]:
    vectors = []
    for s in range(MASK_BITS // _NIBBLE):
        before = mask & ((1 << (_NIBBLE * s)) - 1)
        at = tir.bind(start + tir.popcount(before)) if s else start
        nibble = tir.bind((mask >> (_NIBBLE * s)) & (len(shuffle_controls()) - 1))
        control = tir.load(args["w3"], nibble * 4 * _NIBBLE, 4 * _NIBBLE)
        packed = tir.reinterpret("uint8x16", tir.load(args["w0"], at, _NIBBLE))
        spread = tir.llvm_call("uint8x16", "llvm.x86.ssse3.pshuf.b.128", packed, control)
        vectors.append(tir.reinterpret(f"float32x{_NIBBLE}", spread))
    return vectors


def _spread_expand(args: tir.Arguments, mask: tir.Expr, start: tir.Expr) -> list[tir.Expr]:
    lane_bits = tir.vector_of([tir.const(1 << lane, "int32") for lane in range(MASK_BITS)])
    kept = (tir.splat(tir.cast("int32", mask), MASK_BITS) & lane_bits) != tir.const(0, "int32", MASK_BITS)
    packed = tir.load(args["w0"], start, MASK_BITS)
    return [
        tir.llvm_call(
            f"float32x{MASK_BITS}", "llvm.x86.avx512.mask.expand", packed, tir.const(0.0, lanes=MASK_BITS), kept
        )
    ]


def _store_row(
    args: tir.Arguments, epilogue: Epilogue, total: tir.Expr, shape: tuple[int, int], row: tir.Expr, at: tir.Expr
) -> None:
    """Add the lanes of the sums and store one output."""
    sums, lanes = shape
    joined = tir.load(total, 0, lanes)
    for s in range(1, sums):
        joined = joined + tir.load(total, s * lanes, lanes)
    vector = tir.bind(joined)
    parts = [tir.lane(vector, i) for i in range(lanes)]
    while len(parts) > 1:
        parts = [tir.bind(a + b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    tir.store(args["y"], at, epilogue.apply(args, parts[0], args["bias"][row], at, 1))


def reference(
    x: npt.NDArray[np.float32],
    packed: GatherWeight | MaskWeight,
    bias: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32] | None,
    epilogue: Epilogue,
) -> npt.NDArray[np.float32]:
    """What both kernels compute, entry by entry of the packed arrays: x `[tokens, I]` gives `[tokens, O]`."""
    total = np.zeros((x.shape[0], packed.shape[0]), np.float64)
    for row in range(packed.shape[0]):
        if isinstance(packed, GatherWeight):
            span = slice(int(packed.ptr[row]) * packed.group, int(packed.ptr[row + 1]) * packed.group)
            columns, values = packed.columns[span].astype(np.int64), packed.values[span]
        else:
            bits = [bit for word in packed.masks[row] for bit in (int(word) >> np.arange(MASK_BITS)) & 1]
            columns = np.nonzero(bits)[0]
            values = packed.values[int(packed.ptr[row]) :][: len(columns)]
        total[:, row] = x[:, columns].astype(np.float64) @ values
    return epilogue.reference(total.astype(np.float32), bias, residual)
