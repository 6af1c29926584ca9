"""What an operation that skips at run time computes, and the kernel that a target makes of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

FEW_TOKENS = 8
"""Calls with more tokens take the dense way: together they keep nearly every unit."""


@dataclass(frozen=True, eq=False)
class SkipSpec:
    """What is computed: a linear that skips inputs, or an FFN that skips hidden units or inputs of its linears.

    Attributes:
        kind: `inputs` or `units`.
        sizes: (I, O) of a linear, (I, H, O) of an FFN.
        thresholds: float32. `units`: `[H]`, a unit stays where the size of its activation is above. `inputs`: of every
            linear the vector over its inputs, in the order gate, up, down.
        activation: as the epilogue of the kernels spells it; `none` of a linear may be any.
        gated: whether an FFN has an up projection.
        fused: whether the bias of gate holds that of up behind it (`gate`) or before it (`up`); empty otherwise.
    """

    kind: Literal["inputs", "units"]
    sizes: tuple[int, ...]
    thresholds: tuple[Tensor, ...]
    activation: str = "none"
    gated: bool = False
    fused: str = ""

    @property
    def is_ffn(self) -> bool:
        """Whether it is an FFN."""
        return len(self.sizes) == 3


class SkipRows(ABC):
    """A weight with the row of a unit contiguous.

    Attributes:
        nbytes: bytes of what was packed; 0 where the weight is used as it is.
    """

    nbytes: int


class SkipKernel(ABC):
    """An operation that skips on the CPU, ready to run.

    Attributes:
        counters: int64 `[n, 2]`, what stayed and what was looked at, summed over tokens and calls: of the units, or of
            the inputs of every linear.
    """

    counters: npt.NDArray[np.int64]

    @abstractmethod
    def build(self, tokens: int, residual: bool) -> None:
        """Compile now what a call would compile."""

    @abstractmethod
    def run(self, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None, out: Tensor) -> None:
        """Compute; all tensors are contiguous float32.

        Args:
            x: `[tokens, I]`, at most `FEW_TOKENS` of them.
            biases: of gate, up and down, or of the linear and twice None.
            residual: `[tokens, O]` or None.
            out: `[tokens, O]`, written.
        """


class DeviceSkipKernel(ABC):
    """An FFN that skips hidden units on an accelerator, ready to run.

    Attributes:
        nbytes: bytes of what it holds beside its `SkipRows`.
        counted: gives how many units stayed in the last call, and how many there are; twice 0 before the first. It
            waits for the device, and keeps no weight alive.
    """

    nbytes: int
    counted: Callable[[], Sequence[int]]

    @abstractmethod
    def run(self, x: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
        """Compute `[tokens, O]` in x's type.

        Args:
            x: `[tokens, I]`, contiguous, on the device and in the type of the weights; at most as many tokens as the
                target's `skip_tokens`.
            biases: of gate, up and down, in x's type.
        """
