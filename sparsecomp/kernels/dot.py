"""The int8 kernel: products of four bytes at once, summed in 32 bits, for linears of models that were quantised.

x is float32 and becomes int8 in scratch, as QuantizeLinear of ONNX computes it. V outputs share their columns as in the
panel kernel, and lie in lanes of 32 bits: AArch64's `sdot` adds four products to each lane, of four columns in a row.
Sixteen kept columns are a step. They are sixteen neighbours, or are picked from a window of 32 or 64 inputs by one
look-up of bytes (`tbl`), which serves all outputs of the panel. Rows with columns of their own (N:M) take a look-up for
every four of them, and a step has four columns of each. Sums are exact; what follows them is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsecomp.kernels import tir
from sparsecomp.kernels.epilogue import Epilogue

WEIGHTS = ("int8", "int8", "int32", "int32")  # values, picks, first columns, and starts with the sums' first values
DIMS = ("tokens", "inputs", "outputs", "group", "splits")
STEP = 16
"""Kept columns of a step: the bytes of a vector."""
_LANES = 4
_PADDING = 64  # bytes behind the levels of a token, which the last window may reach into
_ROUND = 12582912.0  # 1.5 * 2^23: what is added to it is rounded, to even as ONNX wants it
_TAIL_FLOATS = 16


@dataclass(frozen=True)
class Levels:
    """How values become int8: `clip(round(x / scale), least, most) - offset`.

    Attributes:
        scale: between two levels.
        least: the level of the lowest value, without the zero point: -128 less this for int8.
    """

    scale: float
    least: int

    @property
    def most(self) -> int:
        """The level of the highest value."""
        return self.least + 255

    @property
    def offset(self) -> int:
        """What is taken off, so that levels fit int8."""
        return self.least + 128

    def of(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
        """The levels of values."""
        with np.errstate(over="ignore"):
            levels = np.rint(np.clip(x / np.float32(self.scale), self.least, self.most))
        return (levels - self.offset).astype(np.int8)


@dataclass(frozen=True)
class DotSchedule:
    """Register tile of a panel of `v` rows: `tokens` x `v / 4` vectors of sums.

    Attributes:
        v: rows of a panel, a multiple of four.
        tokens: of the tile.
        window: vectors of inputs that the columns of a step are picked from; 1: they are neighbours.
        own: whether each row picks columns of its own, of sixteen inputs.
        native: whether the CPU has `sdot` and `tbl`; without, plain products stand for them.
    """

    v: int
    tokens: int
    window: int
    own: bool
    native: bool

    @property
    def vectors(self) -> int:
        """Vectors of outputs."""
        return self.v // _LANES


@dataclass(frozen=True, eq=False)
class DotWeight:
    """A weight `[O, I]` of int8 in panels of `v` rows, and steps of sixteen columns, or of four for each row.

    Attributes:
        shape: O and I.
        v: rows of a panel.
        values: int8 `[steps, 4, v, 4]`, of each four columns those of each row; `[steps, 1, v, 4]` if each row has its
            own.
        picks: int8 `[steps, 16]`, where the columns lie behind the first one; `[steps, v * 4]` if each row has its own.
        firsts: int32 `[steps]`: the first columns.
        starts: int32 `[panels + 1]`: the steps of each panel.
    """

    shape: tuple[int, int]
    v: int
    values: npt.NDArray[np.int8]
    picks: npt.NDArray[np.int8]
    firsts: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]

    @classmethod
    def pack(cls, weight: npt.NDArray[np.int8], v: int, window: int) -> DotWeight:
        """Pack a weight `[O, I]`; columns that are zero in a whole panel are left out where the window allows."""
        outputs, inputs = weight.shape
        panels = -(-outputs // v)
        padded = np.zeros((panels, v, inputs), np.int8)
        padded.reshape(-1, inputs)[:outputs] = weight
        values, picks, firsts, starts = [], [], [], [0]
        for panel in padded:
            columns = np.flatnonzero(panel.any(axis=0))
            at = 0
            while at < len(columns):
                first = columns[at]
                end = int(np.searchsorted(columns, first + window * STEP))
                end = end if window == 1 else min(end, at + STEP)
                distances = columns[at:end] - first
                places = distances if window == 1 else np.arange(end - at)
                step, pick = np.zeros((STEP, v), np.int8), np.zeros(STEP, np.int8)
                step[places], pick[places] = panel[:, columns[at:end]].T, distances
                values.append(step.reshape(4, 4, v).transpose(0, 2, 1))
                picks.append(pick)
                firsts.append(first)
                at = end
            starts.append(len(firsts))
        return cls(
            (outputs, inputs),
            v,
            np.array(values, np.int8).reshape(-1, 4, v, 4),
            np.array(picks, np.int8).reshape(-1, STEP),
            np.array(firsts, np.int32),
            np.array(starts, np.int32),
        )

    @classmethod
    def pack_own(cls, weight: npt.NDArray[np.int8], v: int) -> DotWeight:
        """Pack a weight `[O, I]` whose rows each have columns of their own.

        Of sixteen inputs as many steps are kept as the fullest row of the panel needs.
        """
        outputs, inputs = weight.shape
        panels, windows = -(-outputs // v), -(-inputs // STEP)
        padded = np.zeros((panels * v, windows * STEP), np.int8)
        padded[:outputs, :inputs] = weight
        parts = padded.reshape(panels, v, windows, STEP)
        # The kept columns first, in their order.
        order = np.argsort(parts == 0, axis=3, kind="stable").astype(np.int8)
        sorted_values = np.take_along_axis(parts, order.astype(np.int64), axis=3)
        counts = -(-(parts != 0).sum(axis=3).max(axis=1) // 4)  # [panels, windows]
        values, picks, firsts = [], [], []
        for panel, part in np.argwhere(counts):
            for step in range(counts[panel, part]):
                four = slice(4 * step, 4 * step + 4)
                values.append(sorted_values[panel, :, part, four])
                picks.append(order[panel, :, part, four])
                firsts.append(part * STEP)
        return cls(
            (outputs, inputs),
            v,
            np.array(values, np.int8).reshape(-1, 1, v, 4),
            np.array(picks, np.int8).reshape(-1, v * 4),
            np.array(firsts, np.int32),
            np.concatenate([[0], counts.sum(axis=1).cumsum()]).astype(np.int32),
        )

    def unpack(self) -> npt.NDArray[np.int8]:
        """The weight, as it was packed."""
        outputs, inputs = self.shape
        weight = np.zeros((len(self.starts) - 1, self.v, inputs + _PADDING), np.int8)
        panel_of = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        for panel, first, pick, step in zip(panel_of, self.firsts, self.picks, self.values, strict=True):
            # `[groups, v, 4]`; a place that nothing was put to has a zero, and perhaps the column of another.
            columns = first + pick.astype(int).reshape(*((4, 1) if len(step) == 4 else (1, self.v)), 4)
            rows = np.arange(self.v)[:, None]
            np.add.at(weight[panel], np.broadcast_arrays(rows, columns, step)[:2], step)
        return weight[:, :, :inputs].reshape(-1, inputs)[:outputs]

    def arrays(self, levels: Levels) -> list[npt.NDArray[np.generic]]:
        """What the kernel takes as `w0`..`w3`; sums begin with what the offset of the levels left out."""
        of_steps = self.values.sum(axis=(1, 3), dtype=np.int64)
        until = np.concatenate([np.zeros((1, self.v), np.int64), of_steps.cumsum(axis=0)])[self.starts]
        sums = (levels.offset * np.diff(until, axis=0)).reshape(-1).astype(np.int32)
        return [self.values, self.picks, self.firsts, np.concatenate([self.starts, sums])]

    def terms(
        self, bias: npt.NDArray[np.float32], scales: npt.NDArray[np.float32], levels: Levels
    ) -> npt.NDArray[np.float32]:
        """What the kernel takes as `bias`: bias and scale of each row of the panels, and the levels of x.

        Args:
            bias: `[O]`.
            scales: of the weight's rows, `[O]`.
            levels: of x.
        """
        padded = np.zeros((2, self.v * (len(self.starts) - 1)), np.float32)
        padded[:, : self.shape[0]] = bias, scales.astype(np.float64) * levels.scale
        numbers = np.array([levels.scale, levels.least, levels.most, levels.offset], np.float32)
        return np.concatenate([padded.reshape(-1), numbers])


def scratch_floats(inputs: int, group: int) -> int:
    """Scratch of one thread: the levels of a group of tokens, and a vector of the last panel."""
    return group * (-(-inputs // STEP) * STEP + _PADDING) // 4 + _TAIL_FLOATS


def build(schedule: DotSchedule, epilogue: Epilogue) -> tir.Expr:
    """The kernel in TIR. Item i is the group `i // splits` of tokens for the part `i % splits` of the panels."""
    builder = tir.KernelBuilder("dot", WEIGHTS)
    with builder.build() as args:
        tokens, inputs, outputs, group, splits = args.sizes(*DIMS)
        panels = tir.bind(tir.ceil_div(outputs, schedule.v))
        rows = tir.bind(panels * schedule.v)
        stride = tir.bind(tir.ceil_div(inputs, STEP) * STEP + _PADDING)
        tail = tir.bind(tir.floor_div(group * stride, 4))
        with tir.loop(args.end - args.begin) as step:
            item = tir.bind(args.begin + step)
            token = tir.bind(tir.floor_div(item, splits) * group)
            count = tir.bind(tir.minimum(group, tokens - token))
            split = tir.bind(tir.floor_mod(item, splits))
            _quantise(args, (token, count), inputs, stride, 2 * rows)
            first = tir.bind(tir.floor_div(split * panels, splits))
            last = tir.bind(tir.floor_div((split + 1) * panels, splits))
            with tir.loop(last - first) as index:
                panel = tir.bind(first + index)
                with tir.loop(tir.ceil_div(count, schedule.tokens)) as t:
                    at = tir.bind(t * schedule.tokens)
                    _tile(args, schedule, epilogue, panel, (token, at, count), (outputs, panels, rows), (stride, tail))
    return builder.function


def _quantise(
    args: tir.Arguments, tokens: tuple[tir.Expr, tir.Expr], inputs: tir.Expr, stride: tir.Expr, numbers: tir.Expr
) -> None:
    """Write the levels of the tokens of a group to scratch."""
    token, count = tokens
    x, levels = args["x"], args.view("scratch", "int8")
    scale, least, most = (tir.bind(args["bias"][numbers + place]) for place in range(3))
    offset = tir.bind(tir.cast("int32", args["bias"][numbers + 3]))

    def level(value: tir.Expr, lanes: int) -> tir.Expr:
        suffix = f"x{lanes}" if lanes > 1 else ""
        value = tir.bind(value / tir.splat(scale, lanes))
        value = tir.minimum(tir.maximum(value, tir.splat(least, lanes)), tir.splat(most, lanes))
        # The low byte of the sum is that of the rounded number.
        bits = tir.reinterpret(f"int32{suffix}", tir.bind(value + tir.const(_ROUND, lanes=lanes)))
        return tir.cast(f"int8{suffix}", bits - tir.splat(offset, lanes))

    full = tir.bind(tir.floor_div(inputs, STEP))
    with tir.loop(count) as t:
        source, place = tir.bind((token + t) * inputs), tir.bind(t * stride)
        with tir.loop(full) as part:
            tir.store(levels, place + part * STEP, level(tir.load(x, source + part * STEP, STEP), STEP), STEP)
        with tir.loop(inputs - full * STEP) as rest:
            tir.store(levels, place + full * STEP + rest, level(x[source + full * STEP + rest], 1))


def _tile(
    args: tir.Arguments,
    schedule: DotSchedule,
    epilogue: Epilogue,
    panel: tir.Expr,
    turn: tuple[tir.Expr, tir.Expr, tir.Expr],
    sizes: tuple[tir.Expr, tir.Expr, tir.Expr],
    places: tuple[tir.Expr, tir.Expr],
) -> None:
    (token, at, count), (outputs, panels, rows), (stride, tail) = turn, sizes, places
    vectors, scratch, bias = schedule.vectors, args["scratch"], args["bias"]
    begin, end = tir.bind(args["w3"][panel]), tir.bind(args["w3"][panel + 1])
    row = tir.bind(panel * schedule.v)
    total = tir.registers(schedule.tokens * schedule.v, "int32")
    slots = [(t, m, (t * vectors + m) * _LANES) for t in range(schedule.tokens) for m in range(vectors)]
    started = [tir.bind(tir.load(args["w3"], panels + 1 + row + m * _LANES, _LANES)) for m in range(vectors)]
    for _, m, slot in slots:
        tir.store(total, slot, started[m], _LANES)
    # Tokens past the end repeat the last one and are not stored.
    sources = [tir.bind(tir.minimum(at + t, count - 1) * stride) for t in range(schedule.tokens)]
    with tir.loop(end - begin) as index:
        step = tir.bind(begin + index)
        column = tir.bind(args["w2"][step])
        if schedule.own:
            _add_own(args, schedule, total, step, [tir.bind(source + column) for source in sources])
            groups, picked = 0, []
        else:
            groups = 4
            picked = [_columns(args, schedule, source + column, step * STEP) for source in sources]
        for group in range(groups):
            for m in range(vectors):
                weight = tir.bind(tir.load(args["w0"], ((step * 4 + group) * vectors + m) * STEP, STEP))
                for t in range(schedule.tokens):
                    slot = (t * vectors + m) * _LANES
                    four = _repeated(picked[t], group)
                    value = _dot(schedule, tir.load(total, slot, _LANES), weight, four)
                    tir.store(total, slot, value, _LANES)
    for t, m, slot in slots:
        output = tir.bind(row + m * _LANES)
        y = tir.bind((token + at + t) * outputs + output)
        inside = tir.bind(tir.minimum(_LANES, outputs - output))
        with tir.when(at + t < count):
            real = tir.cast(f"float32x{_LANES}", tir.load(total, slot, _LANES))
            real = tir.bind(real * tir.load(bias, rows + output, _LANES))
            with tir.when(inside == _LANES):
                value = epilogue.apply(args, real, tir.load(bias, output, _LANES), y, _LANES)
                tir.store(args["y"], y, value, _LANES)
            # As in the panel kernel: only the lanes of outputs that there are exist in y.
            with tir.when(inside < _LANES):
                tir.store(scratch, tail, real, _LANES)
                with tir.loop(inside) as i:
                    value = epilogue.apply(args, scratch[tail + i], bias[output + i], y + i, 1)
                    tir.store(args["y"], y + i, value)


def _add_own(
    args: tir.Arguments, schedule: DotSchedule, total: tir.Expr, step: tir.Expr, sources: list[tir.Expr]
) -> None:
    """Add a step of rows with columns of their own."""
    vectors = schedule.vectors
    for m in range(vectors):
        at = tir.bind((step * vectors + m) * STEP)
        weight = tir.bind(tir.load(args["w0"], at, STEP))
        for t, source in enumerate(sources):
            slot = (t * vectors + m) * _LANES
            four = _columns(args, schedule, source, at)
            tir.store(total, slot, _dot(schedule, tir.load(total, slot, _LANES), weight, four), _LANES)


def _columns(args: tir.Arguments, schedule: DotSchedule, at: tir.Expr, picks: tir.Expr) -> tir.Expr:
    """Sixteen levels of a token, picked from the window at `at`."""
    levels = args.view("scratch", "int8")
    if schedule.window == 1 and not schedule.own:
        return tir.bind(tir.load(levels, at, STEP))
    if not schedule.native:
        places = [tir.cast("int32", args["w1"][picks + i]) for i in range(STEP)]
        return tir.bind(tir.vector_of([levels[at + place] for place in places]))
    table = [tir.bind(tir.load(levels, at + part * STEP, STEP)) for part in range(schedule.window)]
    order = tir.load(args["w1"], picks, STEP)
    return tir.bind(tir.llvm_call(f"int8x{STEP}", f"llvm.aarch64.neon.tbl{schedule.window}.v16i8", *table, order))


def _repeated(levels: tir.Expr, group: int) -> tir.Expr:
    """Four of sixteen levels, for each of four rows: a lane that `sdot` takes by its number."""
    words = tir.bind(tir.reinterpret(f"int32x{_LANES}", levels))
    return tir.reinterpret(f"int8x{STEP}", tir.bind(tir.shuffle(words, words, [group] * _LANES)))


def _dot(schedule: DotSchedule, total: tir.Expr, weight: tir.Expr, levels: tir.Expr) -> tir.Expr:
    """Add the products of four columns to each lane."""
    if schedule.native:
        return tir.llvm_call(f"int32x{_LANES}", "llvm.aarch64.neon.sdot.v4i32.v16i8", total, weight, levels)
    wide = tir.bind(tir.cast(f"int32x{STEP}", weight) * tir.cast(f"int32x{STEP}", tir.bind(levels)))
    for place in range(4):
        total = total + tir.shuffle(wide, wide, [4 * lane + place for lane in range(_LANES)])
    return total


def reference(
    x: npt.NDArray[np.float32],
    packed: DotWeight,
    levels: Levels,
    terms: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32] | None,
    epilogue: Epilogue,
) -> npt.NDArray[np.float32]:
    """What the kernel computes: x `[tokens, I]` gives `[tokens, O]`."""
    rows = packed.v * (len(packed.starts) - 1)
    bias, scales = terms[: packed.shape[0]], terms[rows : rows + packed.shape[0]]
    sums = (levels.of(x).astype(np.int64) + levels.offset) @ packed.unpack().astype(np.int64).T
    return epilogue.reference((sums * scales).astype(np.float32), bias, residual)
