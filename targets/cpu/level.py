"""The numbers that schedules on a CPU are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Level:
    """The schedules of an instruction set, whatever the CPU.

    Attributes:
        name: avx512, avx2 or generic.
        mcpu, mattr: for LLVM.
        lanes: float32 in a vector.
        vectors: vectors of tokens that the row kernel holds for each of its two rows.
        chunk: rows whose sums the row kernel keeps between blocks of columns; they shall stay in the L2 cache.
        l1_share: share of the L1 cache that a block of the row kernel's tile takes; weights and sums stream through.
        panel_tokens: tokens in the register tile of the panel kernel, with two vectors of outputs.
        spread: how the mask kernel spreads packed values; empty where the level has no fast way.
        triple: of LLVM.
    """

    name: str
    mcpu: str
    mattr: tuple[str, ...]
    lanes: int
    vectors: int
    chunk: int
    l1_share: float
    panel_tokens: int
    spread: str
    triple: str = "x86_64-linux-gnu"

    @property
    def tvm_target(self) -> dict[str, Any]:
        """The target as TVM takes it."""
        target: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.mcpu}
        if self.mattr:
            target["mattr"] = list(self.mattr)
        return target


@dataclass(frozen=True)
class Caches:
    """Bytes of the data caches that one core reaches."""

    l1: int
    l2: int
    l3: int
