"""What the planner and the backend are tested with: a small model, and a target whose kernels are dense products."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsecomp
from sparsecomp.ir import ACTIVATIONS
from sparsecomp.patterns import Pattern
from sparsecomp.targets.base import DENSE, Candidate, Kernel, Problem, Target, WeightFacts

ROWS = Candidate("rows", "unstructured")

_APPLY: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda value: value,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda value: functional.gelu(value, approximate="tanh"),
    "silu": functional.silu,
    "relu6": functional.relu6,
    "hardswish": functional.hardswish,
}
assert set(_APPLY) == set(ACTIVATIONS)


class FakeKernel(Kernel):
    def __init__(self, weight: Tensor, error: float = 0.0) -> None:
        self.weight = weight.detach().float()  # kernels take float32, whatever the weight is stored in
        self.nbytes = int(weight.count_nonzero()) * 8
        self.error = error
        self.runs = 0

    def run(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, out: Tensor) -> None:
        self.runs += 1
        assert x.dtype == out.dtype == torch.float32
        value = _APPLY[activation](functional.linear(x, self.weight, bias)) * (1 + self.error)
        out.copy_(value if residual is None else value + residual)

    @property
    def source(self) -> str:
        return "fake"


class FakeTarget(Target):
    """Prices by density: `us` microseconds for a full weight under the sparse kernels, `dense_us` for dense."""

    name = "fake"
    description = "fake target for tests"

    def __init__(self, us: float = 1000.0, dense_us: float = 500.0, error: float = 0.0) -> None:
        self.us, self.dense_us, self.error = us, dense_us, error
        self.prepared: list[Candidate] = []
        self.kernels: list[FakeKernel] = []
        self.overhead: dict[str, float] = {}
        self.fail = False

    def candidates(self, facts: WeightFacts, allowed: Collection[str] | None = None) -> list[Candidate]:
        found = [DENSE]
        groups = (d.pattern for d in facts.patterns if d.pattern.kind in ("nm", "vnm") and d.fill > 0.9)
        forms = ["unstructured", *map(str, groups)]
        for form in forms:
            kernel = "panel" if Pattern.parse(form).kind == "vnm" else "rows"
            if allowed is None or form in allowed:
                found.append(Candidate(kernel, form, (("v", 8),) if kernel == "panel" else ()))
        return found

    def predict(self, candidate: Candidate, problem: Problem) -> float:
        if candidate.is_dense:
            return self.dense_us
        return self.us * problem.facts.density + self.overhead.get(candidate.kernel, 0.0)

    def prepare(self, candidate: Candidate, weight: Tensor) -> Kernel:
        if self.fail:
            raise RuntimeError("no such kernel today")
        assert not candidate.is_dense
        assert not isinstance(weight, torch._subclasses.FakeTensor)
        self.prepared.append(candidate)
        kernel = FakeKernel(weight, self.error)
        self.kernels.append(kernel)
        return kernel

    @property
    def runs(self) -> int:
        """Calls of all kernels so far."""
        return sum(kernel.runs for kernel in self.kernels)


class Block(nn.Module):
    def __init__(self, width: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.down(nn.functional.gelu(self.up(x)))


def pruned(model: nn.Module, pattern: str = "unstructured@0.9") -> nn.Module:
    sparsecomp.sparsify_(model, pattern)
    return model.eval()


def compile_model(model: Any, target: FakeTarget | None = None, **options: Any) -> Any:
    return torch.compile(model, backend="sparse", options={"target": target or FakeTarget(), **options})


def same(given: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    assert (given - expected).abs().max().item() <= 1e-5 * max(scale, 1e-6)
