"""Prices of the cost model: those measured on this machine if there are any, those that ship otherwise."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sparsecomp.log import log
from sparsecomp.runtime.cache import cache_dir
from sparsecomp.targets.x86.cost import Coefficients
from sparsecomp.targets.x86.cpu import cpu_family, cpu_name

FORMAT = 1
_MAX_BYTES = 1 << 16
_MAX_PRICE = 1e12


@dataclass(frozen=True)
class Calibration:
    """Prices and where they come from.

    Attributes:
        coefficients: nanoseconds per unit, by model and quantity.
        origin: for people.
        measured_here: whether `sparsecomp calibrate` measured them on this machine.
    """

    coefficients: Coefficients
    origin: str
    measured_here: bool


def path_of(level: str, host: str = "") -> Path:
    """Where the calibration of this machine lies."""
    return cache_dir() / f"x86-{level}{host and '-'}{host}.json"


def load(level: str, host: str = "") -> Calibration:
    """The prices for a level; a damaged or foreign file is reported and left aside.

    Args:
        level: of the instruction set.
        host: whose prices: "" for PyTorch's and those of our kernels, "ort" for what differs in ONNX Runtime.
    """
    shipped = _shipped(level, host, cpu_family())
    path = path_of(level, host)
    if not path.exists():
        return shipped
    try:
        content = _read(path)
        _check(content, shipped.coefficients)
    except ValueError as error:
        _warn_once(f"the calibration {path} is not used: {error}; run `sparsecomp calibrate` again")
        return shipped
    if content["cpu"] != cpu_name():
        _warn_once(f"the calibration {path} is not used: it is for {content['cpu']}")
        return shipped
    return Calibration(content["coefficients"], f"calibrated {content['when']}", True)


@functools.cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


def save(level: str, coefficients: Coefficients, when: str, notes: dict[str, Any], host: str = "") -> Path:
    """Write the prices that were measured here; see `load` for the host."""
    path = path_of(level, host)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "cpu": cpu_name(), "when": when, "notes": notes, "coefficients": coefficients}
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)
    return path


def _shipped(level: str, host: str, family: str) -> Calibration:
    name = f"{host}{host and '_'}prices.json"
    content = json.loads(resources.files(__package__).joinpath(name).read_text())
    entry = content["families"].get(family, {}).get(level) or content["levels"][level]
    return Calibration(
        entry["coefficients"], f"shipped prices ({entry['origin']}); `sparsecomp calibrate` measures", False
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        content = json.loads(text)
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"expected an object of format {FORMAT}")
    if not all(isinstance(content.get(name), str) for name in ("cpu", "when")):
        raise ValueError("cpu and when must be texts")
    return content


def _check(content: dict[str, Any], expected: Coefficients) -> None:
    given = content.get("coefficients")
    if not isinstance(given, dict) or set(given) != set(expected):
        raise ValueError("its models are not those of this version")
    for model, prices in given.items():
        if not isinstance(prices, dict) or set(prices) != set(expected[model]):
            raise ValueError(f"the quantities of {model} are not those of this version")
        for quantity, price in prices.items():
            if type(price) not in (int, float) or not 0 <= price <= _MAX_PRICE:
                raise ValueError(f"{model}.{quantity} is {price!r}, expected nanoseconds")
