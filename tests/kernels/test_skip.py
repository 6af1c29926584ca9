"""Kernels that read only the rows of what stays, against the definition, through the target that puts them together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from kernel_cases import Guarded, close, needs_x86, random_weight
from torch import Tensor
from torch.nn import functional

from sparsecomp.kernels import skip
from sparsecomp.targets import get_target
from sparsecomp.targets.skip import FEW_TOKENS, SkipKernel, SkipSpec
from sparsecomp.targets.x86 import X86Target
from sparsecomp.targets.x86.cpu import supported

pytestmark = needs_x86

LEVELS = [name for name in ("avx512", "avx2", "generic") if supported(name)]
SIZES = (37, 51, 43)
"""Inputs, hidden units and outputs; none is a multiple of a vector."""


class Ffn:
    """Random weights of an FFN `[O, I]`, some of their entries zero, with biases."""

    def __init__(self, gated: bool, density: float = 1.0) -> None:
        inputs, hidden, outputs = SIZES
        self.gate = random_weight(hidden, inputs, density, 1)
        self.up = random_weight(hidden, inputs, density, 2) if gated else None
        self.down = random_weight(outputs, hidden, density, 3)
        self.biases = [torch.linspace(-1, 1, hidden), torch.linspace(1, 0, hidden), torch.linspace(0, 2, outputs)]

    def rows(self, target: X86Target, kind: str) -> list[skip.Expr]:
        firsts = [weight for weight in (self.gate, self.up) if weight is not None]
        ready = firsts if kind == "units" else [weight.t().contiguous() for weight in firsts]
        return [target.skip_rows(weight) for weight in (*ready, self.down.t().contiguous())]

    def expected(self, x: Tensor, kind: str, thresholds: Sequence[Tensor]) -> Tensor:
        for_gate, for_up = (stays(x, thresholds[0]), stays(x, thresholds[-2])) if kind == "inputs" else (x, x)
        hidden = functional.silu(functional.linear(for_gate, self.gate, self.biases[0]))
        if kind == "units":
            hidden = stays(hidden, thresholds[0])
        if self.up is not None:
            hidden = hidden * functional.linear(for_up, self.up, self.biases[1])
        if kind == "inputs":
            hidden = stays(hidden, thresholds[-1])
        return functional.linear(hidden, self.down, self.biases[2])


def stays(values: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(values.abs() > threshold, values, 0.0)


def run(
    kernel: SkipKernel, x: Tensor, outputs: int, biases: Sequence[Tensor | None], residual: Tensor | None
) -> Tensor:
    out = Guarded((x.shape[0], outputs))
    kernel.run(x, biases, residual, out.tensor)
    out.check()
    return out.tensor


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("density", [1.0, 0.4], ids=["dense", "sparse"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("kind", ["units", "inputs"])
def test_ffn(kind: str, gated: bool, density: float, level: str) -> None:
    ffn, target = Ffn(gated, density), X86Target(level)
    generator = torch.Generator().manual_seed(5)
    inputs, hidden, outputs = SIZES
    widths = [hidden] if kind == "units" else [inputs, inputs, hidden] if gated else [inputs, hidden]
    thresholds = tuple(torch.rand(width, generator=generator) * 0.8 for width in widths)
    kernel = target.prepare_skip(SkipSpec(kind, SIZES, thresholds, "silu", gated), ffn.rows(target, kind))
    for tokens in (1, 3, FEW_TOKENS) if level == LEVELS[0] else (1,):
        x = torch.randn(tokens, inputs, generator=generator)
        residual = torch.randn(tokens, outputs, generator=generator)
        close(run(kernel, x, outputs, ffn.biases, residual), ffn.expected(x, kind, thresholds) + residual)


@pytest.mark.parametrize("density", [1.0, 0.4], ids=["dense", "sparse"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_linear(threads: int, density: float) -> None:
    target, weight = get_target(None), random_weight(45, 70, density)
    x, bias, threshold = torch.randn(2, 70), torch.randn(45), torch.rand(70)
    kernel = target.prepare_skip(SkipSpec("inputs", (70, 45), (threshold,), "relu"), [target.skip_rows(weight.t())])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        given = run(kernel, x, 45, (bias, None, None), None)
    finally:
        torch.set_num_threads(before)
    close(given, functional.linear(stays(x, threshold), weight, bias).relu())
    assert kernel.counters.tolist() == [[int((x.abs() > threshold).sum()), 140]]


@pytest.mark.parametrize("fused", ["gate", "up"])
def test_one_bias_for_gate_and_up(fused: str) -> None:
    ffn, target = Ffn(True), get_target(None)
    threshold = torch.full((SIZES[1],), 0.1)
    joined = torch.cat(ffn.biases[:2] if fused == "gate" else ffn.biases[1::-1])
    kernel = target.prepare_skip(SkipSpec("units", SIZES, (threshold,), "silu", True, fused), ffn.rows(target, "units"))
    x = torch.randn(1, SIZES[0])
    given = run(kernel, x, SIZES[2], (joined, None, ffn.biases[2]), None)
    close(given, ffn.expected(x, "units", [threshold]))


@pytest.mark.parametrize("kept", [0, 1, 2, 51])
@pytest.mark.parametrize("gated", [False, True])
def test_few_units_or_all(kept: int, gated: bool) -> None:
    """Where a part of the threads has nothing to do, and where every unit stays."""
    ffn, target = Ffn(gated), get_target(None)
    threshold = torch.full((SIZES[1],), torch.inf)
    threshold[:kept] = -1.0
    kernel = target.prepare_skip(SkipSpec("units", SIZES, (threshold,), "silu", gated), ffn.rows(target, "units"))
    for _ in range(2):  # the workspace holds what the first call left
        x = torch.randn(1, SIZES[0])
        given = run(kernel, x, SIZES[2], ffn.biases, None)
        close(given, ffn.expected(x, "units", [threshold]))
    assert kernel.counters.tolist() == [[2 * kept, 2 * SIZES[1]]]


def test_nan_is_not_skipped() -> None:
    target, weight = get_target(None), random_weight(16, 32, 1.0)
    kernel = target.prepare_skip(SkipSpec("inputs", (32, 16), (torch.ones(32),)), [target.skip_rows(weight.t())])
    x, out = torch.zeros(1, 32), torch.zeros(1, 16)
    x[0, 3] = torch.nan
    kernel.run(x, (None, None, None), None, out)
    assert out.isnan().all()


def test_contiguous_rows_are_not_copied() -> None:
    target, weight = get_target(None), torch.randn(8, 16)
    assert target.skip_rows(weight).nbytes == 0
    assert target.skip_rows(weight.t()).nbytes == weight.numel() * 4


@pytest.mark.parametrize("activation", ["relu", "relu2", "relu6"])
def test_exact_zeros_change_nothing(activation: str) -> None:
    ffn, target = Ffn(False), get_target(None)
    spec = SkipSpec("units", SIZES, (torch.zeros(SIZES[1]),), activation)
    kernel = target.prepare_skip(spec, ffn.rows(target, "units"))
    x = torch.randn(4, SIZES[0])
    hidden = functional.linear(x, ffn.gate, ffn.biases[0])
    hidden = {"relu": hidden.relu(), "relu2": hidden.relu() ** 2, "relu6": functional.relu6(hidden)}[activation]
    close(run(kernel, x, SIZES[2], ffn.biases, None), functional.linear(hidden, ffn.down, ffn.biases[2]))


def test_the_reference_agrees_with_torch() -> None:
    ffn, x, threshold = Ffn(True), torch.randn(3, SIZES[0]), torch.rand(SIZES[1])
    ffn.biases = [torch.zeros_like(bias) for bias in ffn.biases]
    assert ffn.up is not None
    arrays = [value.numpy() for value in (x, ffn.gate, ffn.up, ffn.down.t().contiguous(), threshold)]
    given = skip.ffn_reference(*arrays, "silu")
    np.testing.assert_allclose(given, ffn.expected(x, "units", [threshold]).numpy(), rtol=1e-4, atol=1e-4)
