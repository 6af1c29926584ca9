"""The target for ONNX Runtime on x86: what dense costs there, and which forms of a weight serve every number of tokens.

An operation may hold its weight in several forms and take the best one for the tokens of each call. One of them can be
the dense weight itself (`FULL`): between the kernels for a few tokens and those for many there is a range in which
nothing is faster.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsecomp.runtime.ort_library import MOST_FORMS
from sparsecomp.targets.base import DENSE, Candidate, Problem, Product, Target, WeightFacts
from sparsecomp.targets.cpu import schedules
from sparsecomp.targets.cpu.counts import ACTIVATION_COST
from sparsecomp.targets.cpu.level import Level
from sparsecomp.targets.x86 import calibration, conv_cost, cost
from sparsecomp.targets.x86.cpu import LEVELS, caches, level
from sparsecomp.targets.x86.target import FEW_TOKENS
from sparsecomp.window import Maps, Window

FULL = Candidate("full", "dense")
"""The dense weight in the library's own form."""

GRID = (*range(1, 17), 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
"""Numbers of tokens that the choice is made at, in units of the least that a call can have."""

IMAGES, SCALES = (1, 2, 4, 8, 16, 32), (0.5, 1.0, 2.0)
"""Numbers of images, and sizes of maps beside those that were seen, that a convolution is looked at with."""

_KERNELS = frozenset({"dense", "rows", "panel", "gather", "mask", "conv"})
_ANOTHER = 1.1  # times as fast as the others somewhere: what a form must be to be worth its memory
_ERROR = 1.25  # of two predictions against each other, between the points that were measured
_TILES = (1, 2, 3, 4, 6, 8, 10)
_PRICES = "ort"

Price = Callable[[Candidate, int], float]
"""`(candidate, tokens) -> microseconds of one call`."""


@dataclass(frozen=True)
class Forms:
    """The forms in which an operation holds its weight.

    Attributes:
        candidates: at least one.
        choice: `(tokens, place)`, up to so many tokens the form at that place, ascending; the last is for all more.
    """

    candidates: tuple[Candidate, ...]
    choice: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        if len(self.candidates) == 1:
            return f"{self.candidates[0]} at every number of tokens"
        names = [self.candidates[place].kernel.replace("full", "dense") for _, place in self.choice]
        ranges = [f"{name} up to {tokens}" for name, (tokens, _) in zip(names, self.choice[:-1], strict=False)]
        return f"{', '.join(ranges)} tokens, then {names[-1]}"


class LibraryTarget(Target):
    """A target with those of its kernels that a library for ONNX Runtime has, and with ONNX Runtime's dense product.

    Attributes:
        level: instruction set level.
        weight_bytes: of all dense weights that a call of the model reads, which share the caches; 0 for one by itself.

    Raises:
        ValueError: there is no library for such a target.
    """

    def __init__(self, target: Target) -> None:
        family, _, name = target.name.partition(":")
        if family != "x86" or name not in LEVELS:
            raise ValueError(f"there is no ONNX Runtime library for target {target.name!r}; give 'x86'")
        self.name, self.level, self.weight_bytes = target.name, level(name), 0
        self._target = target
        self._machine = cost.Machine(self.level, caches())
        self._kernels = calibration.load(name).coefficients
        found = calibration.load(name, _PRICES)
        self._prices = found.coefficients
        self.description = f"{target.description}; dense in ONNX Runtime: {found.origin}"

    def candidates(self, facts: WeightFacts, allowed: Collection[str] | None = None) -> list[Candidate]:
        """See `Target.candidates`."""
        return [found for found in self._target.candidates(facts, allowed) if found.kernel in _KERNELS]

    def conv_candidates(
        self, facts: WeightFacts, window: Window, allowed: Collection[str] | None = None
    ) -> list[Candidate]:
        """See `Target.conv_candidates`."""
        return [found for found in self._target.conv_candidates(facts, window, allowed) if found.kernel in _KERNELS]

    def predict(self, candidate: Candidate, problem: Problem) -> float:
        """See `Target.predict`; dense is that of ONNX Runtime."""
        if problem.tokens == 0:
            return 0.0
        if problem.window is not None:
            if candidate != DENSE or problem.window.is_depthwise(problem.facts.in_features):
                return self._target.predict(candidate, problem)
            # What follows a convolution is part of it there.
            plain = replace(problem, activation="none", residual=False)
            return cost.price(self._prices, *conv_cost.quantities(self._machine, DENSE, plain))
        if candidate.kernel in ("gather", "mask") and problem.tokens > FEW_TOKENS:
            return math.inf
        machine = self._machine_for(problem.facts)
        if candidate == FULL:
            return cost.price(self._prices, "full", full_quantities(machine, problem))
        name, counted = cost.quantities(machine, candidate, problem)
        if candidate == DENSE:
            return cost.price(self._prices, name, counted)
        # Kernels for many tokens are calibrated with weights that the caches hold. From memory none comes faster than
        # the dense form, which is read from the first byte to the last.
        prices, least = self._kernels[name], self._prices["full"]["memory_bytes"]
        prices = {**prices, "memory_bytes": max(prices["memory_bytes"], least)}
        return cost.price({name: prices}, name, counted)

    def _machine_for(self, facts: WeightFacts) -> cost.Machine:
        """The machine with that part of the caches that a weight has to itself.

        From one call to the next they hold what all weights of the model leave of each other.
        """
        own = 4 * facts.out_features * facts.in_features
        if own == 0 or self.weight_bytes <= own:
            return self._machine
        share, found = own / self.weight_bytes, self._machine.caches
        return replace(self._machine, caches=replace(found, l2=int(share * found.l2), l3=max(1, int(share * found.l3))))

    def reorder_us(self, values: int) -> float:
        """Predicted microseconds to bring so many values of maps into another layout."""
        return 1e-3 * values * self._prices["reorder"]["value"]

    def prepare(self, candidate: Candidate, weight: Tensor) -> Product:
        """See `Target.prepare`."""
        return self._target.prepare(candidate, weight)

    def packed_bytes(self, candidate: Candidate, facts: WeightFacts, dtype: torch.dtype = torch.float32) -> int:
        """See `Target.packed_bytes`."""
        return self._target.packed_bytes(DENSE if candidate == FULL else candidate, facts, dtype)


def full_panel(level: Level) -> int:
    """Outputs of a panel of the dense form: those of the register tile."""
    return 2 * level.lanes


def full_tiles(level: Level) -> list[int]:
    """Tokens of the register tiles of the dense form: sums, weights and activations together fit the registers."""
    registers = 32 if level.lanes == 16 else 16
    return [tile for tile in _TILES if 3 * tile + 2 <= registers]


def full_tile(level: Level, tokens: int) -> int:
    """The register tile of the dense form with the least work for so many tokens."""
    step = schedules.PANEL_STEP_COST
    return min(full_tiles(level), key=lambda t: (math.ceil(tokens / t) * (t + step), -t))


def full_quantities(machine: cost.Machine, problem: Problem) -> cost.Quantities:
    """What the cost model counts for the dense form; see `targets.x86.cost`."""
    facts, level, tokens = problem.facts, machine.level, problem.tokens
    tile = full_tile(level, tokens)
    columns = math.ceil(facts.out_features / full_panel(level)) * facts.in_features
    share = 1 / problem.threads
    passes = math.ceil(tokens / tile)
    return {
        "multiply": passes * tile * columns * share,
        "step": passes * columns * share,
        "store": tokens * facts.out_features * share,
        **cost.traffic(machine, 4 * full_panel(level) * columns, share, problem.threads),
        "activations": tokens * facts.out_features * ACTIVATION_COST[problem.activation] * share,
        "call": 1.0,
    }


def choose_forms(price: Price, offered: Sequence[Candidate], chosen: Candidate, unit: int) -> Forms:
    """Add forms to the chosen one until every number of tokens is served about as well as it can be.

    Args:
        price: of a candidate, and of `FULL`.
        offered: sparse candidates.
        chosen: is one of the forms in any case.
        unit: a call has a multiple of this many tokens.
    """
    counts = [unit * multiple for multiple in GRID]
    costs = {candidate: [price(candidate, count) for count in counts] for candidate in (*offered, chosen, FULL)}
    kept = [chosen]
    while len(kept) < MOST_FORMS:
        best = [min(costs[candidate][at] for candidate in kept) for at in range(len(counts))]
        bound = [min(every[at] for every in costs.values()) for at in range(len(counts))]
        worst = max(range(len(counts)), key=lambda at: best[at] / bound[at])
        if best[worst] <= _ANOTHER * bound[worst]:
            break
        kept.append(min(costs, key=lambda candidate: costs[candidate][worst]))
    if len(kept) == 1:
        return Forms((chosen,))
    places = [min(range(len(kept)), key=lambda place: costs[kept[place]][at]) for at in range(len(counts))]
    runs = [[at for at, _ in run] for _, run in itertools.groupby(enumerate(places), key=lambda item: item[1])]
    choice = [(counts[run[-1]], places[run[0]]) for run in runs]
    return Forms(tuple(kept), tuple(choice))


def slower_than_dense(price: Price, forms: Forms, unit: int) -> str | None:
    """At which tokens an operation would be slower than dense, up to the cost model's error; None if at none."""
    for tokens in (unit * multiple for multiple in GRID):
        places = (place for limit, place in forms.choice if tokens <= limit)
        candidate = forms.candidates[next(places, forms.choice[-1][1] if forms.choice else 0)]
        ours, dense = price(candidate, tokens), price(DENSE, tokens)
        if ours > _ERROR * dense:
            return (
                f"at {tokens} tokens, which a call may have, {candidate} would take {ours:.0f} us, dense {dense:.0f} us"
            )
    return None


def slower_maps(
    price: Callable[[Candidate, Maps], float], chosen: Candidate, seen: Maps, free: tuple[bool, bool, bool]
) -> str | None:
    """As `slower_than_dense` for a convolution that takes maps of several sizes.

    Args:
        price: of a candidate for maps.
        chosen: the candidate.
        seen: the maps that it was chosen for.
        free: whether the number of images, height and width may change.
    """
    images = IMAGES if free[0] else (seen.images,)
    scales = SCALES if free[1] or free[2] else (1.0,)
    for count, scale in itertools.product(images, scales):
        height, width = (
            max(1, round(size * scale)) if may else size
            for size, may in ((seen.height, free[1]), (seen.width, free[2]))
        )
        maps = Maps(count, height, width)
        ours, dense = price(chosen, maps), price(DENSE, maps)
        if ours > _ERROR * dense:
            return (
                f"with maps of {maps}, which a call may have, {chosen} would take {ours:.0f} us, dense {dense:.0f} us"
            )
    return None
