"""What boards measured: a factor for each kernel family, kept in the cache folder for each CPU."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsecomp.planner.reader import parse_json, read_text
from sparsecomp.targets.arm.cpu import cpu
from sparsecomp.targets.scales import load as load_scales
from sparsecomp.targets.scales import save as save_scales

RESULTS = "sparsecomp-arm-results"
_PACKAGE = ("dense", "rows", "rows_half", "rows_sve", "panel", "int8", "dense_conv", "conv", "conv_half", "depthwise")
_FAMILIES = {"": _PACKAGE, "torch": (*_PACKAGE, "dense_depthwise")}
_MOST_STEPS = 100_000


def _name(cpu_name: str, kind: str) -> str:
    return f"arm-{'-'.join(filter(None, (cpu_name, kind)))}"


def load(cpu_name: str, kind: str = "") -> tuple[dict[str, float], str]:
    """Factors by kernel family, and where they come from in words; none where no board was measured.

    Args:
        cpu_name: of the CPU.
        kind: empty for what a package measured, `torch` for what was measured in PyTorch, whose dense kernels differ.
    """
    scales, reason = load_scales(_name(cpu_name, kind))
    if reason:
        return {}, "not measured on a board" + ("" if reason == "not measured" else f" ({reason})")
    return {name: scales[name] for name in _FAMILIES[kind] if name in scales}, "scaled by what a board measured"


def save(cpu_name: str, kind: str, ratios: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, int]]:
    """Keep the median of measured over counted for each kernel family; those without measurements stay as they were.

    Returns:
        By family the factor, and from how many calls it is the median.
    """
    found = {family: (statistics.median(values), len(values)) for family, values in ratios.items()}
    scales = load(cpu_name, kind)[0] | {family: factor for family, (factor, _) in found.items()}
    save_scales(_name(cpu_name, kind), scales)
    return found


def calibrate_from(results: str | Path) -> dict[str, tuple[float, int]]:
    """Read what `main.c` of a package wrote on a board, and keep a factor for each kernel family.

    Args:
        results: path of the file that `--results` wrote.

    Returns:
        By family the factor, and from how many calls it is the median.

    Raises:
        ValueError: there is no such file, it holds something else, or it has no calls of our kernels.
    """
    path = Path(results)
    document = parse_json(read_text(path, "results"), str(path))
    if not isinstance(document, dict) or document.get("format") != RESULTS or document.get("version") != 1:
        raise ValueError(f"{path} is no file of results: expected the format {RESULTS!r}, version 1")
    name = cpu(str(document.get("cpu"))).name
    ratios: dict[str, list[float]] = {}
    for place, step in enumerate(_steps(document, path)):
        family = step.get("kernel")
        if family not in _PACKAGE:
            continue
        measured, predicted = (_number(step.get(key), path, place, key) for key in ("us", "predicted_us"))
        if measured > 0 and predicted > 0:
            ratios.setdefault(family, []).append(measured / predicted)
    if not ratios:
        raise ValueError(f"{path} has no measured calls of the kernels {', '.join(_PACKAGE)}")
    return save(name, "", ratios)


def _steps(document: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    steps = document.get("steps")
    if not isinstance(steps, list) or len(steps) > _MOST_STEPS or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"{path}: steps must be a list of at most {_MOST_STEPS} objects")
    return steps


def _number(value: object, path: Path, place: int, key: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{path}: {key} of step {place} must be a number, given {value!r}")
    return float(value)
