"""What a layer takes on an FPGA: cycles from the loops, multipliers and memories from what is written.

Cycles of a loop are `depth + II * (trips - 1)` (ScaleHLS, Ye et al. 2022, arXiv:2107.11673, section 5.2, for pipelined
loops), with an II of one in every loop written here. A layer is three loops that run at the same time: one value of a
vector is read, one trip multiplied, and one result requantised in a cycle, so its interval is the longest of the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

REQUANTISE_DSP = 2
"""DSP slices of a product of 32 and 16 bits."""
DEPTH = 11
"""Cycles through the pipelines of a layer: memories, multiplier, sum, requantisation."""
_BRAM_BITS = 36 * 1024
_LUT_BITS = 1024
"""Memories of fewer bits become look-up tables."""


@dataclass(frozen=True)
class LayerCost:
    """What a layer takes.

    Attributes:
        vectors: that it gives for one call.
        interval: cycles between vectors.
        after: cycles from the last value of a vector that it reads to the last that it gives.
        whole: whether it waits for the whole picture before its first vector.
        dsp: slices.
        bram: block RAMs.
    """

    vectors: int
    interval: int
    after: int
    whole: bool
    dsp: int
    bram: int


def linear_cost(
    *, vectors: int, width: int, outputs: int, trips: int, rows: int, multipliers: int, whole: bool, rom_bits: int
) -> LayerCost:
    """Of a linear layer or a convolution.

    Args:
        vectors: that it gives for one call; of a convolution its positions.
        width: inputs of a product: values that are read for every vector.
        outputs: of the layer.
        trips: of its loop for every vector.
        rows: outputs of a trip.
        multipliers: that do not vanish.
        whole: whether it reads a picture.
        rom_bits: of weights and indices.
    """
    interval = max(width, trips, outputs)
    groups = -(-outputs // rows)
    # The results of a group of rows follow those of the groups before it, one in a cycle.
    finish = max(trips + outputs - rows * (groups - 1), -(-trips // groups) + outputs)
    after = (width if whole else 0) + finish + DEPTH
    return LayerCost(vectors, interval, after, whole, multipliers + REQUANTISE_DSP, brams(rom_bits))


def brams(bits: int) -> int:
    """Block RAMs of a memory, by its bits alone."""
    return 0 if bits <= _LUT_BITS else -(-bits // _BRAM_BITS)


def cycles_of(costs: Sequence[LayerCost], values: int, vectors: int) -> tuple[int, int]:
    """Cycles of one call from its first value to its last, and between calls.

    Args:
        costs: of the layers in order.
        values: of the input.
        vectors: of the input.
    """
    first, last, interval = values // vectors, values, values
    for cost in costs:
        if cost.whole:
            first = last + cost.after
            last = first + (cost.vectors - 1) * cost.interval
        else:
            first += cost.after
            last = max(first + (cost.vectors - 1) * cost.interval, last + cost.after)
        interval = max(interval, cost.vectors * cost.interval)
    return last, interval
