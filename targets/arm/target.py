"""`ArmTarget`: which kernels a weight may take on an ARM CPU, and what they are predicted to take there."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from sparsecomp.targets.arm import calibration, cost, dot
from sparsecomp.targets.arm.cpu import ArmCpu, cpu_names, unfit
from sparsecomp.targets.arm.cpu import cpu as named
from sparsecomp.targets.arm.dot import INT8
from sparsecomp.targets.arm.kernels import CONV_HALF, HALF, PANEL_TILES, ROW_KERNELS, SVE
from sparsecomp.targets.base import DENSE, Candidate, Kernel, Problem, Target, WeightFacts, label_of
from sparsecomp.window import Window

PANELS = tuple(PANEL_TILES)
_LEAST_ROW_TOKENS = 2
"""Tokens from which on the row kernel, which has them in the lanes, is offered."""


class ArmTarget(Target):
    """An ARM CPU that models are exported for.

    Args:
        cpu: the CPU.
        half: whether linears and convolutions may compute in float16, which changes their results.
        quantised: whether it is about a linear whose weight and input are quantised, which may compute in int8.

    Raises:
        ValueError: the CPU does not multiply float16.
    """

    dtypes = (torch.float32,)
    calibration = ""  # which one counts, see `calibration.load`
    cautions: Mapping[str, float] = {
        "rows": 1.25,
        HALF: 1.25,
        SVE: 1.25,
        "panel": 1.25,
        INT8: 1.25,
        "conv": 1.25,
        CONV_HALF: 1.25,
    }
    """Nobody has timed the kernels on the CPU, and the count knows no misses of the L1 cache and no mispredicted
    branch, of which sparse kernels have more than dense ones: without a board's measurements they have to be this much
    better."""

    def __init__(self, cpu: ArmCpu, half: bool = False, quantised: bool = False) -> None:
        if half and not cpu.half:
            able = ", ".join(name for name in cpu_names() if named(name).half)
            raise ValueError(f"{cpu.name} does not compute in float16; the CPUs that do are {able}")
        self.cpu, self.half, self._quantised = cpu, half, quantised and cpu.dotprod
        self.name = f"arm:{cpu.name}"
        self._scales, origin = calibration.load(cpu.name, self.calibration)
        mca = f"cycles by llvm-mca {cost.llvm_mca_version()}, {origin}"
        self.description = f"{self.name}, caches and clock of: {cpu.board}; {mca}"

    def why_not_here(self) -> str | None:
        """See `Target.why_not_here`."""
        return unfit(self.cpu) or "models are exported for it (sparsecomp export)"

    def candidates(self, facts: WeightFacts, allowed: Collection[str] | None = None) -> list[Candidate]:
        """See `Target.candidates`."""
        found = [DENSE, *(dot.candidates(facts, allowed) if self._quantised else ())]
        if facts.nonzeros == facts.out_features * facts.in_features:
            # The row kernel keeps all entries: twice the lanes make up for its indices.
            return [*found, Candidate(HALF, DENSE.pattern)] if self.half else found
        single = label_of(facts, 1, allowed)
        if single is not None:
            found.append(Candidate("rows", single))
            if self.cpu.sve:
                found.append(Candidate(SVE, single))
        if self.half:
            found.append(Candidate(HALF, single or DENSE.pattern))
        for v in PANELS:
            # Panels are for rows that were pruned to share their columns: others would keep nearly all.
            shared = label_of(facts, v, allowed)
            if shared is not None and any(d.pattern.shared_rows % v == 0 for d in facts.patterns):
                found.append(Candidate("panel", shared, (("v", v),)))
        return found

    def conv_candidates(
        self, facts: WeightFacts, window: Window, allowed: Collection[str] | None = None
    ) -> list[Candidate]:
        """See `Target.conv_candidates`; the same kernel computes dense ones, and leaves out what zeros there are."""
        if window.is_depthwise(facts.in_features):
            return [DENSE]
        full = facts.nonzeros == facts.out_features * facts.in_features
        label = None if full else label_of(facts, None, allowed)
        sparse = [] if label is None else [Candidate("conv", label)]
        half = [Candidate(CONV_HALF, label or DENSE.pattern)] if self.half else []
        return [DENSE, *sparse, *half]

    def predict(self, candidate: Candidate, problem: Problem) -> float:
        """See `Target.predict`."""
        if (candidate.kernel in ROW_KERNELS and problem.tokens < _LEAST_ROW_TOKENS) or problem.dtype != torch.float32:
            return float("inf")
        if problem.tokens == 0:
            return 0.0
        return self.scale(self.family(candidate, problem)) * cost.predict_us(self.cpu, candidate, problem)

    def family(self, candidate: Candidate, problem: Problem) -> str:
        """Which measurements of a board are about a candidate."""
        if problem.window is None:
            return candidate.kernel
        if problem.window.is_depthwise(problem.facts.in_features):
            return "depthwise"
        return "dense_conv" if candidate.is_dense else candidate.kernel

    def scale(self, family: str) -> float:
        """What a board measured for a kernel family, relative to what is counted.

        For a family that it did not measure, what it measured for the others, less their cautions: a board that is
        slower than its facts is slower for all. With the family's own caution; that alone where nothing was measured.
        """
        if family in self._scales:
            return self._scales[family]
        others = [factor / self.cautions.get(other, 1.0) for other, factor in self._scales.items()]
        return (statistics.median(others) if others else 1.0) * self.cautions.get(family, 1.0)

    def prepare(self, candidate: Candidate, weight: Tensor) -> Kernel:
        """Raise a ValueError: models are exported for this target, none is run in PyTorch."""
        raise ValueError(f"kernels of {self.name} do not run in PyTorch: export the model")

    def packed_bytes(self, candidate: Candidate, facts: WeightFacts, dtype: torch.dtype = torch.float32) -> int:
        """See `Target.packed_bytes`."""
        if candidate.kernel == INT8:
            return dot.packed_bytes(facts, **dict(candidate.params)) + 8 * facts.out_features
        if candidate.kernel in (HALF, CONV_HALF):
            return 4 * facts.nonzeros + 32 * -(-facts.out_features // 4)
        if candidate.kernel in ("rows", SVE, "conv"):
            return 6 * facts.nonzeros + 32 * -(-facts.out_features // 4)
        return super().packed_bytes(candidate, facts, dtype)
