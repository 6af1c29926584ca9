"""What the kernel tests share: the code generation targets, small problems, and a call of a kernel on its reference.

Kernels with 16 lanes are compiled for AVX2 where the CPU has no AVX-512: LLVM splits the vectors, and the logic of the
AVX-512 schedule runs. Compiled kernels are kept by the cache of `sparsecomp.runtime`, so a case costs a build once.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.kernels.epilogue import ACTIVATIONS, Epilogue
from sparsecomp.runtime.launch import KernelSource, Launch, Weights, function_of
from sparsecomp.targets.x86.cpu import facts, supported

Array = npt.NDArray[Any]

needs_x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason=f"needs an x86-64 CPU; this is {platform.machine()}"
)
needs_avx2 = pytest.mark.skipif(not supported("avx2"), reason="needs a CPU with AVX2 and FMA")
needs_avx512 = pytest.mark.skipif(not supported("avx512"), reason="needs a CPU with AVX-512 (F, BW, DQ, VL, CD)")


def tvm_target(level: str) -> dict[str, Any]:
    """The plain LLVM target of a level: what is compiled must not depend on who made the CPU."""
    entry = facts()["levels"][level]
    target = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": entry["mcpu"]}
    return target | ({"mattr": entry["mattr"]} if entry["mattr"] else {})


HERE = tvm_target("avx2" if supported("avx2") else "generic")
EPILOGUES = [Epilogue(activation, residual) for activation in ACTIVATIONS for residual in (False, True)]
# For schedules: the least and the most that can follow the sums.
SOME_EPILOGUES = [Epilogue(), Epilogue("gelu", True)]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda value: value,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda value: functional.gelu(value, approximate="tanh"),
    "silu": functional.silu,
    "relu6": functional.relu6,
    "hardswish": functional.hardswish,
    "relu2": lambda value: functional.relu(value).square(),
}


def epilogue_name(epilogue: Epilogue) -> str:
    return epilogue.activation + ("+residual" if epilogue.residual else "")


def random_weight(outputs: int, inputs: int, density: float = 0.3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    return torch.where(torch.rand(outputs, inputs, generator=generator) < density, weight, torch.zeros(()))


def panel_weight(outputs: int, inputs: int, v: int, density: float = 0.4, seed: int = 0) -> Tensor:
    """Rows of a panel share their columns; one entry in eight of those is zero nevertheless."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-outputs // v), 1, inputs, generator=generator) < density
    kept = kept.expand(-1, v, -1).reshape(-1, inputs)[:outputs]
    return torch.where(kept, random_weight(outputs, inputs, 0.875, seed + 1), torch.zeros(()))


@dataclass(frozen=True)
class Inputs:
    """What a linear is called with."""

    x: Tensor
    bias: Tensor
    residual: Tensor

    @classmethod
    def random(cls, tokens: int, outputs: int, inputs: int, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        shapes = ((tokens, inputs), (outputs,), (tokens, outputs))
        return cls(*(torch.randn(shape, generator=generator) for shape in shapes))


def dense(weight: Tensor, inputs: Inputs, epilogue: Epilogue) -> Tensor:
    """The same linear in PyTorch."""
    value = _ACTIVATIONS[epilogue.activation](functional.linear(inputs.x, weight, inputs.bias))
    return value + inputs.residual if epilogue.residual else value


def close(given: Tensor | Array, expected: Tensor | Array, tolerance: float = 1e-5) -> None:
    """Equal within a share of the largest expected value; also refuses NaN."""
    given, expected = torch.as_tensor(given), torch.as_tensor(expected)
    assert given.shape == expected.shape
    scale = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
    assert torch.isfinite(given).all()
    assert (given - expected).abs().max().item() <= tolerance * scale if expected.numel() else True


class Guarded:
    """Floats with canaries before and behind: a kernel that writes past its output is caught."""

    _MARGIN = 64
    _CANARY = -12345.0

    def __init__(self, shape: tuple[int, ...]) -> None:
        count = int(np.prod(shape))
        self._raw = torch.full((count + 2 * self._MARGIN,), self._CANARY)
        self.tensor = self._raw[self._MARGIN : self._MARGIN + count].view(shape)

    def check(self) -> None:
        assert (self._raw[: self._MARGIN] == self._CANARY).all()
        assert (self._raw[self._raw.numel() - self._MARGIN :] == self._CANARY).all()


def run_kernel(
    source: KernelSource,
    arrays: Sequence[Array],
    dims: Sequence[int],
    items: int,
    scratch: int,
    inputs: Inputs,
    *,
    residual: bool,
    threads: int = 1,
) -> Tensor:
    """Build a kernel, or find it, and run it on all its items."""
    out = Guarded((inputs.x.shape[0], inputs.bias.shape[0]))
    call = Launch(function_of(source), Weights(arrays), dims, items, threads, scratch)
    call.run(inputs.x, inputs.bias, inputs.residual if residual else None, out.tensor)
    out.check()
    return out.tensor


def assembly(function: Any, level: str) -> str:
    """Compile only: the assembly of a kernel for a level that this CPU need not run."""
    from sparsecomp.kernels import tir

    return tir.compile_object(function, "kernel", tvm_target(level))[1]
