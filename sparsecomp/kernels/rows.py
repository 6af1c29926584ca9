"""The row kernel: weights whose rows are each their own, with the tokens in the vector lanes.

A tile of tokens is transposed to feature-major scratch, so that every kept weight is one broadcast times contiguous
loads. Columns come in blocks that keep the touched part of the tile in the L1 cache; the sums of a chunk of rows wait
in scratch between blocks and are transposed back, with the epilogue, when the chunk is done. See
`sparsecomp.patterns.quads` for the rows in fours, and `sparsecomp.kernels.quads` for the inner loop.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparsecomp.kernels import tir
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.kernels.quads import Quad, QuadShape, weight_types
from sparsecomp.patterns.quads import QuadWeight

DIMS = ("tokens", "inputs", "outputs", "blocks", "block_floats", "chunk", "splits")
_CACHE_LINE = 16  # floats


def weights(packed: QuadWeight) -> list[npt.NDArray[np.generic]]:
    """The arrays that the kernel takes as `w0`..`w3`; of the float16 kernel values are to be converted."""
    return [packed.values, packed.words, packed.quads, packed.starts]


def scratch_floats(inputs: int, chunk: int, schedule: QuadShape) -> int:
    """Scratch of one thread: the transposed tile, the sums of a chunk with its spare row, and the staging area."""
    return (inputs + chunk + 1) * schedule.tile + schedule.lanes * (chunk + _CACHE_LINE)


def build(schedule: QuadShape, epilogue: Epilogue) -> tir.Expr:
    """The kernel in TIR. Item i is tile `i // splits` for the part `i % splits` of the chunks."""
    builder = tir.KernelBuilder("rows", weight_types(schedule))
    tile = schedule.tile
    with builder.build() as args:
        # The size of a block of the tile comes from the host: if LLVM saw that it is a multiple of the tile, it would
        # factor the two out of every address and need three instructions where one does.
        tokens, inputs, outputs, blocks, block_floats, chunk, splits = args.sizes(*DIMS)
        tile_view = args.view("scratch", schedule.dtype)
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
                with tir.loop(blocks) as b:
                    start = tir.bind(at * blocks + b)
                    begin, end = tir.bind(args["w3"][start]), tir.bind(args["w3"][start + 1])
                    base = tir.bind(tir.cast("int64", b * block_floats))
                    with tir.loop(end - begin) as q:
                        with tir.when(b == blocks - 1):
                            _prefetch_outputs(args, schedule, (q, end - begin), (token, tokens), (row, rows, outputs))
                        quad = Quad(args, schedule, tir.bind(begin + q), sums)
                        quad.begin(b)
                        quad.add(base, (tile_view, tir.const(tile, "int64")) if schedule.half else None)
                        quad.keep()
                _store_chunk(args, schedule, epilogue, (token, tokens), (row, rows, outputs), places)
    return builder.function


def _gather_tile(args: tir.Arguments, schedule: QuadShape, token: tir.Expr, tokens: tir.Expr, inputs: tir.Expr) -> None:
    """Transpose x[token : token + tile] into scratch; tokens past the end repeat the last, and are never stored."""
    lanes, tile, x, scratch = schedule.lanes, schedule.tile, args["x"], args.view("scratch", schedule.dtype)
    transpose = tir.transpose_half if schedule.half else tir.transpose
    per_line = max(1, _CACHE_LINE // lanes)
    full = tir.bind(tir.floor_div(inputs, lanes))

    def source(offset: tir.Expr) -> tir.Expr:
        return tir.minimum(token + offset, tokens - 1) * inputs

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
    with tir.loop(inputs - full * lanes) as rest, tir.loop(tile) as t:
        column = tir.bind(full * lanes + rest)
        tir.store(scratch, column * tile + t, narrowed(tir.load(x, source(t) + column), 1))


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
