"""Building and running exported packages, here and on ARM under QEMU; a test skips where a tool is missing."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

_SECONDS = 300
_STRICT = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror")
_PLUGIN_VERSIONS = (1, 2, 3, 4)


def _missing(tool: str, remedy: str) -> NoReturn:
    reason = f"{tool} was not found: {remedy}"
    if "PYTEST_CURRENT_TEST" in os.environ:
        import pytest

        pytest.skip(reason)
    raise FileNotFoundError(reason)


def cross_compiler() -> list[str]:
    """The command of a C compiler for AArch64 Linux that links statically."""
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl"]
    found = shutil.which("aarch64-linux-gnu-gcc")
    return [found, "-static"] if found else _missing("a cross compiler for AArch64", "pip install 'sparsecomp[arm]'")


def threaded_compiler() -> list[str]:
    """The command of GCC for AArch64 Linux, which has OpenMP: `cross_compiler` may be one that has none."""
    found = shutil.which("aarch64-linux-gnu-gcc")
    remedy = "apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
    return [found, "-static", "-fopenmp"] if found else _missing("aarch64-linux-gnu-gcc", remedy)


def emulator() -> str:
    """The path of QEMU's user-mode emulator."""
    found = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    return found or _missing("qemu-aarch64", "apt-get install qemu-user")


def host_compiler(name: str = "gcc") -> str:
    """The path of a C compiler for this machine."""
    return shutil.which(name) or _missing(name, f"apt-get install {name}")


def build(folder: Path, compiler: Sequence[str], *flags: str) -> Path:
    """Build `main.c` and `model.c` of a package, with all warnings as errors; returns the program."""
    program = folder / "model_main"
    kernels = sorted(map(str, (folder / "kernels").glob("*.o")))
    sources = [str(folder / "main.c"), str(folder / "model.c"), *kernels]
    command = [*compiler, *_STRICT, *flags, "-o", str(program), *sources, "-lm"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    return program


def write_inputs(folder: Path, arrays: Sequence[np.ndarray[Any, Any]]) -> Path:
    """The inputs as `main.c` reads them."""
    path = folder / "input.bin"
    path.write_bytes(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))
    return path


def run(
    program: Path,
    inputs: Sequence[np.ndarray[Any, Any]],
    likes: Sequence[np.ndarray[Any, Any]],
    *before: str,
    sizes: Sequence[int] = (),
) -> list[np.ndarray[Any, Any]]:
    """Run a package once; returns its outputs, in the forms of other arrays.

    Args:
        program: from `build`.
        inputs: of the model.
        likes: arrays of the outputs' shapes and types.
        before: words before the program, such as an emulator.
        sizes: those that each run gives.
    """
    folder = program.parent
    path, output = write_inputs(folder, inputs), folder / "output.bin"
    command = [*before, str(program), str(folder / "weights.bin"), str(path), "--output", str(output), "--rounds", "1"]
    command += ["--sizes", ",".join(map(str, sizes))] if sizes else []
    result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    content, at, found = output.read_bytes(), 0, []
    for like in likes:
        found.append(np.frombuffer(content[at : at + like.nbytes], like.dtype).reshape(like.shape))
        at += like.nbytes
    assert at == len(content)
    return found


@functools.cache
def _plugin() -> Path:
    """The plugin that counts instructions, for the version of QEMU that is here."""
    source = Path(__file__).parent / "exporting" / "instructions.c"
    folder = Path(tempfile.mkdtemp(prefix="sparsecomp-plugin."))
    for version in _PLUGIN_VERSIONS:
        path = folder / f"instructions_{version}.so"
        subprocess.run(
            [host_compiler(), "-shared", "-fPIC", "-O2", f"-DPLUGIN_VERSION={version}", "-o", str(path), str(source)],
            check=True,
            timeout=_SECONDS,
        )
        tried = subprocess.run(
            [emulator(), "-plugin", str(path), "/nonexistent"], capture_output=True, text=True, check=False, timeout=60
        )
        if "plugin" not in (tried.stdout + tried.stderr).lower():
            return path
    return _missing("a version of QEMU with plugins", "its -plugin option refused the plugin that counts instructions")


def instructions(program: Path, inputs: Sequence[np.ndarray[Any, Any]]) -> int:
    """Instructions that one run of the model executes on ARM: what a program with two runs has more than with one."""
    path = write_inputs(program.parent, inputs)
    counts = []
    for rounds in ("1", "2"):
        command = [emulator(), "-plugin", str(_plugin()), str(program), str(program.parent / "weights.bin"), str(path)]
        result = subprocess.run(
            [*command, "--rounds", rounds], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        assert result.returncode == 0, result.stderr
        found = re.search(r"instructions: (\d+)", result.stderr)
        assert found, result.stderr
        counts.append(int(found[1]))
    return counts[1] - counts[0]
