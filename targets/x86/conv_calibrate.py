"""The convolutions that `sparsecomp calibrate` measures."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecomp.targets.base import DENSE, Candidate, ConvEpilogue, Problem, WeightFacts
from sparsecomp.targets.cpu import conv_schedules
from sparsecomp.targets.x86 import conv_cost
from sparsecomp.targets.x86.cost import Machine, Quantities
from sparsecomp.targets.x86.target import X86Target
from sparsecomp.window import Maps, Window, convolve

# Input channels, output channels, height and width of the map, window and stride, as in common networks.
SHAPES = (
    (64, 64, 56, 1, 1),
    (64, 256, 56, 1, 1),
    (256, 64, 56, 1, 1),
    (32, 64, 112, 1, 1),
    (256, 256, 28, 1, 1),
    (512, 128, 28, 1, 1),
    (256, 1024, 14, 1, 1),
    (1024, 256, 14, 1, 1),
    (480, 112, 14, 1, 1),
    (512, 2048, 7, 1, 1),
    (1152, 320, 7, 1, 1),
    (256, 512, 56, 1, 2),
    (64, 64, 56, 3, 1),
    (128, 128, 28, 3, 1),
    (256, 256, 14, 3, 1),
    (512, 512, 7, 3, 1),
    (512, 1024, 28, 1, 2),
    (128, 128, 56, 3, 2),
    (256, 256, 28, 3, 2),
    (32, 32, 112, 3, 1),
    (32, 64, 28, 5, 1),
    (3, 64, 224, 7, 2),
)
DEPTHWISE_SHAPES = (
    (32, 112, 3, 1),
    (96, 112, 3, 2),
    (144, 56, 5, 2),
    (240, 28, 5, 1),
    (144, 56, 3, 1),
    (240, 28, 3, 2),
    (480, 14, 3, 1),
    (672, 14, 5, 1),
    (672, 14, 5, 2),
    (1152, 7, 3, 1),
    (1152, 7, 5, 1),
    (512, 14, 3, 2),
)
"""Channels, height and width of the map, window and stride."""
DENSITIES = (0.5, 0.35, 0.2, 0.1, 0.05)


@dataclass(frozen=True)
class ConvCase:
    """One convolution to measure.

    Attributes:
        candidate: how it is computed.
        problem: what is computed.
        weight: of it.
    """

    candidate: Candidate
    problem: Problem
    weight: Tensor

    def quantities(self, machine: Machine) -> tuple[str, Quantities]:
        """What the cost model counts for it."""
        return conv_cost.quantities(machine, self.candidate, self.problem)

    def call(self, level_name: str) -> Callable[[], object]:
        """A call, ready to be timed."""
        window, maps = self.problem.window, self.problem.maps
        if window is None or maps is None:
            raise ValueError("a convolution is measured for a window and maps, and the problem has none")
        x = torch.randn(maps.images, self.weight.shape[1] * window.groups, maps.height, maps.width)
        if self.candidate.is_dense:
            # Channels first: what the library takes to turn them is what Inductor takes around it.
            return lambda: convolve(x, self.weight, window)
        kernel = X86Target(level_name).prepare_conv(self.candidate, self.weight, window)
        out = torch.empty(maps.images, self.weight.shape[0], *window.output(maps.height, maps.width))
        return lambda: kernel.run(x, None, None, ConvEpilogue(), out)


def depthwise_cases(candidate: Candidate) -> Iterator[ConvCase]:
    """Depthwise convolutions in a fixed order, again and again."""
    generator = torch.Generator().manual_seed(0)
    for channels, size, taps, stride in itertools.cycle(DEPTHWISE_SHAPES):
        weight = torch.randn(channels, 1, taps, taps, generator=generator)
        window = Window((taps, taps), (stride, stride), (taps // 2, taps // 2), groups=channels)
        yield _case(candidate, weight, window, size)


def _case(candidate: Candidate, weight: Tensor, window: Window, size: int) -> ConvCase:
    maps = Maps(1, size, size)
    facts = WeightFacts.of(weight.flatten(1))
    return ConvCase(candidate, Problem(facts, maps.positions(window), 1, window=window, maps=maps), weight)


def conv_cases(kernel: str, machine: Machine) -> Iterator[ConvCase]:
    """The grid in a fixed random order, again and again; for `conv_strips` what it is for."""
    order = random.Random(0)
    shapes = [shape for shape in SHAPES if kernel != "conv_strips" or shape[3] > 1 or shape[4] > 1]
    grid = list(itertools.product(shapes, (1.0,) if kernel == "dense" else DENSITIES))
    generator = torch.Generator().manual_seed(0)
    while True:
        order.shuffle(grid)
        for (inputs, outputs, size, taps, stride), density in grid:
            weight = torch.randn(outputs, inputs, taps, taps, generator=generator)
            if density < 1:
                weight *= torch.rand(weight.shape, generator=generator) < density
            window = Window((taps, taps), (stride, stride), (taps // 2, taps // 2))
            widest = order.choice(conv_schedules.widest(machine.level))
            candidate = DENSE if kernel == "dense" else Candidate(kernel, "unstructured", (("vectors", widest),))
            yield _case(candidate, weight, window, size)
