"""Targets: hardware facts, schedules and cost models; installed as `sparsecomp.targets`."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsecomp.targets.base import Target

TARGET_NAMES = ("x86", "x86:avx512", "x86:avx2", "x86:generic")


def get_target(name: str | None = None) -> Target:
    """The target of a name; this machine's CPU if None.

    Raises:
        ValueError: there is no target of that name; the message names the nearest one.
    """
    if name is None:
        name = "x86"
    if name not in TARGET_NAMES:
        near = difflib.get_close_matches(str(name), TARGET_NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown target {name!r}: {hint}The targets are {', '.join(TARGET_NAMES)}")
    # Imported on demand: a target brings its kernels and the code generator with it.
    from sparsecomp.targets.x86.target import create

    return create(name)
