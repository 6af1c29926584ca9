"""An int8 network as a pipeline of layers, and what it computes, bit for bit.

A network takes vectors of int8 one value at a time: the rows of a matrix, or the pixels of a picture, channels last.
Every layer turns them into other vectors by the rules below, in integers throughout; NumPy is the reference of every
generated design.

Requantisation. A product's sum `a` becomes `clamp(zero + ((a * m + 2**(s - 1)) >> s), low, high)`, the shift rounding
down: the scale `m / 2**s` is a factor of at most 16 bits, as in Jacob et al. 2018 (arXiv:1712.05877, section 2.2), and
halves are rounded up. `a` fits 32 bits, or the layer is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import frexp
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Integers: TypeAlias = npt.NDArray[np.int64]

FACTOR_BITS = 16
MOST_SHIFT = 47
_INT32 = 2**31
LOW, HIGH = -128, 127


@dataclass(frozen=True)
class Requantise:
    """How sums become int8, for every output channel (or once for all, in arrays of one).

    Attributes:
        factors: m, `[O]`, 0 to 65535.
        shifts: s, `[O]`, 1 to 47.
        zero: added after the shift.
        low, high: the range that is kept, after an activation such as ReLU.
    """

    factors: Integers
    shifts: Integers
    zero: int
    low: int = LOW
    high: int = HIGH

    @classmethod
    def of(cls, scales: npt.NDArray[np.float64], zero: int, low: int = LOW, high: int = HIGH) -> Requantise:
        """The rule for real scales `[O]`.

        Raises:
            ValueError: a scale is not positive and finite, or 32768 or more.
        """
        if not np.all(np.isfinite(scales)) or np.any(scales <= 0) or np.any(scales >= 2.0 ** (FACTOR_BITS - 1)):
            raise ValueError(f"scales must be positive and below 32768, given {scales.min()} to {scales.max()}")
        factors, shifts = [], []
        for scale in scales.tolist():
            shift = min(FACTOR_BITS - frexp(scale)[1], MOST_SHIFT)
            factor = round(scale * 2.0**shift)
            if factor == 2**FACTOR_BITS:
                factor, shift = factor // 2, shift - 1
            if shift < 1:  # only what was just rounded up to 32768
                factor, shift = 2**FACTOR_BITS - 1, 1
            factors.append(factor)
            shifts.append(shift)
        return cls(np.array(factors, np.int64), np.array(shifts, np.int64), zero, low, high)

    def run(self, sums: Integers) -> Integers:
        """Requantise `[..., O]`."""
        scaled = (sums * self.factors + (1 << (self.shifts - 1))) >> self.shifts
        return np.clip(scaled + self.zero, self.low, self.high)


@dataclass(frozen=True)
class Shape:
    """What a stream holds for one call.

    Attributes:
        vectors: how many; the pixels of a picture row by row.
        width: values of each; the channels of a picture.
        height: rows of a picture, 0 if the stream is none.
    """

    vectors: int
    width: int
    height: int = 0

    @property
    def columns(self) -> int:
        """Pixels of a row of a picture."""
        return self.vectors // self.height if self.height else 1

    @property
    def values(self) -> int:
        """Values of one call."""
        return self.vectors * self.width


@dataclass(frozen=True)
class Patches:
    """The windows of a picture that a convolution or a pooling reads, `[OH * OW, C * kh * kw]`, channels slowest.

    Attributes:
        kernel, strides, dilations: (rows, columns).
        pads: (top, left, bottom, right).
        fill: the value of the padding: the zero point.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    fill: int

    @property
    def taps(self) -> int:
        """Pixels of a window."""
        return self.kernel[0] * self.kernel[1]

    @property
    def is_pixel(self) -> bool:
        """Whether every window is one pixel, in order."""
        return self.taps == 1 and self.strides == (1, 1) and not any(self.pads)

    @property
    def reach(self) -> tuple[int, int]:
        """Rows and columns between the first pixel of a window and its last."""
        return (self.kernel[0] - 1) * self.dilations[0], (self.kernel[1] - 1) * self.dilations[1]

    def padded(self, shape: Shape) -> tuple[int, int]:
        """Rows and columns of a picture with its padding."""
        top, left, bottom, right = self.pads
        return shape.height + top + bottom, shape.columns + left + right

    def out(self, shape: Shape) -> tuple[int, int]:
        """Rows and columns of windows."""
        rows, columns = (
            (size - reach - 1) // stride + 1
            for size, reach, stride in zip(self.padded(shape), self.reach, self.strides, strict=True)
        )
        return rows, columns

    def run(self, x: Integers, shape: Shape) -> Integers:
        """The windows of `[H * W, C]`."""
        picture = x.reshape(shape.height, shape.columns, shape.width)
        top, left, bottom, right = self.pads
        padded = np.pad(picture, ((top, bottom), (left, right), (0, 0)), constant_values=self.fill)
        rows, columns = self.out(shape)
        taps = []
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                y, z = i * self.dilations[0], j * self.dilations[1]
                taken = padded[y:, z:][:: self.strides[0], :: self.strides[1]][:rows, :columns]
                taps.append(taken.reshape(rows * columns, shape.width))
        return np.stack(taps, axis=2).reshape(rows * columns, shape.width * self.taps)


