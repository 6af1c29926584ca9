"""`X86Target`: which kernels a weight may take on this CPU, what they would cost, and packing for one."""

from __future__ import annotations

import copy
import functools
import platform
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsecomp.kernels import depthwise_strips
from sparsecomp.patterns import Pattern
from sparsecomp.targets.base import (
    DENSE,
    DEPTHWISE,
    Candidate,
    ConvKernel,
    Kernel,
    Problem,
    Target,
    WeightFacts,
    label_of,
)
from sparsecomp.targets.cpu import conv_schedules, schedules, strip_schedules
from sparsecomp.targets.skip import SkipRows, SkipSpec
from sparsecomp.targets.x86 import calibration, conv_cost, cost
from sparsecomp.targets.x86.conv_kernels import X86ConvKernel, X86DepthwiseKernel, X86StripsKernel
from sparsecomp.targets.x86.cpu import LEVELS, best_level, caches, cpu_name, facts, flags, level, supported
from sparsecomp.targets.x86.kernels import GatherKernel, MaskKernel, PanelKernel, RowsKernel
from sparsecomp.targets.x86.skip_kernels import X86Rows, X86SkipKernel
from sparsecomp.window import Window

PANELS = (8, 16, 32)
# Beyond these the kernels for one token would read their weight again and again: the row kernel is always better.
FEW_TOKENS = 8
_MAX_GATHER_INPUTS = 65536
# Rows that skip are packed below this density: above, spreading them takes longer than reading the zeros.
_MASKED_DENSITY = 0.7


def names() -> tuple[str, ...]:
    """The targets of this family."""
    return ("x86", *(f"x86:{level_name}" for level_name in LEVELS))


@functools.cache
def create(name: str) -> X86Target:
    """The target of a name: `x86` takes the highest level that this CPU runs.

    Raises:
        ValueError: this CPU does not run the level that the name asks for.
    """
    _, _, wanted = name.partition(":")
    wanted = wanted or best_level()
    if not supported(wanted):
        missing = sorted(set(facts()["levels"][wanted]["needs"]) - flags())
        raise ValueError(f"target {name!r} needs a CPU with {', '.join(missing)}; this one runs 'x86:{best_level()}'")
    return X86Target(wanted)


