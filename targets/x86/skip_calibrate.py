"""The linears that skip which `sparsecomp calibrate` measures."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecomp.targets.base import WeightFacts
from sparsecomp.targets.skip import SkipSpec
from sparsecomp.targets.x86 import cost
from sparsecomp.targets.x86.target import X86Target

KEPT = (1.0, 0.75, 0.5, 0.25, 0.1)
FEW = (1, 2, 4)


@dataclass(frozen=True, eq=False)
class SkipCase:
    """A linear `[O, I]` that skips inputs, to measure.

    Attributes:
        weight: `[O, I]`.
        kept: share of the inputs that stay.
        tokens: of a call.
    """

    weight: Tensor
    kept: float
    tokens: int

    def quantities(self, machine: cost.Machine) -> tuple[str, cost.Quantities]:
        """What the cost model counts for it."""
        counted = cost.skip_quantities(machine, WeightFacts.of(self.weight), self.kept, self.tokens, 1)
        return "skip", counted

    def call(self, level_name: str) -> Callable[[], object]:
        """A call, ready to be timed."""
        outputs, inputs = self.weight.shape
        target = X86Target(level_name)
        rows = target.skip_rows(self.weight.t())
        kernel = target.prepare_skip(SkipSpec("inputs", (inputs, outputs), (torch.zeros(inputs),)), [rows])
        x = torch.randn(self.tokens, inputs) * (torch.rand(self.tokens, inputs) < self.kept)
        out = torch.empty(self.tokens, outputs)
        return lambda: kernel.run(x, (None, None, None), None, out)


def skip_cases(shapes: tuple[tuple[int, int], ...]) -> Iterator[SkipCase]:
    """The grid in a fixed random order, again and again."""
    order = random.Random(0)
    grid = list(itertools.product(shapes, KEPT, FEW))
    while True:
        order.shuffle(grid)
        for shape, kept, tokens in grid:
            yield SkipCase(torch.randn(shape), kept, tokens)
