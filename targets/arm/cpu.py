"""Which ARM CPUs are known, and their schedules: 128-bit vectors in 32 registers, whatever the CPU."""

from __future__ import annotations

import difflib
import functools
import json
import platform
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sparsecomp.targets.cpu.level import Caches, Level

MACHINES = ("aarch64", "arm64")
"""What Python calls machines with such a CPU."""
LANES = 4
ROW_VECTORS = 4
"""Vectors of tokens, or positions, for each of the four rows of a quad: 16 sums, and registers for loads ahead."""
_EXTENSIONS = {"asimdhp": "fp16", "asimddp": "dotprod", "sve": "sve"}
_CHUNK = 192
_L1_SHARE = 0.75


@dataclass(frozen=True)
class ArmLevel(Level):
    """The schedules' numbers for AArch64, or for the same kernels built for another machine.

    Attributes:
        triple: of LLVM.
        options: of LLVM's code generator.
    """

    triple: str = "aarch64-linux-gnu"
    options: tuple[str, ...] = ()

    @property
    def tvm_target(self) -> dict[str, Any]:
        """The target as TVM takes it."""
        options = {"cl-opt": list(self.options)} if self.options else {}
        return super().tvm_target | options


@dataclass(frozen=True)
class ArmCpu:
    """A CPU of `facts.json`.

    Attributes:
        name: as LLVM calls it.
        mca: name of its scheduling model in llvm-mca.
        fmla: 128-bit float32 multiply-adds that a cycle starts.
        caches: bytes.
        ghz: clock of the board that the facts are about.
        bandwidth: GB/s from memory.
        board: that the clock and the caches are of.
        needs: instruction set extensions, as Linux names them, that code for it may use.
    """

    name: str
    mca: str
    fmla: int
    caches: Caches
    ghz: float
    bandwidth: float
    board: str
    needs: frozenset[str]

    @property
    def level(self) -> ArmLevel:
        """The schedules for it."""
        return _level(self.name, "aarch64-linux-gnu")

    @property
    def half(self) -> bool:
        """Whether it multiplies vectors of float16."""
        return "asimdhp" in self.needs

    @property
    def dotprod(self) -> bool:
        """Whether it has `sdot`, four products of bytes for each lane of 32 bits."""
        return "asimddp" in self.needs

    @property
    def sve(self) -> bool:
        """Whether it has SVE, of 256 bits: what `facts.json` knows with SVE has that length."""
        return "sve" in self.needs


FALLBACK = "cortex-a72"
"""What a CPU is taken for that is not known: plain ARMv8-A, with one multiplier as most cores of boards have."""


def this_cpu() -> ArmCpu:
    """The CPU of this machine, by its part numbers: of several the fastest, `FALLBACK` if none is known."""
    known = {part: name for name in cpu_names() for part in _facts()[name]["parts"]}
    found = [cpu(known[part]) for part in parts() if part in known]
    return max(found, key=lambda one: one.ghz * one.fmla, default=cpu(FALLBACK))


def parts() -> tuple[str, ...]:
    """Implementer and part number of the cores of this machine, each once; none where it has none."""
    return tuple(f"{implementer}/{part}" for implementer, part in dict.fromkeys(_cores()))


def features() -> frozenset[str]:
    """Instruction set extensions of this machine, as Linux names them."""
    found = re.search(r"^Features\s*: (.*)$", _cpuinfo(), re.MULTILINE)
    return frozenset(found[1].split() if found else ())


def unfit(cpu: ArmCpu) -> str | None:
    """Why this machine does not run code for a CPU, None if it does."""
    if platform.machine() not in MACHINES:
        return f"this machine is {platform.machine()}; models are exported for the CPU (sparsecomp export)"
    missing = sorted(cpu.needs - features())
    if missing:
        return f"this CPU has no {', '.join(missing)}"
    if cpu.sve and not set(parts()) & set(_facts()[cpu.name]["parts"]):
        return f"code for {cpu.name} takes SVE vectors of 256 bits, which those of this CPU need not have"
    return None


def _cores() -> list[tuple[str, str]]:
    pattern = r"^CPU implementer\s*: (\S+)$.*?^CPU part\s*: (\S+)$"
    return re.findall(pattern, _cpuinfo(), re.MULTILINE | re.DOTALL)


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # not Linux


def host_level() -> ArmLevel:
    """The same schedules, four lanes, for x86-64: to run a package under the sanitizers of the machine at hand."""
    return _level("x86-64", "x86_64-linux-gnu")


def _level(mcpu: str, triple: str) -> ArmLevel:
    return ArmLevel(
        name=mcpu,
        mcpu=mcpu,
        mattr=(),
        lanes=LANES,
        vectors=ROW_VECTORS,
        chunk=_CHUNK,
        l1_share=_L1_SHARE,
        panel_tokens=4,
        spread="",
        triple=triple,
    )


@functools.cache
def _facts() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(resources.files(__package__).joinpath("facts.json").read_text())["cpus"]
    return content


def cpu_names() -> tuple[str, ...]:
    """The CPUs that are known."""
    return tuple(_facts())


def cpu(name: str) -> ArmCpu:
    """The CPU of a name.

    Raises:
        ValueError: it is not known; the message lists those that are.
    """
    if name not in _facts():
        near = difflib.get_close_matches(name, cpu_names(), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown ARM CPU {name!r}: {hint}The CPUs are {', '.join(cpu_names())}")
    entry = _facts()[name]
    return ArmCpu(
        name=entry["mcpu"],
        mca=entry["mca"],
        fmla=entry["fmla"],
        caches=Caches(entry["l1"], entry["l2"], entry["l3"] or entry["l2"]),
        ghz=entry["ghz"],
        bandwidth=entry["bandwidth"],
        board=entry["board"],
        needs=frozenset(flag for flag, name in _EXTENSIONS.items() if entry[name]),
    )
