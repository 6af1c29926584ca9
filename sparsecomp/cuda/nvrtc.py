"""Compilation of the kernels by NVRTC, from PyPI's nvidia-cuda-nvrtc (extra ``cuda``): no card or toolkit is needed."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

KERNELS = Path(__file__).parent / "kernels"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")


def compile_kernel(name: str, arch: str, defines: tuple[str, ...] = ()) -> tuple[bytes, str, str]:
    """Compile ``kernels/<name>.cu``; returns the cubin, the PTX and the assembler's log (registers, spills).

    Raises:
        ValueError: The architecture is none of ``ARCHITECTURES``, or NVRTC refuses the source (its log is in the
            message).
        ModuleNotFoundError: NVRTC is not installed.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"got architecture {arch!r}; choose one of {', '.join(ARCHITECTURES)}")
    lib = ctypes.CDLL(str(_library()))
    program = ctypes.c_void_p()
    source, header = (KERNELS / f"{name}.cu").read_bytes(), (KERNELS / "device.cuh").read_bytes()
    one = ctypes.c_char_p * 1
    made = lib.nvrtcCreateProgram(
        ctypes.byref(program), source, f"{name}.cu".encode(), 1, one(header), one(b"device.cuh")
    )
    if made:
        raise ValueError(f"NVRTC could not take kernel {name!r} (error {made})")
    try:
        options = [f"--gpu-architecture={arch}", "--ptxas-options=-v", *(f"-D{define}" for define in defines)]
        failed = lib.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        )
        log = _read(lib, program, "ProgramLog").decode()
        if failed:
            raise ValueError(f"NVRTC refuses kernel {name!r} for {arch}:\n{log}")
        return _read(lib, program, "CUBIN"), _read(lib, program, "PTX").decode(), log
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _read(lib: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(lib, f"nvrtcGet{what}")(program, text)
    return text.raw.rstrip(b"\0") if what != "CUBIN" else text.raw


def _library() -> Path:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for found in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            return found
    raise ModuleNotFoundError("NVRTC is not installed: pip install 'sparsecomp[cuda]'")