class X86Target(Target):
    """x86-64 Linux."""

    skips = ("relu", "threshold", "input", "rsparse", "block")
    _streamed = False

    def __init__(self, level_name: str) -> None:
        self.name = f"x86:{level_name}"
        self._level = level(level_name)
        self._machine = cost.Machine(self._level, caches())
        found = calibration.load(level_name)
        self._coefficients = found.coefficients
        self.calibrated = found.measured_here
        self.description = f"{self.name} on {cpu_name()}, {found.origin}"

    def why_not_here(self) -> str | None:
        """See `Target.why_not_here`."""
        machine = platform.machine()
        return None if machine in ("x86_64", "AMD64") else f"this machine is {machine}, no x86-64"

    def for_model(self, nbytes: int) -> X86Target:
        """See `Target.for_model`; of more than the L3 cache holds nothing is left there when a weight's turn comes."""
        if self._streamed or nbytes <= self._machine.caches.l3:
            return self
        found = copy.copy(self)
        found._streamed = True
        return found

    def _machine_at(self, tokens: int) -> cost.Machine:
        """With many tokens a weight is read more than once, and its products take longer than bringing it here."""
        return replace(self._machine, streamed=self._streamed and tokens <= cost.DENSE_FEW)

    def candidates(self, facts: WeightFacts, allowed: Collection[str] | None = None) -> list[Candidate]:
        """See `Target.candidates`."""
        found = [DENSE]
        if not facts.nonzeros < facts.out_features * facts.in_features:
            return found
        single = label_of(facts, 1, allowed)
        if single is not None:
            found.append(Candidate("rows", single))
            if facts.in_features <= _MAX_GATHER_INPUTS:
                found.append(Candidate("gather", single))
            if self._level.spread:
                found.append(Candidate("mask", single))
        for v in PANELS:
            shared = label_of(facts, v, allowed)
            if shared is not None:
                found.append(Candidate("panel", shared, (("v", v),)))
        return found

    def predict(self, candidate: Candidate, problem: Problem) -> float:
        """See `Target.predict`."""
        if candidate.kernel in ("gather", "mask") and problem.tokens > FEW_TOKENS:
            return float("inf")
        if problem.tokens == 0:
            return 0.0
        counter = cost.quantities if problem.window is None else conv_cost.quantities
        micros = cost.price(self._coefficients, *counter(self._machine_at(problem.tokens), candidate, problem))
        if problem.dtype != torch.float32 and not candidate.is_dense:
            # bfloat16 is widened before and narrowed after the float32 kernel: three more passes over x and y.
            taps = 1 if problem.window is None else problem.window.taps
            moved = problem.tokens * (problem.facts.in_features // taps + problem.facts.out_features)
            micros += 1e-3 * moved * self._coefficients["convert"]["value"] / problem.threads
        return micros

    def layout_us(self, values: int, threads: int) -> float:
        """See `Target.layout_us`."""
        return 1e-3 * values * self._coefficients["layout"]["value"] / threads

    def prepare(self, candidate: Candidate, weight: Tensor) -> Kernel:
        """See `Target.prepare`."""
        # Every weight is unstructured: nothing has to be looked at.
        if candidate.pattern != "unstructured" and not Pattern.parse(candidate.pattern).check(weight):
            raise ValueError(f"the weight {tuple(weight.shape)} does not satisfy the pattern of {candidate}")
        if candidate.kernel == "rows":
            return RowsKernel(self._level, weight)
        if candidate.kernel == "panel":
            return PanelKernel(self._level, weight, dict(candidate.params)["v"])
        if candidate.kernel == "gather":
            return GatherKernel(self._level, weight)
        if candidate.kernel == "mask" and self._level.spread:
            return MaskKernel(self._level, weight)
        raise ValueError(f"target {self.name} has no kernel {candidate.kernel!r}")

    def conv_candidates(
        self, facts: WeightFacts, window: Window, allowed: Collection[str] | None = None
    ) -> list[Candidate]:
        """See `Target.conv_candidates`."""
        if window.is_depthwise(facts.in_features):
            return [DENSE, DEPTHWISE] if depthwise_strips.supports(window) else [DENSE]
        label = label_of(facts, None, allowed)
        if label is None or not facts.nonzeros < facts.out_features * facts.in_features:
            return [DENSE]
        widest = conv_schedules.widest(self._level)
        found = [Candidate("conv", label, (("vectors", vectors),)) for vectors in widest]
        if window.taps > 1 or window.stride != (1, 1):
            shape, l1 = (facts.out_features, facts.in_features), self._machine.caches.l1
            packed = {v: strip_schedules.packing(self._level, shape, window, v, l1, facts.nonzeros) for v in widest}
            found += [Candidate("conv_strips", label, (("vectors", v),)) for v in widest if packed[v] is not None]
        return [DENSE, *found]

    def prepare_conv(self, candidate: Candidate, weight: Tensor, window: Window) -> ConvKernel:
        """See `Target.prepare_conv`."""
        if candidate == DEPTHWISE:
            return X86DepthwiseKernel(self._level, weight, window)
        if candidate.kernel not in ("conv", "conv_strips"):
            return super().prepare_conv(candidate, weight, window)
        if candidate.pattern != "unstructured" and not Pattern.parse(candidate.pattern).check(weight.flatten(1)):
            raise ValueError(f"the weight {tuple(weight.shape)} does not satisfy the pattern of {candidate}")
        kind = X86ConvKernel if candidate.kernel == "conv" else X86StripsKernel
        return kind(self._level, weight, window, dict(candidate.params)["vectors"])

    def prepare_pool(self, window: Window) -> ConvKernel | None:
        """See `Target.prepare_pool`."""
        return X86DepthwiseKernel(self._level, None, window) if depthwise_strips.supports(window) else None

    def skip_rows(self, matrix: Tensor) -> X86Rows:
        """See `Target.skip_rows`; packed with a bit mask where that makes it enough smaller."""
        return X86Rows(matrix, masked=self._masks_rows(int(matrix.count_nonzero()), matrix.numel()))

    def _masks_rows(self, nonzeros: int, entries: int) -> bool:
        return self._level.spread == "expand" and nonzeros <= _MASKED_DENSITY * entries

    def predict_skip(
        self,
        facts: WeightFacts,
        kept: float,
        tokens: int,
        threads: int,
        dtype: torch.dtype = torch.float32,
        by_input: bool = True,
    ) -> float:
        """See `Target.predict_skip`; both sides are read by rows of float32."""
        machine = self._machine_at(tokens)
        if self._masks_rows(facts.nonzeros, facts.out_features * facts.in_features):
            # A word of a row with a mask takes what it takes in the kernel that reads all of them.
            counted = cost.masked_skip_quantities(machine, facts, kept, tokens, threads)
            return cost.price(self._coefficients, "mask", counted)
        counted = cost.skip_quantities(machine, facts, kept, tokens, threads)
        return cost.price(self._coefficients, "skip", counted)

    def prepare_skip(self, spec: SkipSpec, rows: Sequence[SkipRows]) -> X86SkipKernel:
        """See `Target.prepare_skip`."""
        return X86SkipKernel(self._level, spec, [own for own in rows if isinstance(own, X86Rows)])

    def packed_bytes(self, candidate: Candidate, facts: WeightFacts, dtype: torch.dtype = torch.float32) -> int:
        """See `Target.packed_bytes`; close to it for quads, which share columns and are filled up with a few zeros."""
        outputs, inputs, nonzeros = facts.out_features, facts.in_features, facts.nonzeros
        if candidate.kernel == "rows":
            packing = schedules.row_packing(self._level, (outputs, inputs), self._machine.caches.l1, nonzeros)
            quads = -(-outputs // 4) * -(-inputs // packing["block"])
            return 5 * nonzeros + 32 * quads
        if candidate.kernel in ("conv", "conv_strips"):
            return 5 * nonzeros + 16 * inputs
        if candidate.kernel == "gather":
            group = schedules.gather_schedule(self._level).group
            return 6 * (nonzeros + outputs * group // 2) + 4 * outputs
        if candidate.kernel == "mask":
            return 4 * nonzeros + 2 * outputs * -(-inputs // 16) + 4 * outputs
        return super().packed_bytes(candidate, facts, dtype)
