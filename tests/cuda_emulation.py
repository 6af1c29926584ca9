"""Kernels compiled for the CPU with the emulator, and launched on tensors."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from sparsecomp.cuda.nvrtc import KERNELS

EMULATOR = Path(__file__).parent / "cuda" / "emulator"


class Emulated:
    """A kernel on the CPU."""

    def __init__(self, library):
        self._library = ctypes.CDLL(str(library))
        self._library.emu_message.restype = self._library.emu_sites.restype = ctypes.c_char_p

    def sites(self):
        """Barriers and waits that launches have reached."""
        return self._library.emu_sites().decode().split()

    def run(self, launch, arguments, seed=0, left_out=""):
        """Launch on tensors (or None) and ints; returns what failed, or an empty string."""
        values = []
        for argument in arguments:
            if isinstance(argument, int):
                values.append(ctypes.c_int(argument))
            else:
                values.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
            if isinstance(argument, torch.Tensor):
                assert argument.is_contiguous()
                self._library.emu_memory(
                    ctypes.c_void_p(argument.data_ptr()), ctypes.c_size_t(argument.numel() * argument.itemsize)
                )
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        failed = self._library.emu_launch(
            *launch.grid, *launch.block, ctypes.c_size_t(launch.shared), pointers, seed, left_out.encode()
        )
        self._library.emu_clear()
        return self._library.emu_message().decode() if failed else ""


def _gcc(*arguments):
    flags = ["-O1", "-w", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"]
    subprocess.run(["g++", *flags, *map(str, arguments)], check=True)


@functools.cache
def _machine():
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing")
    folder = tempfile.TemporaryDirectory()
    _gcc("-c", EMULATOR / "machine.cpp", "-o", Path(folder.name) / "machine.o")
    return folder


def compile_file(kernel, headers, entry, defines, library):
    """Compile the file of a kernel with the emulator to a library."""
    machine = Path(_machine().name) / "machine.o"
    # The emulator's intrinsics.cuh comes before the card's.
    given = [f"-I{EMULATOR}", f"-I{headers}", f'-DKERNEL="{kernel}"', f"-DENTRY={entry}", *(f"-D{d}" for d in defines)]
    _gcc("-shared", *given, EMULATOR / "launch.cpp", machine, "-o", library)


def compile_source(source, entry, defines):
    """Compile the text of a kernel with the emulator."""
    with tempfile.TemporaryDirectory() as folder:
        kernel, library = Path(folder) / "kernel.cu", Path(folder) / "kernel.so"
        kernel.write_text(source)
        compile_file(kernel, KERNELS, entry, defines, library)
        return Emulated(library)


@functools.cache
def emulated(name, entry, defines):
    """A kernel of the package on the CPU."""
    return compile_source((KERNELS / f"{name}.cu").read_text(), entry, defines)


def emulate(kernel):
    """A `CudaKernel` on the CPU."""
    return emulated(kernel.source, kernel.entry, kernel.defines)


def linear(kernel, weight, x, bias=None, activation=0, seed=0, left_out=""):
    """`act(x W^T + bias)` by a kernel, and what failed."""
    (outputs, inputs), tokens = weight.shape, len(x)
    stride = kernel.stride(tokens)
    many, exact = kernel.tokens == 0, kernel.dtype == torch.int8
    given = dict(kernel.pack(weight))
    if many:  # what lies in the padding of x must not matter
        padding = 99 if exact else torch.nan
        given["x"] = torch.nn.functional.pad(x.t(), (0, stride - tokens), value=padding).contiguous()
    else:
        given["x"] = x.contiguous()
    unwritten = (-(2**31), torch.int32) if exact else (torch.nan, x.dtype)
    y = torch.full((outputs, stride) if many else (tokens, outputs), unwritten[0], dtype=unwritten[1])
    given.update(bias=bias, y=y, outputs=outputs, inputs=inputs, tokens=tokens, stride=stride, activation=activation)
    arguments = [
        given[name].contiguous() if isinstance(given[name], torch.Tensor) else given[name] for name in kernel.arguments
    ]
    failure = emulate(kernel).run(kernel.launch(outputs, inputs, tokens), arguments, seed, left_out)
    return y[:, :tokens].t() if many else y, failure
