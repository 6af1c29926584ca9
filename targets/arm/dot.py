"""Linears in int8 on ARM CPUs with dot products: which panels a weight may take, and its packed form with its calls."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsecomp.kernels import dot
from sparsecomp.kernels.dot import DotSchedule, DotWeight, Levels
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.targets.arm.cpu import ArmLevel
from sparsecomp.targets.arm.kernels import DENSE_V, Arrays, Call, SiteCall, source_of
from sparsecomp.targets.base import DENSE, Candidate, WeightFacts, label_of
from sparsecomp.targets.cpu import schedules

INT8 = "int8"
DOT_TILES = {4: (1, 2, 4, 8), 8: (1, 2, 4, 8), 16: (1, 2, 4)}
"""For each number of rows of a panel the numbers of tokens of its register tile: at most 16 sums."""
WINDOWS = (2, 4)
"""Vectors of inputs that a step of a sparse weight picks its columns from."""
_MOST_INPUTS = 1 << 16  # sums of more products of bytes might not fit 32 bits
_MOST_WEIGHTS = 1 << 30  # more, with what fills up panels and steps, might not be addressed by 32 bits


def candidates(facts: WeightFacts, allowed: Collection[str] | None) -> list[Candidate]:
    """The ways to compute a weight in int8: dense, panels of rows that share their columns, rows of N:M."""
    if facts.in_features > _MOST_INPUTS or facts.in_features * facts.out_features > _MOST_WEIGHTS:
        return []
    found = [Candidate(INT8, DENSE.pattern, (("v", DENSE_V), ("window", 1)))]
    for v in DOT_TILES:
        shared = label_of(facts, v, allowed)
        if shared is not None and any(d.pattern.shared_rows % v == 0 for d in facts.patterns):
            # Two vectors hold the sixteen columns of a step if half of all columns are kept.
            window = WINDOWS[0] if 2 * facts.panels[v] >= _columns(facts, v) else WINDOWS[1]
            found.append(Candidate(INT8, shared, (("v", v), ("window", window))))
    single, fours = label_of(facts, 1, allowed), _fours(facts)
    if single is not None and fours < dot.STEP // 4:
        found.append(Candidate(INT8, single, (("fours", fours), ("v", DENSE_V), ("window", 1))))
    return found


def _fours(facts: WeightFacts) -> int:
    """The most fours of columns that a row keeps of sixteen inputs, by the N:M patterns that it satisfies."""
    kept = [d.pattern.n * dot.STEP // d.pattern.m for d in facts.patterns if d.pattern.kind in ("nm", "vnm")]
    return math.ceil(min(kept, default=dot.STEP) / 4)


def steps(facts: WeightFacts, v: int, window: int, fours: int = 0) -> float:
    """Steps over all panels: as many as kept columns fill, or as windows there are; or `fours` for each window."""
    if fours:
        return _columns(facts, v) / dot.STEP * fours
    windows = _columns(facts, v) / (dot.STEP * window)
    return windows if window == 1 else max(facts.panels[v] / dot.STEP, windows)


def packed_bytes(facts: WeightFacts, v: int, window: int, fours: int = 0) -> int:
    """Bytes of the steps: weights, picks and the first column."""
    each = 8 * v + 4 if fours else 16 * v + 20
    return round(steps(facts, v, window, fours) * each)


def _columns(facts: WeightFacts, v: int) -> int:
    return math.ceil(facts.out_features / v) * facts.in_features


def loop_name(v: int, tile: int, window: int, *, own: bool) -> str:
    """What the loop of a kernel is called in the table of cycles, and the kernel itself."""
    return f"{INT8}_{'own_' * own}{v}_{tile}_{window}"


def dot_tile(v: int, tokens: int) -> int:
    """Tokens of the register tile with the least work; the weights of a step cost about as much as a token."""
    return min(DOT_TILES[v], key=lambda t: (math.ceil(tokens / t) * (t + 1), -t))


@dataclass(frozen=True)
class Quantised:
    """A linear whose weight and input are quantised.

    Attributes:
        weight: int8 `[O, I]`.
        scales: of its rows, float32 `[O]`.
        levels: of x.
    """

    weight: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    levels: Levels


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight `[O, I]` of a linear, packed for the int8 kernel; its calls are cut for any number of tokens.

    Attributes:
        level: of the schedules.
        packed: the weight.
        window: of its steps.
        own: whether its rows have columns of their own.
        native: whether the CPU has dot products.
        arrays: as the kernel takes them.
        terms: what the kernel takes as its bias.
    """

    level: ArmLevel
    packed: DotWeight
    window: int
    own: bool
    native: bool
    arrays: Arrays
    terms: npt.NDArray[np.float32]

    @classmethod
    def pack(
        cls, level: ArmLevel, candidate: Candidate, linear: Quantised, bias: npt.NDArray[np.float32]
    ) -> QuantisedWeight:
        """Pack a linear for one of `candidates`.

        Args:
            level: of the schedules.
            candidate: with its `v` and `window`, and `fours` where rows have columns of their own.
            linear: weight and levels.
            bias: `[O]`.
        """
        params = dict(candidate.params)
        v, window, own = params["v"], params["window"], "fours" in params
        packed = DotWeight.pack_own(linear.weight, v) if own else DotWeight.pack(linear.weight, v, window)
        arrays, terms = tuple(packed.arrays(linear.levels)), packed.terms(bias, linear.scales, linear.levels)
        return cls(level, packed, window, own, level.triple.startswith("aarch64"), arrays, terms)

    def call(self, tokens: int, threads: int, epilogue: Epilogue) -> SiteCall:
        """Cut a call.

        Raises:
            ValueError: x or y is larger than 32-bit numbers address.
        """
        (outputs, inputs), v = self.packed.shape, self.packed.v
        if tokens * max(outputs, inputs) >= 2**31:
            raise ValueError(f"{tokens} tokens of {max(outputs, inputs)} values are more than 32-bit numbers address")
        tile = dot_tile(v, tokens)
        schedule = DotSchedule(v, tile, self.window, self.own, self.native)
        cut = schedules.panel_cut(tile, tokens, math.ceil(outputs / v), threads)
        dims = (tokens, inputs, outputs, cut.group, cut.splits)
        name = loop_name(v, tile, self.window, own=self.own)
        source = source_of(self.level, name, schedule, epilogue, lambda: dot.build(schedule, epilogue))
        return SiteCall(Call(source, self.arrays, dims, cut.items, dot.scratch_floats(inputs, cut.group), cut.group))
