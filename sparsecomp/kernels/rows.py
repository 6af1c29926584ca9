"""The row kernel: weights whose rows are each their own, with the tokens in the vector lanes.

A tile of tokens is transposed to feature-major scratch, so that every kept weight is one broadcast times contiguous
loads. Columns come in blocks, of which one is transposed at a time and stays in the L1 cache while it serves several
chunks of rows. Their sums wait in scratch between blocks and are transposed back, with the epilogue, after the last.
See `sparsecomp.patterns.quads` for the rows in fours, and `sparsecomp.kernels.quads` for the inner loop.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparsecomp.kernels import tir
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.kernels.quads import Quad, QuadShape, weight_types
from sparsecomp.patterns.quads import QuadWeight

DIMS = ("tokens", "inputs", "outputs", "blocks", "block", "block_floats", "chunk", "together", "splits")
_CACHE_LINE = 16  # floats


def weights(packed: QuadWeight) -> list[npt.NDArray[np.generic]]:
    """The arrays that the kernel takes as `w0`..`w3`; of the float16 kernel values are to be converted."""
    return [packed.values, packed.words, packed.quads, packed.starts]


def scratch_floats(block: int, chunk: int, together: int, schedule: QuadShape) -> int:
    """Scratch of one thread: a block of the transposed tile, sums of chunks with their spare rows, the staging area."""
    return (block + together * (chunk + 1)) * schedule.tile + schedule.lanes * (chunk + _CACHE_LINE)


def build(schedule: QuadShape, epilogue: Epilogue) -> tir.Expr:
    """The kernel in TIR. Item i is tile `i // splits` for the part `i % splits` of the chunks."""
    builder = tir.KernelBuilder("rows", weight_types(schedule))
    tile = schedule.tile
    with builder.build() as args:
        # The size of a block of the tile comes from the host: if LLVM saw that it is a multiple of the tile, it would
        # factor the two out of every address and need three instructions where one does.
        tokens, inputs, outputs, blocks, block, block_floats, chunk, together, splits = args.sizes(*DIMS)
        chunks = tir.bind(tir.ceil_div(outputs, chunk))
        chunk_floats = tir.bind((chunk + 1) * tile)
        stage = tir.settle(block_floats + together * chunk_floats)
        # An odd number of cache lines from row to row of the staging area: they lie in different sets of the cache.
        stride = tir.bind(chunk + _CACHE_LINE)
        with tir.loop(args.end - args.begin) as step:
            item = tir.bind(args.begin + step)
            token = tir.settle(tir.floor_div(item, splits) * tile)
            split = tir.bind(tir.floor_mod(item, splits))
            first = tir.bind(tir.floor_div(split * chunks, splits))
            last = tir.bind(tir.floor_div((split + 1) * chunks, splits))
            with tir.loop(tir.ceil_div(last - first, together)) as part:
                at = tir.settle(first + part * together)
                count = tir.bind(tir.minimum(together, last - at))

                def rows_of(index: tir.Expr) -> tuple[tir.Expr, tir.Expr, tir.Expr]:
                    row = tir.settle((at + index) * chunk)
                    return row, tir.settle(tir.minimum(chunk, outputs - row)), outputs

                with tir.loop(blocks) as b:
                    column = tir.bind(b * block)
                    columns = tir.settle(tir.minimum(block, inputs - column))
                    _gather_block(args, schedule, (token, tokens), (column, columns, inputs))
                    with tir.loop(count) as index:
                        sums = tir.settle(block_floats + index * chunk_floats)
                        start = tir.bind((at + index) * blocks + b)
                        _add_block(args, schedule, (b, blocks), (start, sums), (token, tokens), rows_of(index))
                # Not within the loop over blocks: LLVM would keep the constants of GELU in registers all along, and
                # spill sums for them.
                with tir.loop(count) as index:
                    sums = tir.settle(block_floats + index * chunk_floats)
                    _store_chunk(args, schedule, epilogue, (token, tokens), rows_of(index), (sums, stage, stride))
    return builder.function


def _gather_block(
    args: tir.Arguments,
    schedule: QuadShape,
    token_range: tuple[tir.Expr, tir.Expr],
    column_range: tuple[tir.Expr, tir.Expr, tir.Expr],
) -> None:
    """Transpose a block of columns of x[token : token + tile] into scratch.

    Tokens past the end repeat the last, and are never stored.
    """
    token, tokens = token_range
    first, columns, inputs = column_range
    lanes, tile, x, scratch = schedule.lanes, schedule.tile, args["x"], args.view("scratch", schedule.dtype)
    transpose = tir.transpose_half if schedule.half else tir.transpose
    per_line = max(1, _CACHE_LINE // lanes)
    full = tir.bind(tir.floor_div(columns, lanes))

    def source(offset: tir.Expr) -> tir.Expr:
        return tir.minimum(token + offset, tokens - 1) * inputs + first

    def narrowed(value: tir.Expr, count: int) -> tir.Expr:
        return tir.cast("float16" if count == 1 else f"float16x{count}", value) if schedule.half else value

    # Along the rows of x, which processors fetch ahead of; across all rows of the tile they do not.
    with tir.loop(schedule.vectors) as v, tir.loop(tir.ceil_div(full, per_line)) as line:
        rows = [tir.bind(source(v * lanes + i)) for i in range(lanes)]
        with tir.loop(tir.minimum(per_line, full - line * per_line)) as part:
            column = tir.bind((line * per_line + part) * lanes)
            square = [tir.bind(narrowed(tir.load(x, rows[i] + column, lanes), lanes)) for i in range(lanes)]
            for i, vector in enumerate(transpose(square)):
                tir.store(scratch, (column + i) * tile + v * lanes, vector, lanes)
    with tir.loop(columns - full * lanes) as rest, tir.loop(tile) as t:
        column = tir.bind(full * lanes + rest)
        tir.store(scratch, column * tile + t, narrowed(tir.load(x, source(t) + column), 1))


def _add_block(
    args: tir.Arguments,
    schedule: QuadShape,
    block: tuple[tir.Expr, tir.Expr],
    places: tuple[tir.Expr, tir.Expr],
    token_range: tuple[tir.Expr, tir.Expr],
    row_range: tuple[tir.Expr, tir.Expr, tir.Expr],
) -> None:
    """Add a block of columns to the sums of a chunk."""
    (b, blocks), (start, sums) = block, places
    begin, end = tir.settle(args["w3"][start]), tir.settle(args["w3"][start + 1])
    maps = (args.view("scratch", schedule.dtype), tir.const(schedule.tile, "int64")) if schedule.half else None
    with tir.loop(end - begin) as q:
        with tir.when(b == blocks - 1):
            _prefetch_outputs(args, schedule, (q, end - begin), token_range, row_range)
        quad = Quad(args, schedule, tir.bind(begin + q), sums)
        quad.begin(b)
        quad.add(tir.const(0, "int64"), maps)
        quad.keep()


def _prefetch_outputs(
    args: tir.Arguments,
    schedule: QuadShape,
    turn: tuple[tir.Expr, tir.Expr],
    token_range: tuple[tir.Expr, tir.Expr],
    row_range: tuple[tir.Expr, tir.Expr, tir.Expr],
) -> None:
    """Ask for the lines of y that the chunk will be stored to, a few with every quad: they may be far away."""
    (q, quads), (token, tokens), (row, rows, outputs) = turn, token_range, row_range
    first = tir.bind(tir.floor_div(q * schedule.tile, quads))
    with tir.loop(tir.floor_div((q + 1) * schedule.tile, quads) - first) as i:
        start = tir.bind(tir.minimum(token + first + i, tokens - 1) * outputs + row)
        with tir.loop(tir.ceil_div(rows, _CACHE_LINE)) as line:
            tir.prefetch(args["y"], start + tir.minimum(line * _CACHE_LINE, rows - 1))


def _store_chunk(
    args: tir.Arguments,
    schedule: QuadShape,
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
    packed: QuadWeight,
    bias: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32] | None,
    epilogue: Epilogue,
) -> npt.NDArray[np.float32]:
    """What the kernel computes, from its packed arrays: x `[tokens, I]` gives `[tokens, O]`."""
    total = x.astype(np.float64) @ packed.unpack().numpy().astype(np.float64).T
    return epilogue.reference(total.astype(np.float32), bias, residual)
