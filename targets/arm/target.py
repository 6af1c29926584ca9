"""`ArmTarget`: which kernels a weight may take on an ARM CPU, and what they are predicted to take there."""

from __future__ import annotations

import platform
from collections.abc import Collection

import torch
from torch import Tensor

from sparsecomp.patterns import Pattern
from sparsecomp.targets.arm import calibration, cost
from sparsecomp.targets.arm.cpu import ArmCpu
from sparsecomp.targets.arm.kernels import PANEL_TILES
from sparsecomp.targets.base import DENSE, Candidate, Kernel, Problem, Target, WeightFacts
from sparsecomp.targets.x86.kernels import RowsKernel
from sparsecomp.window import Window

PANELS = tuple(PANEL_TILES)
_UNMEASURED = {"rows": 1.25, "panel": 1.25}
"""Nobody has timed the kernels on the CPU, and the count knows no misses of the L1 cache and no mispredicted branch, of
which sparse kernels have more than dense ones: without a board's measurements they have to be this much better."""
_LEAST_ROW_TOKENS = 2
"""Tokens from which on the row kernel, which has them in the lanes, is offered."""


class ArmTarget(Target):
    """An ARM CPU that models are exported for."""

    def __init__(self, cpu: ArmCpu) -> None:
        self.cpu = cpu
        self.name = f"arm:{cpu.name}"
        self._scales, origin = calibration.load(cpu.name)
        mca = f"cycles by llvm-mca {cost.llvm_mca_version()}, {origin}"
        self.description = f"{self.name}, caches and clock of: {cpu.board}; {mca}"

    def candidates(self, facts: WeightFacts, allowed: Collection[str] | None = None) -> list[Candidate]:
        """See `Target.candidates`."""
        found = [DENSE]
        if facts.nonzeros == facts.out_features * facts.in_features:
            return found
        single = _label(facts, 1, allowed)
        if single is not None:
            found.append(Candidate("rows", single))
        for v in PANELS:
            shared = _label(facts, v, allowed)
            if shared is not None:
                found.append(Candidate("panel", shared, (("v", v),)))
        return found

    def conv_candidates(
        self, facts: WeightFacts, window: Window, allowed: Collection[str] | None = None
    ) -> list[Candidate]:
        """See `Target.conv_candidates`; the same kernel computes dense ones, and leaves out what zeros there are."""
        if window.is_depthwise(facts.in_features) or facts.nonzeros == facts.out_features * facts.in_features:
            return [DENSE]
        label = _label(facts, 1, allowed)
        return [DENSE] if label is None else [DENSE, Candidate("conv", label)]

    def predict(self, candidate: Candidate, problem: Problem) -> float:
        """See `Target.predict`."""
        if (candidate.kernel == "rows" and problem.tokens < _LEAST_ROW_TOKENS) or problem.dtype != torch.float32:
            return float("inf")
        if problem.tokens == 0:
            return 0.0
        family = candidate.kernel
        if problem.window is not None:
            family = "depthwise" if problem.window.is_depthwise(problem.facts.in_features) else "conv"
        return self.scale(family) * cost.predict_us(self.cpu, candidate, problem)

    def scale(self, family: str) -> float:
        """What a board measured for a kernel family, relative to what is counted; where none did, a caution."""
        return self._scales.get(family, _UNMEASURED.get(family, 1.0))

    def prepare(self, candidate: Candidate, weight: Tensor) -> Kernel:
        """See `Target.prepare`; only on an ARM machine, of which this makes the row kernel.

        Raises:
            ValueError: this is not an ARM machine, or the kernel is not one that runs in PyTorch.
        """
        if platform.machine() != "aarch64":
            raise ValueError(
                f"kernels of {self.name} do not run on this {platform.machine()} machine: export the model"
            )
        if candidate.kernel != "rows":
            raise ValueError(f"target {self.name} has no kernel {candidate.kernel!r} for PyTorch")
        return RowsKernel(self.cpu.level, weight)

    def packed_bytes(self, candidate: Candidate, facts: WeightFacts, dtype: torch.dtype = torch.float32) -> int:
        """See `Target.packed_bytes`."""
        if candidate.kernel in ("rows", "conv"):
            return 6 * facts.nonzeros + 32 * -(-facts.out_features // 4)
        return super().packed_bytes(candidate, facts, dtype)


def _label(facts: WeightFacts, v: int, allowed: Collection[str] | None) -> str | None:
    """The pattern under which a kernel for panels of v rows takes a weight; None if `allowed` has none for it."""
    found = [
        d.pattern
        for d in facts.patterns
        if d.pattern.kind in ("nm", "vnm", "block") and (d.pattern.shared_rows % v == 0 if v > 1 else True)
    ]
    if allowed is None:
        if v > 1:
            return _plain(found[0]) if found else None
        return _plain(found[0]) if found and facts.patterns[0].pattern == found[0] else "unstructured"
    for text in allowed:
        pattern = Pattern.parse(text)
        if pattern.kind == "unstructured":
            if v == 1:
                return "unstructured"
        elif pattern.kind != "dense" and any(pattern.admits(p) for p in found):
            return _plain(pattern)
    return None


def _plain(pattern: Pattern) -> str:
    """A pattern without the share of zeros that it was found with."""
    return str(pattern).partition("@")[0]
