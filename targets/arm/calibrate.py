"""`sparsecomp calibrate` on an ARM machine: what kernels and PyTorch's own products take, over what is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.patterns import Pattern
from sparsecomp.targets.arm import calibration
from sparsecomp.targets.arm.machine import ArmMachine
from sparsecomp.targets.base import DENSE, Candidate, ConvEpilogue, Problem, WeightFacts
from sparsecomp.targets.cpu.timing import median_seconds
from sparsecomp.window import Maps, Window

LINEARS = ((384, 384), (384, 1536), (1536, 384), (768, 3072))
CONVS = ((64, 64, 28, 3), (96, 24, 56, 1), (192, 64, 14, 1), (112, 672, 14, 1))
"""Inputs, outputs, height and width, and side of the window."""
TOKENS = (16, 64, 128)
_PATTERNS = ("unstructured@0.7", "unstructured@0.9", "8:2:4")


def calibrate(
    target: ArmMachine,
    linears: Iterable[tuple[int, int]] = LINEARS,
    convs: Iterable[tuple[int, int, int, int]] = CONVS,
) -> dict[str, tuple[float, int]]:
    """Measure, on the threads of PyTorch, and keep a factor for each kernel family.

    Args:
        target: of this machine.
        linears: inputs and outputs.
        convs: see `CONVS`; of each the depthwise convolution of its inputs is measured too.

    Returns:
        By family the factor, and from how many calls it is the median.
    """
    ratios: dict[str, list[float]] = {}

    def add(candidate: Candidate, problem: Problem, call: Callable[[], object]) -> None:
        family = target.family(candidate, problem)
        counted = target.predict(candidate, problem) / target.scale(family)
        ratios.setdefault(family, []).append(1e6 * median_seconds(call) / counted)

    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for inputs, outputs in linears:
            for pattern in _PATTERNS:
                weight = Pattern.parse(pattern).project(torch.randn(outputs, inputs, generator=generator))
                for tokens in TOKENS:
                    _linear(target, weight, torch.randn(tokens, inputs, generator=generator), add)
        for inputs, outputs, side, kernel in convs:
            x = torch.randn(1, inputs, side, side, generator=generator)
            weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator)
            weight = Pattern.parse(_PATTERNS[0]).project(weight.flatten(1)).reshape(weight.shape)
            _conv(target, weight, x, 1, add)
            _conv(target, torch.randn(inputs, 1, 3, 3, generator=generator), x, inputs, add)
    return calibration.save(target.cpu.name, target.calibration, ratios)


_Add = Callable[[Candidate, Problem, Callable[[], object]], None]


def _linear(target: ArmMachine, weight: Tensor, x: Tensor, add: _Add) -> None:
    facts = WeightFacts.of(weight)
    problem = Problem(facts, x.shape[0], torch.get_num_threads())
    out = torch.empty(x.shape[0], weight.shape[0])
    for candidate in target.candidates(facts):
        if candidate.is_dense:
            add(candidate, problem, lambda: functional.linear(x, weight))
            continue
        kernel = target.prepare(candidate, weight)
        add(candidate, problem, lambda kernel=kernel: kernel.run(x, None, None, "none", out))  # type: ignore[misc]


def _conv(target: ArmMachine, weight: Tensor, x: Tensor, groups: int, add: _Add) -> None:
    side = weight.shape[-1]
    window = Window((side, side), padding=(side // 2, side // 2), groups=groups)
    maps, facts = Maps(x.shape[0], x.shape[2], x.shape[3]), WeightFacts.of(weight.flatten(1))
    problem = Problem(facts, maps.positions(window), torch.get_num_threads(), window=window, maps=maps)
    # Inductor gives PyTorch's own convolutions channels last.
    last, dense = x.to(memory_format=torch.channels_last), weight.to(memory_format=torch.channels_last)
    add(DENSE, problem, lambda: functional.conv2d(last, dense, padding=side // 2, groups=groups))
    out = torch.empty(x.shape[0], weight.shape[0], *x.shape[2:])
    for candidate in target.conv_candidates(facts, window):
        if candidate != DENSE:
            kernel = target.prepare_conv(candidate, weight, window)
            add(candidate, problem, lambda kernel=kernel: kernel.run(x, None, None, ConvEpilogue(), out))  # type: ignore[misc]
