"""Kernels that do the work which a token needs: they look at the activations and read only the rows that stay.

A unit is an entry of the vector that decides: a hidden unit of an FFN, or an input of a linear. A weight is laid out so
that a unit is one contiguous row. A unit stays when the size of its value is above its threshold (CATS, Lee et al.,
arXiv:2404.08763, equation 4; TEAL, Liu et al., arXiv:2408.14690, equation 2). With several tokens a unit is read
when any of them keeps it, and counts as zero for the others.

- `build_dots`: products of x with all rows, and an activation: the gate, or the up projection that is not gated.
- `build_kept_dots`: the same for the rows of the units that stay, times the gate.
- `build_rows`: the sum of the rows of the units that stay, each times its value.
- `build_sum`: adds the parts that threads have summed, then bias, activation and residual.

One token is bound by the bytes that are read. So several rows are streamed at once, and those that follow in the list
of the units that stay are asked for ahead: the hardware cannot guess them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsecomp.kernels import tir
from sparsecomp.kernels.epilogue import Epilogue, activate_reference
from sparsecomp.patterns.gathered import MASK_BITS

Expr = tir.Expr

DENSE_ROWS = ("float32", "int32", "int32", "int64")  # rows, -, -, counters
MASKED_ROWS = ("float32", "uint16", "int32", "int64")  # values, masks, ptr with its end, counters
COUNTERS = 2
"""Entries of the counters: units that stayed and units that were looked at, summed over tokens and calls."""


@dataclass(frozen=True)
class SkipSchedule:
    """How the kernels are built.

    Attributes:
        lanes: of a vector.
        tokens: of the call.
        rows: rows that are streamed at once.
        masked: whether the rows are packed values with a bit mask (`MaskWeight`); needs 16 lanes and `vexpandps`.
    """

    lanes: int
    tokens: int
    rows: int
    masked: bool = False

    @property
    def types(self) -> tuple[str, ...]:
        """Element types of the weight's arrays."""
        return MASKED_ROWS if self.masked else DENSE_ROWS