@dataclass(frozen=True)
class Skip:
    """Hidden units that a linear leaves out, decided for every vector: those at most `most` steps from the zero point.

    With `most` 0 no number changes: such a unit adds nothing to any sum. A queue of the units that stay makes the time
    of a layer follow the data, as Edge-MoE (Sarkar et al. 2023, arXiv:2305.18691) orders patches by what they need.

    Attributes:
        zero: the zero point of what the linear reads.
        most: steps.
        stays: bool `[samples, I]`, which units stayed in a sample: what the cost is estimated on.
    """

    zero: int
    most: int
    stays: npt.NDArray[np.bool_]

    def keeps(self, x: Integers) -> npt.NDArray[np.bool_]:
        """Which values of `[..., I]` stay."""
        return np.abs(x - self.zero) > self.most


@dataclass(frozen=True)
class Linear:
    """A linear layer, or a convolution if it has patches: `requantise(x @ weight.T + bias)`.

    Attributes:
        name: of the layer.
        weight: `[O, I]`, int8 values.
        bias: `[O]`, with what the zero point of x adds.
        requantise: of the sums.
        patches: of a convolution.
        order: of a linear that reads a picture as one vector, where each value of the stream belongs: `[I]`; else None.
        skip: of a linear that leaves out hidden units.
    """

    name: str
    weight: Integers
    bias: Integers
    requantise: Requantise
    patches: Patches | None = None
    order: Integers | None = None
    skip: Skip | None = None

    def __post_init__(self) -> None:
        if self._largest >= _INT32:
            raise ValueError(f"layer {self.name!r}: its sums reach {self._largest}, more than 32 bits hold")
        if self.skip is not None and (self.patches is not None or self.order is not None):
            raise ValueError(f"layer {self.name!r} reads a picture: units are skipped in linears of vectors only")

    @cached_property
    def _largest(self) -> int:
        """No sum, nor a part of one, is beyond it."""
        most = -LOW if self.skip is None else HIGH - LOW
        return int(np.max(np.abs(self.weight).sum(axis=1) * most + np.abs(self.added), initial=0))

    @property
    def sum_bits(self) -> int:
        """Bits that hold every sum."""
        return self._largest.bit_length() + 1

    @property
    def added(self) -> Integers:
        """What is added to a sum of products: the bias, without the part of the zero point that a queue takes off."""
        return self.bias if self.skip is None else self.bias + self.skip.zero * self.weight.sum(axis=1)

    def out(self, shape: Shape) -> Shape:
        """What the layer makes of a stream."""
        width = len(self.weight)
        if self.patches is not None:
            rows, columns = self.patches.out(shape)
            return Shape(rows * columns, width, rows)
        return Shape(1, width) if self.order is not None else Shape(shape.vectors, width, shape.height)

    def run(self, x: Integers, shape: Shape) -> Integers:
        """The layer of `[vectors, width]`."""
        return self.requantise.run(self.gather(x, shape) @ self.weight.T + self.bias)

    def gather(self, x: Integers, shape: Shape) -> Integers:
        """What is multiplied, `[N, I]`, of `[vectors, width]`."""
        if self.patches is not None:
            return self.patches.run(x, shape)
        if self.order is not None:
            flat = np.empty((1, x.size), np.int64)
            flat[0, self.order] = x.reshape(-1)
            return flat
        return x if self.skip is None else np.where(self.skip.keeps(x), x, self.skip.zero)


