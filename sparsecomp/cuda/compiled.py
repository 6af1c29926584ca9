"""The kernels compiled, once for each architecture: cubins in the cache, and the texts that they come from."""

from __future__ import annotations

from pathlib import Path

from sparsecomp.cuda.driver import Function
from sparsecomp.cuda.library import CudaFfn, CudaKernel
from sparsecomp.cuda.nvrtc import HEADERS, KERNELS, compile_kernel
from sparsecomp.runtime.cache import built_file, key_of


def sources_of(kernel: CudaKernel | CudaFfn) -> dict[str, str]:
    """The texts that a kernel is compiled from, by their file names; its own is the first."""
    return {name: (KERNELS / name).read_text(encoding="utf-8") for name in (f"{kernel.source}.cu", *HEADERS)}


def cubin_of(kernel: CudaKernel | CudaFfn, arch: str) -> bytes:
    """A kernel compiled for an architecture, such as `sm_90`, from the cache where that has it.

    Raises:
        ValueError: the architecture is none that kernels are compiled for, or NVRTC refuses the source.
        ModuleNotFoundError: NVRTC is not installed.
        BuildError: the cache cannot be written.
    """

    def write(folder: Path) -> Path:
        path = folder / "kernel.cubin"
        path.write_bytes(compile_kernel(kernel.source, arch, kernel.defines)[0])
        return path

    return built_file(
        key_of("cubin", arch, *kernel.defines, *sources_of(kernel).values()), ".cubin", write
    ).read_bytes()


def function_of(kernel: CudaKernel, arch: str) -> Function:
    """A kernel, compiled for an architecture, that can be launched on cards of it; raises as `cubin_of`."""
    return Function(cubin_of(kernel, arch), kernel.entry)


def functions_of(ffn: CudaFfn, arch: str) -> tuple[Function, Function]:
    """The two kernels of an FFN, in the order in which they are launched; raises as `cubin_of`."""
    cubin = cubin_of(ffn, arch)
    return Function(cubin, ffn.hidden_entry), Function(cubin, ffn.down_entry)
