"""Devices by name."""

from __future__ import annotations

import difflib
import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from sparsecomp.targets.hls.cells import Cells


@dataclass(frozen=True)
class Part:
    """A device of `parts.json`.

    Attributes:
        key: as it is given.
        name: for people.
        vendor_part: as the vendor's tool calls it, with a package and a speed grade.
        cells: that it has.
    """

    key: str
    name: str
    vendor_part: str
    cells: Cells


def part(key: str) -> Part:
    """The device of a name.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    facts = _parts()
    if key not in facts:
        near = difflib.get_close_matches(str(key), facts, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown part {key!r}: {hint}The parts are {', '.join(facts)}")
    found = facts[key]
    cells = Cells(found["dsp"], found["lut"], found["ff"], 2 * found["bram"])
    return Part(key, found["name"], found["vendor_part"], cells)


def part_names() -> list[str]:
    """The devices that there are."""
    return list(_parts())


@functools.cache
def _parts() -> dict[str, Any]:
    text = (resources.files("sparsecomp.targets.hls") / "parts.json").read_text(encoding="utf-8")
    parts: dict[str, Any] = json.loads(text)["parts"]
    return parts
