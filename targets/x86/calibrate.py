"""`sparsecomp calibrate`: measure what the cost model's quantities cost on this machine, in under a minute."""

from __future__ import annotations

import datetime
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.kernels import peak
from sparsecomp.runtime.launch import KernelSource, Launch, Weights, function_of
from sparsecomp.targets.base import DENSE, DEPTHWISE, Candidate, Problem, WeightFacts
from sparsecomp.targets.cpu.counts import ACTIVATION_COST
from sparsecomp.targets.cpu.timing import median_seconds
from sparsecomp.targets.x86 import calibration, cost
from sparsecomp.targets.x86.conv_calibrate import ConvCase, conv_cases, depthwise_cases
from sparsecomp.targets.x86.cpu import best_level, caches, cpu_name, level
from sparsecomp.targets.x86.skip_calibrate import SkipCase, skip_cases
from sparsecomp.targets.x86.target import X86Target, create

SHAPES = ((384, 384), (768, 768), (1536, 384), (384, 1536), (3072, 768), (768, 3072), (2048, 2048))
MEMORY_SHAPES = ((4096, 4096), (2048, 8192), (768, 768), (3072, 768), (1024, 4096))
DENSITIES = (0.5, 0.35, 0.2, 0.1, 0.05)
MANY_TOKENS = (16, 32, 64, 100, 128, 256, 512)
FEW_TOKENS = (1, 2, 4, 8)
_SECONDS = 50.0
_FOLDS = 5


@dataclass
class Result:
    """What calibration found; prints as a table.

    Attributes:
        cpu: name.
        level: instruction set level.
        peak: GFLOP/s of one thread.
        errors: by model, the median relative error of predictions for points that were left out of the fit.
        points: measurements by model.
        seconds: that it took.
        path: of the file that was written.
    """

    cpu: str
    level: str
    peak: float
    errors: dict[str, float] = field(default_factory=dict)
    points: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    path: str = ""

    def __str__(self) -> str:
        lines = [
            f"{self.cpu}, {self.level}: {self.peak:.1f} GFLOP/s float32 on one thread; {self.seconds:.0f} s",
            f"written to {self.path}",
            f"{'model':<12} points  median error of left-out points",
        ]
        lines += [f"{name:<12} {self.points[name]:>6}  {error:.0%}" for name, error in self.errors.items()]
        return "\n".join(lines)


def fma_call(level_name: str | None = None, threads: int = 1) -> tuple[Callable[[], None], int]:
    """A call of `kernels.peak` by so many threads, about a millisecond where each has a core, and its operations."""
    machine = level(level_name or best_level())
    source = KernelSource("peak", repr(machine.lanes), lambda: peak.build(machine.lanes), machine.tvm_target)
    rounds = 200_000
    call = Launch(function_of(source), Weights([]), [rounds], threads, threads, 16)
    x, bias, out = torch.tensor([0.5, 1.0]), torch.zeros(1), torch.empty(machine.lanes)
    return lambda: call.run(x, bias, None, out), threads * peak.flops(machine.lanes, rounds)


def measure_fma_peak(level_name: str | None = None, seconds: float = 0.3) -> float:
    """GFLOP/s of float32 multiply-adds of one thread: the best of several runs of `kernels.peak`."""
    call, flops = fma_call(level_name)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return flops / best / 1e9


def calibrate(seconds: float = _SECONDS, level_name: str | None = None) -> Result:
    """Measure, fit and write the prices of this machine.

    Args:
        seconds: for measurements; fitting and the first builds of kernels come on top.
        level_name: instruction set level; the machine's highest if None.

    Returns:
        What was found.
    """
    chosen = level_name or best_level()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        result = Result(cpu_name(), chosen, measure_fma_peak(chosen))
        points = _measure(chosen, start + seconds)
        prices = {}
        for name, rows in points.items():
            counted = [row for row, _ in rows]
            taken = np.array([nanoseconds for _, nanoseconds in rows])
            prices[name] = cost.fit(counted, taken)
            result.points[name] = len(rows)
            result.errors[name] = left_out_error(counted, taken)
        _activation_prices(chosen, prices)
        prices["convert"] = {"value": _convert_price()}
        prices["layout"] = {"value": _layout_price()}
    finally:
        torch.set_num_threads(threads)
    result.seconds = time.perf_counter() - start
    notes = {"peak_gflops": round(result.peak, 1), "errors": result.errors, "points": result.points}
    now = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    result.path = str(calibration.save(chosen, prices, now, notes))
    create.cache_clear()  # targets made before hold the old prices
    return result


def _measure(level_name: str, deadline: float) -> dict[str, list[tuple[cost.Quantities, float]]]:
    """Measurements by model, spread over the grid for as long as there is time; at least a few for each."""
    machine = cost.Machine(level(level_name), caches())
    plans: dict[str, Iterator[_Case | ConvCase | SkipCase]] = {
        "rows": _cases("rows", SHAPES, DENSITIES, MANY_TOKENS),
        "dense": _cases("dense", SHAPES, (1.0,), MANY_TOKENS),
        "panel": _cases("panel", SHAPES, DENSITIES, MANY_TOKENS),
        "gather": _cases("gather", MEMORY_SHAPES, DENSITIES, FEW_TOKENS),
        "dense_one": _cases("dense", MEMORY_SHAPES + SHAPES, (1.0,), (1,)),
        "dense_few": _cases("dense", MEMORY_SHAPES + SHAPES, (1.0,), (2, 4, 8, 12)),
        "panel_one": _cases("panel", MEMORY_SHAPES, DENSITIES, (1,)),
        "skip": skip_cases(MEMORY_SHAPES + SHAPES),
        "conv": conv_cases("conv", machine),
        "conv_strips": conv_cases("conv_strips", machine),
        "dense_conv": conv_cases("dense", machine),
        "depthwise": depthwise_cases(DEPTHWISE),
        "dense_depthwise": depthwise_cases(DENSE),
    }
    if machine.level.spread:
        plans["mask"] = _cases("mask", MEMORY_SHAPES, DENSITIES, FEW_TOKENS)
    points: dict[str, list[tuple[cost.Quantities, float]]] = {name: [] for name in plans}
    for turn in itertools.count():
        for name, cases in plans.items():
            if turn >= _LEAST and time.perf_counter() > deadline:
                return points
            case = next(cases)
            given, counted = case.quantities(machine)
            if given != name:
                raise AssertionError(f"a case for {name} counted as {given}")
            points[name].append((counted, 1e9 * median_seconds(case.call(level_name))))
    raise AssertionError("unreachable")


