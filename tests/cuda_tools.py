"""For tests of cards where there is none: a target that runs on the CPU, with cuSPARSELt's calls by their meaning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import distributions
from unittest import mock

import pytest
import torch
from cuda_emulation import Emulated, emulate, emulated
from torch import Tensor

from sparsecomp.cuda import nvrtc
from sparsecomp.cuda.library import CudaFfn, CudaKernel, Launch
from sparsecomp.targets.cuda import ffn, kernels
from sparsecomp.targets.cuda.cards import card
from sparsecomp.targets.cuda.target import CudaTarget

MULTIPLES = {torch.float16: (16, 8), torch.bfloat16: (16, 8), torch.int8: (32, 16)}
"""Of rows and columns of the 2:4 weight, and of tokens, as `SparseSemiStructuredTensorCUSPARSELT` has them."""


def need_nvrtc() -> str:
    """Skip the calling test where NVRTC is not installed; the version of its package, empty if that is unknown."""
    names = "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"
    versions = [found.version for name in names for found in distributions(name=name)]
    try:
        nvrtc._library()
    except ModuleNotFoundError as error:
        if versions:  # it is there, and has to be found
            raise
        pytest.skip(f"nvidia-cuda-nvrtc is missing: {error}")
    return versions[0] if versions else ""


class CardOnCpu(CudaTarget):
    """A card whose tensors lie on the CPU."""

    device = "cpu"

    def __init__(self, name: str = "h100") -> None:
        super().__init__(card(name))

    def why_not_here(self) -> str | None:
        return None


def compress(weight: Tensor) -> Tensor:
    """Values of each four inputs, then their places."""
    rows, columns = weight.shape
    multiple = MULTIPLES[weight.dtype][0]
    assert weight.is_contiguous()
    assert rows % multiple == columns % multiple == 0
    fours = weight.reshape(rows, columns // 4, 4)
    assert int((fours != 0).sum(dim=2).max()) <= 2
    places = (fours == 0).to(torch.int8).argsort(dim=2, stable=True)[..., :2].sort(dim=2).values
    return torch.cat([fours.gather(2, places).flatten(1), places.flatten(1).to(weight.dtype)], dim=1)


def multiply(
    packed: Tensor,
    dense: Tensor,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    transpose_result: bool = False,
    alg_id: int = 0,
    split_k: int = 1,
    split_k_mode: int = -1,
) -> Tensor:
    """`W dense + bias` for a weight of `compress`, transposed if asked for."""
    multiple = MULTIPLES[packed.dtype][1]
    assert dense.shape[1] % multiple == 0, "cuSPARSELt takes no such number of tokens"
    assert packed.dtype == dense.dtype
    assert bias is None or bias.dtype == packed.dtype
    rows, kept = packed.shape[0], packed.shape[1] // 2
    values, places = packed[:, :kept].reshape(rows, -1, 2), packed[:, kept:].reshape(rows, -1, 2).long()
    weight = torch.zeros(rows, kept // 2, 4, dtype=packed.dtype).scatter_(2, places, values).flatten(1)
    assert weight.shape[1] == dense.shape[0]
    wide = torch.float32 if packed.is_floating_point() else torch.int32
    result = weight.to(wide) @ dense.to(wide)
    if bias is not None:
        result = result + bias.to(wide)[:, None]
    result = result.to(out_dtype or packed.dtype)
    return result.t().contiguous() if transpose_result else result


@contextmanager
def cusparselt_on_cpu() -> Iterator[None]:
    """Let PyTorch's calls of cuSPARSELt work on CPU tensors."""
    there = mock.patch.object(torch.backends.cusparselt, "is_available", return_value=True)
    with there, torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_cslt_compress", compress, "CPU")
        library.impl("_cslt_sparse_mm", multiply, "CPU")
        yield


class EmulatedFunction:
    """A kernel under the emulator, called as `sparsecomp.cuda.driver.Function` is."""

    def __init__(self, kernel: Emulated) -> None:
        self._kernel = kernel

    def __call__(self, launch: Launch, arguments: Sequence[Tensor | int | None], device: torch.device) -> None:
        assert device.type == "cpu"
        assert self._kernel.run(launch, arguments) == ""


def _function(kernel: CudaKernel, arch: str) -> EmulatedFunction:
    assert arch == "sm_90"
    return EmulatedFunction(emulate(kernel))


def _functions(kernel: CudaFfn, arch: str) -> tuple[EmulatedFunction, ...]:
    assert arch == "sm_90"
    entries = (kernel.hidden_entry, kernel.down_entry)
    return tuple(EmulatedFunction(emulated(kernel.source, entry, kernel.defines)) for entry in entries)


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """Let our kernels run on CPU tensors, under the emulator."""
    with mock.patch.object(kernels, "function_of", _function), mock.patch.object(ffn, "functions_of", _functions):
        yield
