"""The cost model of NVIDIA cards: a roofline over tiles, with waves, for the libraries that PyTorch calls.

A product `[tokens, I] x [I, O]` is cut into tiles, a block of threads each, and by some libraries into slices of I
where there are few tiles. A multiprocessor takes one block at a time, for which it needs the arithmetic of the tile,
the time in which its operands arrive or that in which its steps along I follow each other, whichever is longest; blocks
run in waves of as many as there are multiprocessors, and the last wave takes as long as a full one. The whole takes at
least what the memory needs for all operands once. The library picks the best tile (the roofline of S. Williams et al.,
CACM 52(4), 2009, for a tile).
"""

from __future__ import annotations

import math

import torch

from sparsecomp.targets.base import Problem
from sparsecomp.targets.cuda.cards import Card

TILES = ((64, 64), (128, 64), (64, 128), (128, 128), (256, 128))
"""Outputs and tokens of the tiles that the libraries have kernels for."""
SLICES = (1, 2, 4, 8)
"""Parts of the inputs that are summed apart where there are fewer tiles than multiprocessors, in libraries that do."""
CHANNELS = 256
"""Below so many inputs or outputs 2:4 loses: square products of 64, 128 and 256 take 1.3 to 1.5 times as long in
float16 on an A100, 1.2 to 1.5 times in bfloat16 on an H100 (the tables that the constants are fitted to)."""
ROWS = {torch.float16: 16, torch.bfloat16: 16, torch.int8: 32}
"""Weights need a multiple of so many rows and columns (`SparseSemiStructuredTensorCUSPARSELT` of PyTorch)."""
TOKENS = {torch.float16: 8, torch.bfloat16: 8, torch.int8: 16}
"""PyTorch pads x to a multiple of so many rows, with a copy."""
_MEMORY = 0.9  # of the bandwidth in the data sheet that copies reach
_CACHE = 3.0  # the L2 cache gives so many times as much as the memory
_REDUCE_US = 2.0  # a second kernel that sums the slices
_META = 1 / 16  # 2:4 stores two bits for each kept entry: 1/16 of a float16 weight, 1/8 of an int8 one


def predict_us(card: Card, problem: Problem, sparse: bool) -> float:
    """Microseconds of one call, dense or with a 2:4 weight; the host's work is not in it."""
    size = problem.dtype.itemsize
    tokens, outputs, inputs = problem.tokens, problem.facts.out_features, problem.facts.in_features
    library, padding = card.library(problem.dtype, sparse), 0.0
    if sparse and (missing := -tokens % TOKENS[problem.dtype]):
        tokens += missing
        padding = card.library(problem.dtype, sparse=False).base + 2 * tokens * inputs * size / (
            1e3 * _CACHE * card.bandwidth
        )
    kept = 0.5 + 2 * _META / size if sparse else 1.0
    # int8 products leave as int8 with 2:4 and dense alike, with their scales in the epilogue.
    activations = size * tokens * (inputs + outputs * (1 + problem.residual))
    floor = operands_us(card, size * outputs * inputs * kept, activations)
    rate = 1e6 * card.rate(problem.dtype, sparse) / card.sms
    best = math.inf
    for rows, columns in TILES:
        tiles = math.ceil(outputs / rows) * math.ceil(tokens / columns)
        edge = 1 + library.edge * (64 / rows + 64 / columns)
        for slices in (n for n in SLICES if n <= library.slices):
            depth = math.ceil(inputs / slices)
            arithmetic = 2 * rows * columns * depth / rate * edge
            arrival = (rows * kept + columns) * depth * size / (1e3 * library.stream)
            waves = math.ceil(tiles * slices / card.sms)
            us = max(waves * max(arithmetic, arrival, library.depth * depth / 1e3), floor)
            if slices > 1:
                us += _REDUCE_US + 8 * tokens * outputs / (1e3 * _CACHE * _MEMORY * card.bandwidth)
            best = min(best, us)
    return library.base + padding + best


def operands_us(card: Card, weight: float, activations: float) -> float:
    """Microseconds that the memory takes at least for the bytes of a product, of which the weight may be `streamed`."""
    if not card.streamed:
        return memory_us(card, weight + activations)
    return weight / (1e3 * _MEMORY * card.bandwidth) + memory_us(card, activations)


def memory_us(card: Card, nbytes: float) -> float:
    """Microseconds in which bytes come from memory, or from the L2 cache where they fit it: they were used before."""
    return nbytes / (1e3 * _MEMORY * card.bandwidth * (_CACHE if nbytes < card.l2 else 1))
