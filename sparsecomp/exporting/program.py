"""What an exported model is before it is written: values in planned memory, and calls in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsecomp.targets.arm.kernels import SiteCall

ALIGNMENT = 64
"""Bytes that every array and buffer is aligned to: a cache line."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of the model.

    Attributes:
        name: as the model calls it.
        shape: sizes.
        dtype: of NumPy.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Operand:
    """A value that a step reads or writes.

    Attributes:
        kind: `input`, `output`, `constant` or `buffer`.
        index: which of that kind.
    """

    kind: str
    index: int


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        label: for people: the name of a site, or of the operations that TVM fused.
        function: the C function of what TVM lowered; empty for a site and for a copy.
        operands: that it reads, then what it writes; of a site x, the residual if it has one, and y.
        site: number of the site, None for other steps.
        nbytes: of a copy, which has one operand that it reads.
    """

    label: str
    function: str
    operands: tuple[Operand, ...]
    site: int | None = None
    nbytes: int = 0


@dataclass(frozen=True)
class SiteStep:
    """A site with its packed call and its bias.

    Attributes:
        name: of the site.
        kernel: `dense`, `rows`, `panel`, `conv` or `depthwise`.
        pattern: of its weight.
        call: how its kernel is called.
        bias: `[O]`; of a convolution `[2 * O]`, what is added and then the scales.
        us: counted microseconds, without what a board measured; 0 where nothing was predicted.
    """

    name: str
    kernel: str
    pattern: str
    call: SiteCall
    bias: npt.NDArray[np.float32]
    us: float


@dataclass
class Program:
    """A model in order.

    Attributes:
        inputs, outputs: of the model.
        steps: calls.
        buffers: bytes of each planned buffer; those whose values are not needed at the same time share one.
        constants: arrays that steps read.
        objects: object code and assembly of what TVM lowered.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    steps: list[Step] = field(default_factory=list)
    buffers: list[int] = field(default_factory=list)
    constants: list[npt.NDArray[Any]] = field(default_factory=list)
    objects: tuple[bytes, str] = (b"", "")
