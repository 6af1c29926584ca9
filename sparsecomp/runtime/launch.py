"""From a kernel in TIR to something that runs on torch tensors: build through the cache, call on PyTorch's threads."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

import sparsecomp
from sparsecomp.runtime.cache import key_of, load_or_build

_NATIVE = Path(__file__).with_name("native.c")
_KERNELS = Path(sparsecomp.__file__).parent / "kernels"
_PATTERNS = Path(sparsecomp.__file__).parent / "patterns"
_WEIGHT_SLOTS = 4


@dataclass(frozen=True)
class KernelSource:
    """A kernel to build.

    Attributes:
        name: of the C function.
        identity: everything beside the source text that decides what `build` gives, printed.
        build: gives the PrimFunc; only called when the kernel is not cached.
        target: of TVM.
    """

    name: str
    identity: str
    build: Callable[[], Any]
    target: Mapping[str, Any]


@functools.cache
def _versions() -> str:
    """What, beside its own parameters, shapes a kernel: the sources of the kernels, and the code generator."""
    digest = hashlib.sha256()
    for folder in (_KERNELS, _PATTERNS):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return f"{digest.hexdigest()} tvm {metadata.version('apache-tvm')} ffi {metadata.version('apache-tvm-ffi')}"


@functools.cache
def native_library() -> ctypes.CDLL:
    """The compiled `native.c`.

    Raises:
        BuildError: it could not be built here.
    """
    source = _NATIVE.read_text()

    def write(folder: Path) -> Path:
        path = folder / "native.c"
        path.write_text(source)
        return path

    flags = ("-fopenmp",)
    return load_or_build(key_of("native", source, *flags), write, flags)


@functools.cache
def _launcher() -> Any:
    function = native_library().sparsecomp_call
    function.argtypes = [ctypes.c_void_p] * 5
    function.restype = ctypes.c_int32
    return function


class _Prepared(ctypes.Structure):
    """`sparsecomp_prepared` of native.c."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("dims", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("items", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def function_of(source: KernelSource) -> ctypes.c_void_p:
    """Address of the compiled function.

    Raises:
        BuildError: it could not be built here.
    """
    library = load_or_build(key_of_kernel(source), lambda folder: write_kernel(source, folder))
    return ctypes.cast(getattr(library, source.name), ctypes.c_void_p)


def key_of_kernel(source: KernelSource) -> str:
    """The key of a kernel in the cache: everything that shapes it."""
    return key_of(source.name, source.identity, repr(sorted(source.target.items())), _versions())


def write_kernel(source: KernelSource, folder: Path) -> Path:
    """Compile a kernel to an object file in a folder; returns its path."""
    from sparsecomp.kernels import tir  # brings TVM: only when there is something to build

    code, assembly = tir.compile_object(source.build(), source.name, dict(source.target))
    path = folder / "kernel.o"
    path.write_bytes(code)
    (folder / "kernel.s").write_text(assembly)
    return path


def assembly_of(source: KernelSource) -> str:
    """The generated code, for people; builds the kernel once more."""
    from sparsecomp.kernels import tir

    return tir.compile_object(source.build(), source.name, dict(source.target))[1]


class Weights:
    """The arrays of a packed weight, as the pointers that a kernel takes; keeps them alive."""

    def __init__(self, arrays: Sequence[npt.NDArray[np.generic]]) -> None:
        self._arrays = [_aligned(array) for array in arrays]
        addresses = [array.ctypes.data for array in self._arrays]
        self.pointers = (ctypes.c_void_p * _WEIGHT_SLOTS)(*addresses)
        self.nbytes = sum(array.nbytes for array in self._arrays)


def _aligned(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """A copy that starts on a cache line, as vector loads like it."""
    line = 64
    raw = np.empty(array.nbytes + line, np.uint8)
    start = -raw.ctypes.data % line
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Launch:
    """One way to call a kernel, with everything made ready that does not change from call to call."""

    def __init__(
        self,
        function: ctypes.c_void_p,
        weights: Weights,
        dims: Sequence[int],
        items: int,
        threads: int,
        scratch_floats: int,
    ) -> None:
        """Make it.

        Args:
            function: from `function_of`.
            weights: packed.
            dims: the sizes that the kernel reads.
            items: work items, split evenly over the threads.
            threads: at most this many.
            scratch_floats: scratch of one thread.
        """
        self._entry = _launcher()
        self._weights, self._dims = weights, (ctypes.c_int32 * len(dims))(*dims)
        addresses = (function, ctypes.addressof(weights.pointers), ctypes.addressof(self._dims))
        self._prepared = _Prepared(*addresses, 4 * scratch_floats, items, threads)
        self._address = ctypes.addressof(self._prepared)

    def run(self, x: Tensor, bias: Tensor, residual: Tensor | None, out: Tensor) -> None:
        """Run the kernel; all tensors are contiguous, float32 and on the CPU.

        Raises:
            MemoryError: scratch could not be allocated.
        """
        failed = self._entry(
            self._address,
            x.data_ptr(),
            bias.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
        )
        if failed:
            raise MemoryError(f"no memory for {self._prepared.bytes} bytes of scratch per thread")
