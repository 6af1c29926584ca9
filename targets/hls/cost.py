"""Cycles that a layer takes on an FPGA, from its loops.

Cycles of a loop are `depth + II * (trips - 1)` (ScaleHLS, Ye et al. 2022, arXiv:2107.11673, section 5.2, for pipelined
loops), with an II of one in every loop written here. A layer is three loops that run at the same time: one value of a
vector is read, one trip multiplied, and one result requantised in a cycle, so its interval is the longest of the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

SERIAL_CYCLES = 16
"""Of a requantisation without a multiplier: it goes through the bits of the factor."""
DEPTH = 11
"""Cycles through the pipelines of a layer: memories, multiplier, sum, requantisation."""
POOL_DEPTH = 8
"""Cycles through a pooling, with what delays rows and columns."""
WINDOW_DEPTH = 2
"""Cycles through what delays a picture's rows and columns."""


@dataclass(frozen=True)
class Reading:
    """How a layer reads the input of one call.

    Attributes:
        width: values of a vector.
        waits: vectors that arrive before its first result can be computed.
        cycles: for all, with padding, one value in a cycle.
        head: of these, those of padding before the first value.
        ready: cycles from the first value until the first result can be computed, if values come without a pause.
        left: results that can be computed only after the last value.
        delay: cycles that a value takes through what delays rows and columns of a picture.
    """

    width: int
    waits: int
    cycles: int
    head: int
    ready: int
    left: int
    delay: int

    @classmethod
    def of_vectors(cls, vectors: int, width: int, together: bool = False) -> Reading:
        """Vectors one by one, or as a single long one."""
        values = vectors * width
        return cls(width, vectors if together else 1, values, 0, values if together else width, 1, 0)

    @classmethod
    def of_windows(
        cls,
        sizes: tuple[int, int],
        width: int,
        reach: tuple[int, int],
        pads: Sequence[int],
        stride: int,
        columns_out: int,
    ) -> Reading:
        """The windows of a picture.

        Args:
            sizes: rows and columns of the picture.
            width: its channels.
            reach: rows and columns between the first and the last of a window.
            pads: top, left, bottom, right.
            stride: rows between windows.
            columns_out: windows of a row.
        """
        top, left, bottom, right = pads
        line = sizes[1] + left + right
        rows, columns = (max(0, size - pad) for size, pad in zip(reach, (top, left), strict=True))
        waits = min(rows * sizes[1] + columns + 1, sizes[0] * sizes[1])
        head = (top * line + left) * width
        ready = (reach[0] * line + reach[1] + 1) * width - head
        after = -(-bottom // stride) * columns_out + 1
        return cls(width, waits, (sizes[0] + top + bottom) * line * width, head, ready, after, WINDOW_DEPTH)


@dataclass(frozen=True)
class LayerCost:
    """What a layer takes.

    Attributes:
        vectors: that it gives for one call.
        interval: cycles between vectors.
        after: cycles from the last value of a vector that it reads to the last that it gives.
        reading: of its input.
    """

    vectors: int
    interval: int
    after: int
    reading: Reading

    @property
    def span(self) -> int:
        """Cycles that it needs for one call."""
        return max(self.vectors * self.interval, self.reading.cycles)


def linear_cost(
    *,
    vectors: int,
    reading: Reading,
    chunks: int,
    outputs: int,
    trips: int,
    rows: int,
    serial: bool,
) -> LayerCost:
    """Of a linear layer or a convolution.

    Args:
        vectors: that it gives for one call; of a convolution its positions.
        reading: of its input.
        chunks: cycles that it takes to bring a vector to the loop: its values, or the channels of a window.
        outputs: of the layer.
        trips: of its loop for every vector.
        rows: outputs of a trip.
        serial: whether sums are requantised without a multiplier.
    """
    each = SERIAL_CYCLES if serial else 1
    interval = max(chunks, trips, outputs * each)
    groups = -(-outputs // rows)
    # The results of a group of rows follow those of the groups before it.
    finish = max(trips + each * (outputs - rows * (groups - 1)), -(-trips // groups) + outputs * each)
    return LayerCost(vectors, interval, finish + DEPTH + reading.delay, reading)


def cycles_of(costs: Sequence[LayerCost], values: int, vectors: int) -> tuple[int, int]:
    """Cycles of one call from its first value to its last, and between calls.

    Args:
        costs: of the layers in order.
        values: of the input.
        vectors: of the input.
    """
    first, last, interval, arriving = values // vectors, values, values, vectors
    for cost in costs:
        reading = cost.reading
        start, pause = first - reading.width, (last - first) / max(1, arriving - 1)
        ready = max(first + ceil((reading.waits - 1) * pause), start + reading.ready)
        end = max(last + (reading.left - 1) * cost.interval, start + reading.cycles - reading.head)
        first = ready + cost.after
        last = max(first + (cost.vectors - 1) * cost.interval, end + cost.after)
        interval, arriving = max(interval, cost.span), cost.vectors
    return last, interval
