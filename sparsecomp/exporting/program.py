"""What an exported model is before it is written: values in planned memory, and calls in order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsecomp.targets.arm.kernels import SiteCall

ALIGNMENT = 64
"""Bytes that every array and buffer is aligned to: a cache line."""


@dataclass(frozen=True)
class Size:
    """A size that each call gives: a batch, or a length.

    Attributes:
        name: as the model calls it.
        least, most: that a call may give.
    """

    name: str
    least: int
    most: int


@dataclass(frozen=True)
class Count:
    """A number that follows from the sizes of a call.

    Attributes:
        text: an expression of C over `sizes[0]`, `sizes[1]` and so on.
        least, most: of it; equal for a number that is always the same.
    """

    text: str
    least: int
    most: int

    @classmethod
    def of(cls, number: int) -> Count:
        """A number that is always the same."""
        return cls(str(number), number, number)

    @property
    def fixed(self) -> bool:
        """Whether it is always the same."""
        return self.least == self.most


def product(counts: Iterable[Count]) -> Count:
    """The product of counts."""
    number, factors, least, most = 1, [], 1, 1
    for count in counts:
        least, most = least * count.least, most * count.most
        if count.fixed:
            number *= count.most
        else:
            factors.append(count.text)
    if not factors:
        return Count.of(number)
    return Count(" * ".join([*factors, str(number)] if number != 1 else factors), least, most)


@dataclass(frozen=True)
class Tensor:
    """An input or output of the model.

    Attributes:
        name: as the model calls it.
        shape: sizes.
        dtype: of NumPy.
    """

    name: str
    shape: tuple[Count, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> Count:
        """Bytes of its values."""
        return product((*self.shape, Count.of(self.dtype.itemsize)))


@dataclass(frozen=True)
class Operand:
    """A value that a step reads or writes.

    Attributes:
        kind: `input`, `output`, `constant`, `buffer`, or `number` for a size.
        index: which of that kind.
        count: the number.
    """

    kind: str
    index: int
    count: Count | None = None


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        label: for people: the name of a site, or of the operations that TVM fused.
        function: the C function of what TVM lowered; empty for a site and for a copy.
        operands: that it reads, then what it writes; of a site x, the residual if it has one, and y.
        site: number of the site, None for other steps.
        shape: of a site's x; of a copy, which has one operand that it reads, its bytes.
    """

    label: str
    function: str
    operands: tuple[Operand, ...]
    site: int | None = None
    shape: tuple[Count, ...] = ()


@dataclass(frozen=True)
class SiteStep:
    """A site with its packed calls and its bias.

    Attributes:
        name: of the site.
        kernel: `dense`, `rows`, `panel`, `int8`, `conv` or `depthwise`: at the largest sizes.
        pattern: of its weight.
        calls: how its kernel is called, each for at most so many tokens or images, in rising order.
        bias: `[O]`; of a convolution `[2 * O]`, what is added and then the scales; in int8 see `DotWeight.terms`.
        us: counted microseconds at the largest sizes, without what a board measured; 0 where nothing was predicted.
    """

    name: str
    kernel: str
    pattern: str
    calls: tuple[tuple[int, SiteCall], ...]
    bias: npt.NDArray[np.float32]
    us: float


@dataclass
class Program:
    """A model in order.

    Attributes:
        inputs, outputs: of the model.
        sizes: that each call gives.
        steps: calls.
        buffers: bytes of each planned buffer, at the largest sizes; values that are not needed at the same time share
            one.
        constants: arrays that steps read.
        objects: object code and assembly of what TVM lowered.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    sizes: tuple[Size, ...] = ()
    steps: list[Step] = field(default_factory=list)
    buffers: list[int] = field(default_factory=list)
    constants: list[npt.NDArray[Any]] = field(default_factory=list)
    objects: tuple[bytes, str] = (b"", "")
