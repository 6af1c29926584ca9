"""Measures candidates and dense on the real shapes, interleaved, so that changes of the clock hit all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from sparsecomp.targets.base import DENSE, Candidate, ConvEpilogue, ConvKernel, Kernel, Problem, Target
from sparsecomp.window import convolve

ROUNDS = 15
BUDGET_S = 0.5
"""Rounds end when this is spent, but not before `MIN_ROUNDS`."""
MIN_ROUNDS = 3


def measure(
    candidates: Iterable[Candidate],
    weight: Tensor,
    problem: Problem,
    target: Target,
    *,
    rounds: int = ROUNDS,
    budget_s: float = BUDGET_S,
) -> dict[Candidate, float]:
    """Time candidates and `F.linear` (`F.conv2d`) on random activations of the problem's shape.

    Every round runs each candidate once after the other. Only the product is timed, without activation and residual:
    under dense they are fused into other loops, so that timing them one by one here would favour the sparse kernels.

    Args:
        candidates: what to time; dense is timed in any case.
        weight: `[O, I]`, or `[O, I / groups, *kernel]` of a convolution.
        problem: gives tokens or maps, and dtype.
        target: prepares the kernels.
        rounds: at most this many.
        budget_s: seconds after which no further round begins.

    Returns:
        Median microseconds of one call by candidate, dense included.
    """
    # Under Dynamo fake tensors and other modes may be active: this runs for real.
    with _disable_current_modes(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        weight = weight.detach()
        sparse = [candidate for candidate in candidates if not candidate.is_dense]
        if problem.window is None:
            x = torch.randn(problem.tokens, weight.shape[1], generator=generator).to(problem.dtype)
            out = torch.empty(problem.tokens, weight.shape[0])
            calls: dict[Candidate, Callable[[], object]] = {DENSE: lambda: functional.linear(x, weight)}
            calls |= {candidate: _call(target.prepare(candidate, weight), x, out) for candidate in sparse}
        else:
            calls = _conv_calls(sparse, weight, problem, target, generator)
        for call in calls.values():
            call()
        return _interleaved(calls, rounds, budget_s)


def _call(kernel: Kernel, x: Tensor, out: Tensor) -> Callable[[], object]:
    def call() -> object:
        # As the run time does it: kernels take float32, other types are widened before and narrowed after.
        kernel.run(x.float(), None, None, "none", out)
        return out.to(x.dtype)

    return call


def _conv_calls(
    sparse: Iterable[Candidate], weight: Tensor, problem: Problem, target: Target, generator: torch.Generator
) -> dict[Candidate, Callable[[], object]]:
    window, maps = problem.window, problem.maps
    if window is None or maps is None:
        raise ValueError("a convolution is measured for a window and maps, and the problem has none")
    if weight.dim() == 3:
        weight = weight.unsqueeze(2)
    x = torch.randn(maps.images, weight.shape[1] * window.groups, maps.height, maps.width, generator=generator)
    x = x.to(problem.dtype)
    out = torch.empty(maps.images, weight.shape[0], *window.output(maps.height, maps.width))

    def call_of(kernel: ConvKernel) -> Callable[[], object]:
        def call() -> object:
            kernel.run(x.float(), None, None, ConvEpilogue(), out)
            return out.to(x.dtype)

        return call

    calls: dict[Candidate, Callable[[], object]] = {DENSE: lambda: convolve(x, weight, window)}
    return calls | {candidate: call_of(target.prepare_conv(candidate, weight, window)) for candidate in sparse}


def _interleaved(calls: dict[Candidate, Callable[[], object]], rounds: int, budget_s: float) -> dict[Candidate, float]:
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in calls}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - begin > budget_s:
            break
        for candidate, call in calls.items():
            start = time.perf_counter()
            call()
            times[candidate].append(time.perf_counter() - start)
    return {candidate: statistics.median(values) * 1e6 for candidate, values in times.items()}