def padded(width: int, lanes: int) -> int:
    """Floats of a vector of sums: whole vectors."""
    return -(-width // lanes) * lanes


def scratch_floats(units: int, tokens: int, rows: int) -> int:
    """Scratch of one thread: the list of the units that stay, their values, and room to look ahead."""
    return (1 + tokens) * (units + 2 * rows)


def build_dots(schedule: SkipSchedule, epilogue: Epilogue) -> Expr:
    """`y[t, j] = activation(x[t] @ w[j] + bias[j])`; item j is row j. x `[tokens, inputs]`, y `[tokens, units]`."""
    builder = tir.KernelBuilder("dots", schedule.types)
    with builder.build() as args:
        inputs, units = args.sizes("inputs", "units")
        groups = tir.bind(tir.floor_div(args.end - args.begin, schedule.rows))

        def block(first: Expr, count: int) -> None:
            rows = [tir.bind(first + r) for r in range(count)]
            ahead = [tir.bind((first + count + r) * inputs) for r in range(count)]
            for t, sums in enumerate(_dot(args, schedule, rows, ahead, inputs)):
                for row, total in zip(rows, sums, strict=True):
                    at = tir.bind(t * units + row)
                    tir.store(args["y"], at, epilogue.apply(args, total, args["bias"][row], at, 1))

        with tir.loop(groups) as group:
            block(tir.bind(args.begin + group * schedule.rows), schedule.rows)
        done = tir.bind(args.begin + groups * schedule.rows)
        with tir.loop(args.end - done) as rest:
            block(tir.bind(done + rest), 1)
    return builder.function


def build_kept_dots(schedule: SkipSchedule) -> Expr:
    """`h[t, j] = a[t, j] * (x[t] @ w[j] + bias[j])` where a unit stays, zero elsewhere; item p is one part of `parts`.

    y holds `a[tokens, units]`, then `h[tokens, units]`; `residual` holds the thresholds.
    """
    builder = tir.KernelBuilder("kept_dots", schedule.types)
    with builder.build() as args:
        inputs, units, parts = args.sizes("inputs", "units", "parts")
        behind = tir.bind(schedule.tokens * units)
        with tir.loop(args.end - args.begin) as step:
            part = tir.bind(args.begin + step)
            stride = tir.bind(units + 2 * schedule.rows)
            count = _compact(args, schedule, args["y"], args["residual"], (units, stride), part)
            first, last = _share(count, part, parts)
            # The units of a part reach from its first one that stays to the first one of the next.
            low = tir.bind(tir.select(part == 0, tir.const(0, "int32"), _unit(args, first)))
            high = tir.bind(tir.select(part + 1 == parts, units, _unit(args, last)))
            for t in range(schedule.tokens):
                with tir.loop(high - low) as j:
                    tir.store(args["y"], behind + t * units + low + j, tir.const(0.0))

            def block(k: Expr, size: int) -> None:
                rows = [tir.bind(_unit(args, k + r)) for r in range(size)]
                ahead = [tir.bind(_unit(args, k + size + r) * inputs) for r in range(size)]
                for t, sums in enumerate(_dot(args, schedule, rows, ahead, inputs)):
                    for r, (row, total) in enumerate(zip(rows, sums, strict=True)):
                        gate = args["scratch"][(1 + t) * stride + k + r]
                        tir.store(args["y"], behind + t * units + row, gate * (total + args["bias"][row]))

            _blocks(first, last, schedule.rows, block)
    return builder.function


def build_rows(schedule: SkipSchedule) -> Expr:
    """`y[p, t] = sum of x[t, j] * w[j]` over the units j of part p that stay; item p is one part of `parts`.

    x `[tokens, units]`; `bias` holds the thresholds; y `[parts, tokens, width]`, the outputs padded to whole vectors.
    """
    lanes = schedule.lanes
    builder = tir.KernelBuilder("rows", schedule.types)
    with builder.build() as args:
        outputs, units, parts = args.sizes("outputs", "units", "parts")
        full = tir.bind(tir.floor_div(outputs, lanes))
        width = tir.bind(tir.ceil_div(outputs, lanes) * lanes)
        with tir.loop(args.end - args.begin) as step:
            part = tir.bind(args.begin + step)
            stride = tir.bind(units + 2 * schedule.rows)
            count = _compact(args, schedule, args["x"], args["bias"], (units, stride), part)
            first, last = _share(count, part, parts)
            base = tir.bind(part * schedule.tokens * width)
            with tir.loop(tir.floor_div(width * schedule.tokens, lanes)) as v:
                tir.store(args["y"], base + v * lanes, tir.const(0.0, lanes=lanes), lanes)

            def block(k: Expr, size: int) -> None:
                values = [
                    [tir.bind(args["scratch"][(1 + t) * stride + k + r]) for r in range(size)]
                    for t in range(schedule.tokens)
                ]
                units_here = [tir.bind(_unit(args, k + r)) for r in range(size)]
                ahead = [tir.bind(_unit(args, k + size + r)) for r in range(size)]
                sums = [tir.bind(base + t * width) for t in range(schedule.tokens)]
                if schedule.masked:
                    _add_masked(args, units_here, ahead, values, sums, tir.floor_div(width, lanes))
                else:
                    _add_dense(args, schedule, (units_here, ahead), values, sums, (outputs, full))

            _blocks(first, last, schedule.rows, block)
    return builder.function


def build_sum(lanes: int, epilogue: Epilogue, gated: bool) -> Expr:
    """`y[t, j] = activation(sum of parts x[p, t, j] + bias[j]) [+ residual]`; item i is the i-th vector of a token.

    Gated, `residual` holds the parts of a second sum with the bias `w0`, by which the result is multiplied:
    `activation(first) * second`. Items are `tokens * ceil(outputs / lanes)`; x `[parts, tokens, width]`.
    """
    builder = tir.KernelBuilder("sum", ("float32",))
    with builder.build() as args:
        tokens, outputs, parts = args.sizes("tokens", "outputs", "parts")
        vectors = tir.bind(tir.ceil_div(outputs, lanes))
        distance = tir.bind(tokens * vectors * lanes)
        plain = Epilogue(epilogue.activation, epilogue.residual and not gated)

        def added(buffer: Expr, at: Expr) -> Expr:
            total = tir.registers(lanes)
            tir.store(total, 0, tir.load(buffer, at, lanes), lanes)
            with tir.loop(parts - 1) as p:
                tir.store(total, 0, tir.load(total, 0, lanes) + tir.load(buffer, at + (p + 1) * distance, lanes), lanes)
            return total

        def finish(total: Expr, second: Expr | None, lane: Expr | int, place: tuple[Expr, Expr], size: int) -> None:
            column, at = place
            bias = tir.load(args["bias"], column, size)
            value = plain.apply(args, tir.load(total, lane, size), bias, at, size)
            if second is not None:
                value = value * (tir.load(second, lane, size) + tir.load(args["w0"], column, size))
            tir.store(args["y"], at, value, size)

        with tir.loop(args.end - args.begin) as step:
            item = tir.bind(args.begin + step)
            token = tir.bind(tir.floor_div(item, vectors))
            column = tir.bind(tir.floor_mod(item, vectors) * lanes)
            total = added(args["x"], tir.bind(item * lanes))
            second = added(args["residual"], tir.bind(item * lanes)) if gated else None
            at = tir.bind(token * outputs + column)
            with tir.when(column + lanes <= outputs):
                finish(total, second, 0, (column, at), lanes)
            with tir.when(column + lanes > outputs), tir.loop(outputs - column) as lane:
                finish(total, second, lane, (column + lane, at + lane), 1)
    return builder.function


# -- parts of kernels -------------------------------------------------------------------------------------------------


def _compact(
    args: tir.Arguments, schedule: SkipSchedule, values: Expr, thresholds: Expr, sizes: tuple[Expr, Expr], part: Expr
) -> Expr:
    """List the units that stay and their values in scratch; gives their number.

    Every part makes the whole list for itself: that is cheaper than to wait for another thread. It is written without
    branches, since which units stay cannot be predicted.
    """
    units, stride = sizes
    count, kept = tir.registers(1, "int32"), tir.registers(1, "int32")
    tir.store(count, 0, tir.const(0, "int32"))
    tir.store(kept, 0, tir.const(0, "int32"))
    with tir.loop(units) as j:
        at = tir.bind(count[0])
        threshold = tir.bind(thresholds[j])
        tir.store(args["scratch"], at, tir.reinterpret("float32", j))
        stays = []
        for t in range(schedule.tokens):
            value = tir.bind(values[t * units + j])
            # Written so that NaN stays: a dense layer would show it too.
            small = tir.bind(tir.select(value < tir.const(0.0), tir.const(0.0) - value, value) <= threshold)
            stays.append(tir.bind(tir.select(small, tir.const(0, "int32"), tir.const(1, "int32"))))
            tir.store(args["scratch"], (1 + t) * stride + at, tir.select(small, tir.const(0.0), value))
        total = stays[0]
        union = stays[0]
        for one in stays[1:]:
            total, union = total + one, union | one
        tir.store(kept, 0, kept[0] + total)
        tir.store(count, 0, at + union)
    # What is asked for ahead of the end: the first unit, any valid one would do.
    for r in range(2 * schedule.rows):
        tir.store(args["scratch"], count[0] + r, tir.const(0.0))  # has the bits of 0
    with tir.when(part == 0):
        counters = args["w3"]
        tir.store(counters, 0, counters[0] + tir.cast("int64", kept[0]))
        tir.store(counters, 1, counters[1] + tir.cast("int64", units * schedule.tokens))
    return tir.bind(count[0])


def _share(count: Expr, part: Expr, parts: Expr) -> tuple[Expr, Expr]:
    """The range of a part in the list."""
    return tir.bind(tir.floor_div(count * part, parts)), tir.bind(tir.floor_div(count * (part + 1), parts))


def _unit(args: tir.Arguments, k: Expr) -> Expr:
    return tir.reinterpret("int32", args["scratch"][k])


def _blocks(first: Expr, last: Expr, rows: int, block: Callable[[Expr, int], None]) -> None:
    """Take a range in steps of so many rows, then one by one."""
    groups = tir.bind(tir.floor_div(last - first, rows))
    with tir.loop(groups) as group:
        block(tir.bind(first + group * rows), rows)
    done = tir.bind(first + groups * rows)
    with tir.loop(last - done) as rest:
        block(tir.bind(done + rest), 1)


def _dot(
    args: tir.Arguments, schedule: SkipSchedule, rows: list[Expr], ahead: list[Expr], inputs: Expr
) -> list[list[Expr]]:
    """Products of every token of x with rows of the weight: a list of scalars for every token."""
    lanes, tokens = schedule.lanes, range(schedule.tokens)
    full = tir.bind(tir.floor_div(inputs, lanes))
    total = tir.registers(schedule.tokens * len(rows) * lanes)
    rest = tir.registers(schedule.tokens * len(rows))
    for place in range(schedule.tokens * len(rows)):
        tir.store(total, place * lanes, tir.const(0.0, lanes=lanes), lanes)
        tir.store(rest, place, tir.const(0.0))
    rows_of = _MaskedRows(args, rows, inputs) if schedule.masked else _DenseRows(args, rows, ahead, inputs)

    def add(buffer: Expr, vectors: list[Expr], column: Expr, size: int) -> None:
        for t in tokens:
            activation = tir.bind(tir.load(args["x"], t * inputs + column, size))
            for r, vector in enumerate(vectors):
                place = (t * len(rows) + r) * size
                tir.store(buffer, place, tir.load(buffer, place, size) + vector * activation, size)

    with tir.loop(full) as v:
        add(total, rows_of.vectors(v, lanes), tir.bind(v * lanes), lanes)
    # The last inputs fill no vector: one by one, so that nothing is read past the end of x.
    rows_of.start_rest(full)
    with tir.loop(inputs - full * lanes) as i:
        add(rest, rows_of.rest(full, i, lanes), tir.bind(full * lanes + i), 1)
    return [
        [
            tir.bind(_sum_lanes(tir.load(total, (t * len(rows) + r) * lanes, lanes), lanes) + rest[t * len(rows) + r])
            for r in range(len(rows))
        ]
        for t in tokens
    ]


class _DenseRows:
    def __init__(self, args: tir.Arguments, rows: list[Expr], ahead: list[Expr], inputs: Expr) -> None:
        self._args, self._ahead = args, ahead
        self._starts = [tir.bind(row * inputs) for row in rows]

    def vectors(self, v: Expr, lanes: int) -> list[Expr]:
        for start in self._ahead:
            tir.prefetch(self._args["w0"], start + v * lanes)
        return [tir.bind(tir.load(self._args["w0"], start + v * lanes, lanes)) for start in self._starts]

    def start_rest(self, full: Expr) -> None:
        """Nothing to prepare."""

    def rest(self, full: Expr, i: Expr, lanes: int) -> list[Expr]:
        return [tir.bind(self._args["w0"][start + full * lanes + i]) for start in self._starts]


class _MaskedRows:
    """Rows of packed values: where each has got to is kept in a register."""

    def __init__(self, args: tir.Arguments, rows: list[Expr], width: Expr) -> None:
        self._args = args
        words = tir.bind(tir.ceil_div(width, MASK_BITS))
        self._masks = [tir.bind(row * words) for row in rows]
        self._at = tir.registers(len(rows), "int64")
        self._words = tir.registers(len(rows), "int64")
        for r, row in enumerate(rows):
            tir.store(self._at, r, tir.cast("int64", args["w2"][row]))

    def vectors(self, v: Expr, lanes: int) -> list[Expr]:
        found = []
        for r, start in enumerate(self._masks):
            mask = tir.bind(self._args["w1"][start + v])
            at = tir.bind(self._at[r])
            found.append(tir.bind(_expand(self._args, mask, at)))
            tir.store(self._at, r, at + tir.cast("int64", tir.popcount(tir.cast("int32", mask))))
        return found

    def start_rest(self, full: Expr) -> None:
        for r, start in enumerate(self._masks):
            # One past the masks of the last row where there is no rest; it is not used then.
            tir.store(self._words, r, tir.cast("int64", self._args["w1"][start + full]))

    def rest(self, full: Expr, i: Expr, lanes: int) -> list[Expr]:
        found = []
        for r in range(len(self._masks)):
            kept = tir.bind((self._words[r] >> tir.cast("int64", i)) & 1)
            found.append(tir.bind(tir.select(kept == 1, self._args["w0"][self._at[r]], tir.const(0.0))))
            tir.store(self._at, r, self._at[r] + kept)
        return found


def _expand(args: tir.Arguments, mask: Expr, at: Expr) -> Expr:
    # The bits are the mask register as it is.
    kept = tir.reinterpret(f"uint1x{MASK_BITS}", mask)
    packed = tir.fence(tir.load(args["w0"], at, MASK_BITS), MASK_BITS)
    zero = tir.const(0.0, lanes=MASK_BITS)
    return tir.llvm_call(f"float32x{MASK_BITS}", "llvm.x86.avx512.mask.expand", packed, zero, kept)


def _add_dense(
    args: tir.Arguments,
    schedule: SkipSchedule,
    rows: tuple[list[Expr], list[Expr]],
    values: list[list[Expr]],
    sums: list[Expr],
    sizes: tuple[Expr, Expr],
) -> None:
    """Add rows, each times its value of a token, to the sums of every token."""
    lanes, (outputs, full) = schedule.lanes, sizes
    starts = [tir.bind(row * outputs) for row in rows[0]]
    ahead = [tir.bind(row * outputs) for row in rows[1]]

    def add(column: Expr, size: int) -> None:
        vectors = [tir.bind(tir.load(args["w0"], start + column, size)) for start in starts]
        for t, place in enumerate(sums):
            total = tir.load(args["y"], place + column, size)
            for vector, value in zip(vectors, values[t], strict=True):
                total = total + vector * tir.splat(value, size)
            tir.store(args["y"], place + column, total, size)

    with tir.loop(full) as v:
        column = tir.bind(v * lanes)
        for start in ahead:
            tir.prefetch(args["w0"], start + column)
        add(column, lanes)
    with tir.loop(outputs - full * lanes) as rest:
        add(tir.bind(full * lanes + rest), 1)


def _add_masked(
    args: tir.Arguments, rows: list[Expr], ahead: list[Expr], values: list[list[Expr]], sums: list[Expr], words: Expr
) -> None:
    """As `_add_dense`; the sums are padded, and the masks have no bits there."""
    outputs = tir.bind(words * MASK_BITS)
    rows_of = _MaskedRows(args, rows, outputs)
    starts = [tir.bind(args["w2"][row]) for row in ahead]
    # Of every row to come as many entries in a step as take its values to their end in the last one.
    paces = [
        tir.bind(tir.ceil_div(args["w2"][row + 1] - start, words)) for row, start in zip(ahead, starts, strict=True)
    ]
    for row in ahead:
        # Two cache lines of masks, which are 1024 columns; the hardware finds those that follow.
        tir.prefetch(args["w1"], row * words)
        tir.prefetch(args["w1"], row * words + 32)
    with tir.loop(words) as v:
        column = tir.bind(v * MASK_BITS)
        for start, pace in zip(starts, paces, strict=True):
            tir.prefetch(args["w0"], tir.cast("int64", start + v * pace))
        vectors = rows_of.vectors(v, MASK_BITS)
        for t, place in enumerate(sums):
            total = tir.load(args["y"], place + column, MASK_BITS)
            for vector, value in zip(vectors, values[t], strict=True):
                total = total + vector * tir.splat(value, MASK_BITS)
            tir.store(args["y"], place + column, total, MASK_BITS)


def _sum_lanes(vector: Expr, lanes: int) -> Expr:
    """The lanes of a vector added up, by halves."""
    current = tir.bind(vector)
    while lanes > 1:
        lanes //= 2
        if lanes == 1:
            return tir.lane(current, 0) + tir.lane(current, 1)
        halves = [tir.shuffle(current, current, range(start, start + lanes)) for start in (0, lanes)]
        current = tir.bind(halves[0] + halves[1])
    return current


# -- references -------------------------------------------------------------------------------------------------------


def kept_reference(values: npt.NDArray[np.float32], thresholds: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Values `[tokens, units]` with those set to zero that do not stay."""
    return np.where(np.abs(values) <= thresholds, np.float32(0), values)


def ffn_reference(
    x: npt.NDArray[np.float32],
    gate: npt.NDArray[np.float32],
    up: npt.NDArray[np.float32] | None,
    down: npt.NDArray[np.float32],
    thresholds: npt.NDArray[np.float32],
    activation: str,
) -> npt.NDArray[np.float32]:
    """An FFN without biases that skips units: x `[tokens, I]`, gate and up `[H, I]`, down `[H, O]`."""
    active = activate_reference(activation, x.astype(np.float64) @ gate.T.astype(np.float64)).astype(np.float32)
    hidden = kept_reference(active, thresholds).astype(np.float64)
    if up is not None:
        hidden = hidden * (x.astype(np.float64) @ up.T.astype(np.float64))
    return (hidden @ down).astype(np.float32)
