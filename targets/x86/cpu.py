"""What CPU this is: the instruction set level that its flags allow, its caches, its name."""

from __future__ import annotations

import functools
import json
import platform
from importlib import resources
from pathlib import Path
from typing import Any

from sparsecomp.targets.cpu.level import Caches, Level

LEVELS = ("avx512", "avx2", "generic")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@functools.cache
def facts() -> dict[str, Any]:
    """The data file."""
    content: dict[str, Any] = json.loads(resources.files(__package__).joinpath("facts.json").read_text())
    return content


def level(name: str) -> Level:
    """The level of a name."""
    entry = facts()["levels"][name]
    return Level(
        name=name,
        mcpu=entry["tuned"].get(_cpuinfo().get("vendor_id", ""), entry["mcpu"]),
        mattr=tuple(entry["mattr"]),
        lanes=entry["lanes"],
        vectors=entry["vectors"],
        chunk=entry["chunk"],
        l1_share=entry["l1_share"],
        panel_tokens=entry["panel_tokens"],
        spread=entry["spread"],
    )


@functools.cache
def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def flags() -> frozenset[str]:
    """The CPU's flags as Linux names them; empty where they cannot be read, which leaves the generic level."""
    return frozenset(_cpuinfo().get("flags", "").split())


def supported(name: str) -> bool:
    """Whether this CPU runs code of a level."""
    return set(facts()["levels"][name]["needs"]) <= flags()


def best_level() -> str:
    """The highest level that this CPU runs."""
    return next(name for name in LEVELS if supported(name))


def cpu_name() -> str:
    """The CPU's name, family and model included: virtual machines tend to hide the former."""
    info = _cpuinfo()
    name = info.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {info.get('cpu family', '?')}, model {info.get('model', '?')})"


def cpu_family() -> str:
    """Vendor and family, such as "AuthenticAMD 25": cores of one family do about the same in a cycle."""
    info = _cpuinfo()
    return f"{info.get('vendor_id', '?')} {info.get('cpu family', '?')}"


@functools.cache
def caches() -> Caches:
    """Data cache sizes, from the system where it tells."""
    sizes = dict(facts()["caches"])
    for index in sorted(_CACHES.glob("index*")) if _CACHES.is_dir() else []:
        try:
            kind, depth, size = (index.joinpath(name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction" and f"l{depth}" in sizes and size.endswith("K"):
            sizes[f"l{depth}"] = int(size[:-1]) * 1024
    return Caches(**sizes)
