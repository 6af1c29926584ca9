"""The row kernel: weights whose rows are each their own, with the tokens in the vector lanes.

A tile of tokens is transposed to feature-major scratch, so that every kept weight is one broadcast times contiguous
loads. Columns come in blocks that keep the touched part of the tile in the L1 cache; the sums of a chunk of rows wait
in scratch between blocks and are transposed back, with the epilogue, when the chunk is done. See
`sparsecomp.patterns.rows` for the pairs of rows that share loads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsecomp.kernels import tir
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.patterns.rows import PAIR_FIELDS, RowWeight

WEIGHTS = ("float32", "uint16", "int32", "int32")  # values, columns, pairs, rows
DIMS = ("tokens", "inputs", "outputs", "blocks", "block_floats", "chunk", "splits")
_CACHE_LINE = 16  # floats


@dataclass(frozen=True)
class RowSchedule:
    """Register shape: `vectors` vectors of `lanes` tokens for each of the two rows of a pair."""

    lanes: int
    vectors: int

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        return self.lanes * self.vectors


def weights(packed: RowWeight) -> list[npt.NDArray[np.generic]]:
    """The arrays that the kernel takes as `w0`..`w3`."""
    return [packed.values, packed.columns, packed.pairs, packed.rows]


def scratch_floats(inputs: int, chunk: int, schedule: RowSchedule) -> int:
    """Scratch of one thread: the transposed tile, the sums of a chunk with its spare row, and the staging area."""
    return (inputs + chunk + 1) * schedule.tile + schedule.lanes * (chunk + _CACHE_LINE)


def build(schedule: RowSchedule, epilogue: Epilogue) -> tir.Expr:
    """The kernel in TIR. Item i is tile `i // splits` for the part `i % splits` of the chunks."""
    builder = tir.KernelBuilder("rows", WEIGHTS)
    tile = schedule.tile
    with builder.build() as args:
        # The size of a block of the tile comes from the host: if LLVM saw that it is a multiple of the tile, it would
        # factor the two out of every address and need three instructions where one does.
        tokens, inputs, outputs, blocks, block_floats, chunk, splits = args.sizes(*DIMS)
        chunks = tir.bind(tir.ceil_div(outputs, chunk))
        sums = tir.bind(inputs * tile)
        # An odd number of cache lines from row to row of the staging area: they lie in different sets of the cache.
        places = (sums, tir.bind(sums + (chunk + 1) * tile), tir.bind(chunk + _CACHE_LINE))
        with tir.loop(args.end - args.begin) as step:
            item = tir.bind(args.begin + step)
            token = tir.bind(tir.floor_div(item, splits) * tile)
            split = tir.bind(tir.floor_mod(item, splits))
            _gather_tile(args, schedule, token, tokens, inputs)
            first = tir.bind(tir.floor_div(split * chunks, splits))
            last = tir.bind(tir.floor_div((split + 1) * chunks, splits))
            with tir.loop(last - first) as index:
                at = tir.bind(first + index)
                row = tir.bind(at * chunk)
                rows = tir.bind(tir.minimum(chunk, outputs - row))
                pairs = tir.bind(tir.ceil_div(rows, 2))
                with tir.loop(blocks) as b:
                    base = tir.bind(at * blocks * tir.floor_div(chunk, 2) + b * pairs)
                    with tir.loop(pairs) as p:
                        _pair(args, schedule, tir.bind(base + p), b, tir.bind(b * block_floats), sums)
                _store_chunk(args, schedule, epilogue, (token, tokens), (row, rows, outputs), places)
    return builder.function


def _gather_tile(
    args: tir.Arguments, schedule: RowSchedule, token: tir.Expr, tokens: tir.Expr, inputs: tir.Expr
) -> None:
    """Transpose x[token : token + tile] into scratch; tokens past the end repeat the last, and are never stored."""
    lanes, tile, x, scratch = schedule.lanes, schedule.tile, args["x"], args["scratch"]
    per_line = max(1, _CACHE_LINE // lanes)
    full = tir.bind(tir.floor_div(inputs, lanes))

    def source(offset: tir.Expr) -> tir.Expr:
        return tir.minimum(token + offset, tokens - 1) * inputs

    with tir.loop(tir.ceil_div(full, per_line)) as line, tir.loop(schedule.vectors) as v:
        rows = [tir.bind(source(v * lanes + i)) for i in range(lanes)]
        with tir.loop(tir.minimum(per_line, full - line * per_line)) as part:
            column = tir.bind((line * per_line + part) * lanes)
            square = [tir.bind(tir.load(x, rows[i] + column, lanes)) for i in range(lanes)]
            for i, vector in enumerate(tir.transpose(square)):
                tir.store(scratch, (column + i) * tile + v * lanes, vector, lanes)
    with tir.loop(inputs - full * lanes) as rest, tir.loop(tile) as t:
        column = tir.bind(full * lanes + rest)
        tir.store(scratch, column * tile + t, tir.load(x, source(t) + column))


def _pair(
    args: tir.Arguments, schedule: RowSchedule, pair: tir.Expr, block: tir.Expr, tile_base: tir.Expr, sums: tir.Expr
) -> None:
    """Add one block of columns to the sums of two rows."""
    lanes, tile, vectors = schedule.lanes, schedule.tile, schedule.vectors
    scratch, values, columns = args["scratch"], args["w0"], args["w1"]
    fields = [tir.bind(args["w2"][pair * PAIR_FIELDS + i]) for i in range(PAIR_FIELDS)]
    value0, column0, both, turns, left = fields
    place = [tir.bind(sums + args["w3"][pair * 2 + member] * tile) for member in (0, 1)]
    total = tir.registers(2 * tile)
    slots = [(member, v, member * tile + v * lanes) for member in (0, 1) for v in range(vectors)]
    for member, v, slot in slots:
        waiting = tir.load(scratch, place[member] + v * lanes, lanes)
        tir.store(total, slot, tir.select(block == 0, tir.const(0.0, lanes=lanes), waiting), lanes)

    def weight(at: tir.Expr) -> tir.Expr:
        return tir.bind(tir.splat(values[at], lanes))

    def source(at: tir.Expr) -> tir.Expr:
        return tir.bind(tile_base + tir.cast("int32", columns[at]) * tile)

    def add(member: int, v: int, factor: tir.Expr, activation: tir.Expr) -> None:
        slot = member * tile + v * lanes
        tir.store(total, slot, tir.load(total, slot, lanes) + factor * activation, lanes)

    with tir.loop(both) as i:
        factors = [weight(value0 + 2 * i), weight(value0 + 2 * i + 1)]
        at = source(column0 + i)
        for v in range(vectors):
            activation = tir.bind(tir.load(scratch, at + v * lanes, lanes))
            add(0, v, factors[0], activation)
            add(1, v, factors[1], activation)
    value1, column1 = tir.bind(value0 + 2 * both), tir.bind(column0 + both)
    with tir.loop(turns) as i:
        for member in (0, 1):
            factor, at = weight(value1 + 2 * i + member), source(column1 + 2 * i + member)
            for v in range(vectors):
                add(member, v, factor, tir.load(scratch, at + v * lanes, lanes))
    value2, column2 = tir.bind(value1 + 2 * turns), tir.bind(column1 + 2 * turns)
    with tir.loop(left) as i:
        factor, at = weight(value2 + i), source(column2 + i)
        for v in range(vectors):
            add(0, v, factor, tir.load(scratch, at + v * lanes, lanes))
    for member, v, slot in slots:
        tir.store(scratch, place[member] + v * lanes, tir.load(total, slot, lanes), lanes)


def _store_chunk(
    args: tir.Arguments,
    schedule: RowSchedule,
    epilogue: Epilogue,
    token_range: tuple[tir.Expr, tir.Expr],
    row_range: tuple[tir.Expr, tir.Expr, tir.Expr],
    places: tuple[tir.Expr, tir.Expr, tir.Expr],
) -> None:
    """Transpose the sums of a chunk back to y with the epilogue.

    The squares of one vector of tokens go to a staging area first, from where each token's outputs are written in one
    run: rows of y often lie a multiple of 4 KB apart, and stores to many of them in turn evict each other's lines from
    the L1 cache before they are written (768 to 3072 outputs on a Zen 5: the stores took 2.5 times as long).
    """
    token, tokens = token_range
    row, rows, outputs = row_range
    sums, stage, stride = places
    lanes, tile, scratch = schedule.lanes, schedule.tile, args["scratch"]
    full = tir.bind(tir.floor_div(rows, lanes))
    with tir.loop(schedule.vectors) as v:
        first = tir.bind(token + v * lanes)
        with tir.loop(full) as part:
            o = tir.bind(part * lanes)
            square = [tir.bind(tir.load(scratch, sums + (o + i) * tile + v * lanes, lanes)) for i in range(lanes)]
            for i, vector in enumerate(tir.transpose(square)):
                tir.store(scratch, stage + i * stride + o, vector, lanes)
        with tir.loop(tir.minimum(lanes, tokens - first)) as t, tir.loop(full) as part:
            o = tir.bind(part * lanes)
            at = tir.bind((first + t) * outputs + row + o)
            total = tir.bind(tir.load(scratch, stage + t * stride + o, lanes))
            bias = tir.bind(tir.load(args["bias"], row + o, lanes))
            tir.store(args["y"], at, epilogue.apply(args, total, bias, at, lanes), lanes)
    with tir.loop(rows - full * lanes) as rest, tir.loop(tir.minimum(tile, tokens - token)) as t:
        o = tir.bind(full * lanes + rest)
        at = tir.bind((token + t) * outputs + row + o)
        total = tir.bind(scratch[sums + o * tile + t])
        tir.store(args["y"], at, epilogue.apply(args, total, args["bias"][row + o], at, 1))


def reference(
    x: npt.NDArray[np.float32],
    packed: RowWeight,
    bias: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32] | None,
    epilogue: Epilogue,
) -> npt.NDArray[np.float32]:
    """What the kernel computes, from its packed arrays: x `[tokens, I]` gives `[tokens, O]`."""
    total = np.zeros((x.shape[0], packed.shape[0]), np.float64)
    pair = 0
    for first_row in range(0, packed.shape[0], packed.chunk):
        rows = min(packed.chunk, packed.shape[0] - first_row)
        for first_column in range(0, packed.shape[1], packed.block):
            for _ in range(-(-rows // 2)):
                value, column, both, turns, left = (int(field) for field in packed.pairs[pair])
                steps = [(member, 2 * i + member, i) for i in range(both) for member in (0, 1)]
                steps += [(i % 2, 2 * both + i, both + i) for i in range(2 * turns)]
                steps += [(0, 2 * both + 2 * turns + i, both + 2 * turns + i) for i in range(left)]
                for member, value_step, column_step in steps:
                    source = first_column + int(packed.columns[column + column_step])
                    target = first_row + int(packed.rows[pair, member])
                    total[:, target] += np.float64(packed.values[value + value_step]) * x[:, source]
                pair += 1
    return epilogue.reference(total.astype(np.float32), bias, residual)
