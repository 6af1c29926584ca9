"""Targets: hardware facts, schedules and cost models; installed as `sparsecomp.targets`."""

from __future__ import annotations

import difflib
import functools
import platform
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsecomp.targets.base import Target

_FAMILIES = {
    "x86": "sparsecomp.targets.x86.target",
    "arm": "sparsecomp.targets.arm.machine",
    "cuda": "sparsecomp.targets.cuda.target",
}
"""Where the targets of a family are: a module with `names()`, all of them in full, and `create(name)`.

Imported on demand: a family brings its facts, kernels and code generator with it.
"""


@functools.cache
def target_names() -> tuple[str, ...]:
    """The names that `get_target` takes."""
    return tuple(name for family in _FAMILIES for name in _module(family).names())


def get_target(name: str | None = None) -> Target:
    """The target of a name, such as `x86:avx2` or `arm:cortex-a76`; this machine's CPU if None.

    A target of other hardware prices and plans; `Target.why_not_here` tells whether it runs here.

    Raises:
        ValueError: there is no target of that name (the message names the nearest one), or it cannot be made here.
    """
    if name is None:
        name = "arm" if platform.machine() in ("aarch64", "arm64") else "x86"
    if name not in target_names():
        near = difflib.get_close_matches(str(name), target_names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown target {name!r}: {hint}The targets are {', '.join(target_names())}")
    target: Target = _module(name.partition(":")[0]).create(name)
    return target


def _module(family: str) -> Any:
    return import_module(_FAMILIES[family])
