"""What boards measured: a factor for each kernel family, kept in the cache folder for each CPU."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from sparsecomp.planner.reader import parse_json, read_text
from sparsecomp.runtime.cache import cache_dir
from sparsecomp.targets.arm.cpu import cpu

RESULTS = "sparsecomp-arm-results"
_FAMILIES = ("dense", "rows", "panel", "conv", "depthwise")
_MOST_STEPS = 100_000


def _path(cpu_name: str) -> Path:
    return cache_dir() / f"arm-{cpu_name}.json"


def load(cpu_name: str) -> tuple[dict[str, float], str]:
    """Factors by kernel family, and where they come from in words; none where no board was measured.

    A file that cannot be read counts as none: it is only a refinement, and is written anew by the next calibration.
    """
    try:
        document = json.loads(_path(cpu_name).read_text(encoding="utf-8"))
        found = {name: float(document["scales"][name]) for name in _FAMILIES if name in document["scales"]}
    except FileNotFoundError:
        return {}, "not measured on a board"
    except (OSError, ValueError, KeyError, TypeError):
        return {}, "not measured on a board (its calibration cannot be read)"
    if not all(math.isfinite(factor) and factor > 0 for factor in found.values()):
        return {}, "not measured on a board (its calibration cannot be read)"
    return found, "scaled by what a board measured"


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
    document = parse_json(read_text(path, "results"), "results")
    if not isinstance(document, dict) or document.get("format") != RESULTS or document.get("version") != 1:
        raise ValueError(f"{path} is no file of results: expected the format {RESULTS!r}, version 1")
    name = cpu(str(document.get("cpu"))).name
    ratios: dict[str, list[float]] = {}
    for place, step in enumerate(_steps(document, path)):
        family = step.get("kernel")
        if family not in _FAMILIES:
            continue
        measured, predicted = (_number(step.get(key), path, place, key) for key in ("us", "predicted_us"))
        if measured > 0 and predicted > 0:
            ratios.setdefault(family, []).append(measured / predicted)
    if not ratios:
        raise ValueError(f"{path} has no measured calls of the kernels {', '.join(_FAMILIES)}")
    found = {family: (statistics.median(values), len(values)) for family, values in ratios.items()}
    scales = load(name)[0] | {family: factor for family, (factor, _) in found.items()}
    cache_dir().mkdir(parents=True, exist_ok=True, mode=0o700)
    _path(name).write_text(json.dumps({"scales": scales}, indent=1) + "\n", encoding="utf-8")
    return found


def _steps(document: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    steps = document.get("steps")
    if not isinstance(steps, list) or len(steps) > _MOST_STEPS or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"{path}: steps must be a list of at most {_MOST_STEPS} objects")
    return steps


def _number(value: object, path: Path, place: int, key: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{path}: {key} of step {place} must be a number, given {value!r}")
    return float(value)