_LEAST = 8


@dataclass
class _Case:
    candidate: Candidate
    problem: Problem
    weight: Tensor

    def quantities(self, machine: cost.Machine) -> tuple[str, cost.Quantities]:
        """What the cost model counts for it."""
        return cost.quantities(machine, self.candidate, self.problem)

    def call(self, level_name: str) -> Callable[[], object]:
        """A call, ready to be timed."""
        x = torch.randn(self.problem.tokens, self.problem.facts.in_features)
        return runner(self.candidate, self.weight, x, level_name)


def runner(candidate: Candidate, weight: Tensor, x: Tensor, level_name: str) -> Callable[[], object]:
    """A call of a candidate on x, ready to be timed."""
    bias = torch.zeros(weight.shape[0])
    # A cache that does not replace its oldest line first keeps a part of a weight of twice its size.
    count = 3 if weight.nbytes > caches().l3 / 2 else 1
    if candidate.is_dense:
        weights = itertools.cycle([weight, *(weight.clone() for _ in range(count - 1))])
        return lambda: functional.linear(x, next(weights), bias)
    target = X86Target(level_name)
    kernels = itertools.cycle([target.prepare(candidate, weight) for _ in range(count)])
    out = torch.empty(x.shape[0], weight.shape[0])
    return lambda: next(kernels).run(x, bias, None, "none", out)


def _cases(
    kernel: str, shapes: tuple[tuple[int, int], ...], densities: tuple[float, ...], tokens: tuple[int, ...]
) -> Iterator[_Case | ConvCase]:
    """The grid in a fixed random order, again and again."""
    order = random.Random(0)
    grid = list(itertools.product(shapes, densities, tokens))
    generator = torch.Generator().manual_seed(0)
    while True:
        order.shuffle(grid)
        for (outputs, inputs), density, count in grid:
            if kernel == "panel":
                v = order.choice((8, 16, 32))
                panels = -(-outputs // v)
                kept = (torch.rand(panels, 1, inputs, generator=generator) < density).expand(panels, v, inputs)
                weight = torch.randn(outputs, inputs) * kept.reshape(-1, inputs)[:outputs]
                candidate = Candidate("panel", "unstructured", (("v", v),))
            else:
                weight = torch.randn(outputs, inputs)
                if density < 1:
                    weight *= torch.rand(outputs, inputs, generator=generator) < density
                candidate = DENSE if kernel == "dense" else Candidate(kernel, "unstructured")
            yield _Case(candidate, Problem(WeightFacts.of(weight), count, 1), weight)


def left_out_error(rows: list[cost.Quantities], taken: np.ndarray) -> float:
    """Median relative error of predictions for points outside of the fit, by k-fold cross-validation."""
    errors = []
    folds = np.arange(len(rows)) % _FOLDS
    for fold in range(_FOLDS):
        inside = [row for row, own in zip(rows, folds, strict=True) if own != fold]
        prices = cost.fit(inside, taken[folds != fold])
        for row, nanoseconds, own in zip(rows, taken, folds, strict=True):
            if own == fold:
                predicted = sum(prices[name] * amount for name, amount in row.items())
                errors.append(abs(predicted - nanoseconds) / nanoseconds)
    return float(np.median(errors)) if errors else float("nan")


def _activation_prices(level_name: str, prices: dict[str, dict[str, float]]) -> None:
    """The price of one value through an activation, from the row kernel with GELU and without."""
    weight = torch.randn(1536, 384) * (torch.rand(1536, 384) < 0.05)
    x, bias, out = torch.randn(128, 384), torch.zeros(1536), torch.empty(128, 1536)
    kernel = X86Target(level_name).prepare(Candidate("rows", "unstructured"), weight)
    plain = median_seconds(lambda: kernel.run(x, bias, None, "none", out))
    gelu = median_seconds(lambda: kernel.run(x, bias, None, "gelu", out))
    price = max(0.0, 1e9 * (gelu - plain) / out.numel() / ACTIVATION_COST["gelu"])
    for model in prices.values():
        model["activations"] = price


def _convert_price() -> float:
    """Nanoseconds to widen one bfloat16 value and to narrow it again."""
    x = torch.randn(256, 1024).bfloat16()
    return 1e9 * median_seconds(lambda: x.float().bfloat16()) / x.numel()


def _layout_price() -> float:
    """Nanoseconds for each value of maps that are turned to channels last, or back."""
    first = torch.randn(1, 256, 28, 28)
    last = first.to(memory_format=torch.channels_last, copy=True)
    both = median_seconds(lambda: last.copy_(first)) + median_seconds(lambda: first.copy_(last))
    return 0.5e9 * both / first.numel()