@dataclass(frozen=True)
class Pool:
    """The largest value, or the mean, of the windows of every channel.

    Attributes:
        name: of the layer.
        patches: the windows.
        bias: added to a window's sum: what the zero point takes off.
        requantise: of a mean's sums; None takes the largest value.
    """

    name: str
    patches: Patches
    bias: int = 0
    requantise: Requantise | None = None

    @property
    def sum_bits(self) -> int:
        """Bits that hold every sum."""
        return (self.patches.taps * -LOW + abs(self.bias)).bit_length() + 1

    def out(self, shape: Shape) -> Shape:
        """What the layer makes of a stream."""
        rows, columns = self.patches.out(shape)
        return Shape(rows * columns, shape.width, rows)

    def run(self, x: Integers, shape: Shape) -> Integers:
        """The layer of `[vectors, width]`."""
        windows = self.patches.run(x, shape).reshape(-1, shape.width, self.patches.taps)
        if self.requantise is None:
            return windows.max(axis=2)
        return self.requantise.run(windows.sum(axis=2) + self.bias)


@dataclass(frozen=True)
class Lookup:
    """A function of one value, such as GELU between two scales.

    Attributes:
        name: of the layer.
        table: `[256]`, the result for -128 to 127.
        zero: the zero point of the result.
    """

    name: str
    table: Integers
    zero: int = 0

    def out(self, shape: Shape) -> Shape:
        """What the layer makes of a stream."""
        return shape

    def run(self, x: Integers, shape: Shape) -> Integers:
        """The layer of `[vectors, width]`."""
        return self.table[x - LOW]


Layer: TypeAlias = Linear | Pool | Lookup


@dataclass(frozen=True)
class Network:
    """Layers in order.

    Attributes:
        shape: of the input.
        layers: at least one.
        scales: of input and output: a real value is `scale * (int8 - zero)`.
        zeros: of input and output.
    """

    shape: Shape
    layers: Sequence[Layer]
    scales: tuple[float, float]
    zeros: tuple[int, int]

    def shapes(self) -> list[Shape]:
        """Of the input and after every layer."""
        shapes = [self.shape]
        for layer in self.layers:
            shapes.append(layer.out(shapes[-1]))
        return shapes

    def run(self, x: npt.NDArray[Any]) -> Integers:
        """The reference: int8 `[vectors, width]` of one call, to int8 values `[vectors, width]`.

        Raises:
            ValueError: x has another shape or values outside int8.
        """
        values = np.asarray(x).astype(np.int64)
        if values.shape != (self.shape.vectors, self.shape.width):
            raise ValueError(f"expected {(self.shape.vectors, self.shape.width)} values, given {values.shape}")
        if values.size and (values.min() < LOW or values.max() > HIGH):
            raise ValueError(f"values must lie in int8, given {values.min()} to {values.max()}")
        for layer, shape in zip(self.layers, self.shapes(), strict=False):
            values = layer.run(values, shape)
        return values

    def quantise(self, x: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
        """Real inputs as the network takes them, rounded to even as QuantizeLinear of ONNX does."""
        return np.clip(np.rint(np.asarray(x) / self.scales[0]) + self.zeros[0], LOW, HIGH).astype(np.int8)

    def real(self, y: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Real values of what the network gives."""
        return self.scales[1] * (np.asarray(y).astype(np.float64) - self.zeros[1])
