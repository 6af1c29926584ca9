"""Compilation of the kernels by NVRTC, from PyPI's nvidia-cuda-nvrtc (extra ``cuda``): no card or toolkit is needed."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).parent / "kernels"
HEADERS = ("device.cuh", "intrinsics.cuh")
"""Files beside the kernels that they include."""
ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100")


@dataclass(frozen=True)
class Resources:
    """What the assembler says that an entry point takes.

    Attributes:
        registers: of a thread.
        shared: bytes of shared memory of a block, without what is asked for at launch.
        spilled: bytes that are stored or loaded because registers ran out.
    """

    registers: int
    shared: int
    spilled: int


def compile_kernel(name: str, arch: str, defines: tuple[str, ...] = ()) -> tuple[bytes, str, str]:
    """Compile ``kernels/<name>.cu``; returns the cubin, the PTX and the assembler's log (`resources` reads it).

    Raises:
        ValueError: The architecture is none of ``ARCHITECTURES``, or NVRTC refuses the source (its log is in the
            message).
        ModuleNotFoundError: NVRTC is not installed.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"got architecture {arch!r}; choose one of {', '.join(ARCHITECTURES)}")
    lib = ctypes.CDLL(str(_library()))
    program = ctypes.c_void_p()
    headers = [(KERNELS / header).read_bytes() for header in HEADERS]
    some = ctypes.c_char_p * len(headers)
    made = lib.nvrtcCreateProgram(
        ctypes.byref(program),
        (KERNELS / f"{name}.cu").read_bytes(),
        f"{name}.cu".encode(),
        len(headers),
        some(*headers),
        some(*(header.encode() for header in HEADERS)),
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


def resources(log: str, entry: str) -> Resources:
    """What an entry point of a compiled kernel takes, from the assembler's log.

    Raises:
        ValueError: The log does not tell of that entry point.
    """
    _, found, rest = log.partition(f"Compiling entry function '{entry}'")
    part = rest.partition("Compiling entry function")[0]
    registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
    if not found or registers is None or spills is None:
        raise ValueError(f"the assembler's log does not tell what {entry!r} takes:\n{log}")
    return Resources(int(registers[1]), int(shared[1]) if shared else 0, int(spills[1]) + int(spills[2]))


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
