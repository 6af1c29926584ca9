"""Measures candidates and dense on the real shapes, interleaved, so that changes of the clock hit all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from sparsecomp.targets.base import (
    DENSE,
    Candidate,
    ConvEpilogue,
    ConvKernel,
    DeviceKernel,
    Kernel,
    Problem,
    Product,
    Target,
)
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
            x = (8 * torch.randn(problem.tokens, weight.shape[1], generator=generator)).to(weight)
            out = torch.empty(problem.tokens, weight.shape[0])
            calls: dict[Candidate, Callable[[], object]] = {DENSE: lambda: functional.linear(x, weight)}
            if weight.dtype == torch.int8:
                calls[DENSE] = lambda: torch._int_mm(x, weight.t())
            calls |= {candidate: _call(target.prepare(candidate, weight), x, out) for candidate in sparse}
        else:
            calls = _conv_calls(sparse, weight, problem, target, generator)
        for call in calls.values():
            call()
        return _interleaved(calls, rounds, budget_s, _gpu_seconds if weight.is_cuda else _seconds)


def call_us(call: Callable[[], object], *, on_gpu: bool) -> float:
    """Median microseconds of a call that is made again and again, after a first one that does not count."""
    call()
    return _interleaved({DENSE: call}, ROUNDS, BUDGET_S, _gpu_seconds if on_gpu else _seconds)[DENSE]


def _call(kernel: Product, x: Tensor, out: Tensor) -> Callable[[], object]:
    if isinstance(kernel, DeviceKernel):
        return lambda: kernel.product(x, None)

    def call() -> object:
        assert isinstance(kernel, Kernel)
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


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_seconds(call: Callable[[], object]) -> float:
    """Of one of several calls in a row: a GPU starts them while the host is ahead, as in a model."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(_ROW):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / _ROW


_ROW = 10


def _interleaved(
    calls: dict[Candidate, Callable[[], object]],
    rounds: int,
    budget_s: float,
    seconds: Callable[[Callable[[], object]], float],
) -> dict[Candidate, float]:
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in calls}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - begin > budget_s:
            break
        for candidate, call in calls.items():
            times[candidate].append(seconds(call))
    return {candidate: statistics.median(values) * 1e6 for candidate, values in times.items()}
