"""Cells of the units of a design: slices and block RAMs by rules, look-up tables and flip-flops by regression.

A unit is a module of the Verilog that a design is written in, with its sizes. What yosys made of small ones is in
`cells.json` (`tools/sweep_hls_cells.py`). Look-up tables and flip-flops are sums over what a unit is made of, such as
bits of additions or of registers, each with a factor that is not negative, fitted to these points so that the squares
of the relative errors are least. A memory becomes what is cheapest in the costs that yosys weighs (its `memory_libmap`,
share/xilinx/brams_xc4v.txt and lutrams_xcu.txt), with block RAMs in the shapes that are listed there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from math import ceil, log2
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

Sizes = Mapping[str, int]
_RAMB18 = {512: 36, 1024: 18, 2048: 9, 4096: 4, 8192: 2, 16384: 1}
"""Bits of a row of a block RAM of 18 Kbit by its rows."""
_RAMB18_COST, _LUTRAM_COST, _ROM_COST = 129, 16, 1 / 64
"""Of such a block, of eight look-up tables that hold a memory, and of a bit of a read-only memory in logic."""
_DSP_BITS = 25
"""Of the wider input of a slice, signed; the other takes the 16 bits of a factor."""


@dataclass(frozen=True)
class Cells:
    """What something takes of a device.

    Attributes:
        dsp: multiplier slices.
        lut: look-up tables.
        ff: flip-flops.
        ramb18: block RAMs of 18 Kbit; one of 36 is two.
    """

    dsp: int = 0
    lut: float = 0.0
    ff: float = 0.0
    ramb18: int = 0

    def __add__(self, other: Cells) -> Cells:
        return Cells(self.dsp + other.dsp, self.lut + other.lut, self.ff + other.ff, self.ramb18 + other.ramb18)


@dataclass(frozen=True)
class _Parts:
    """What a unit is made of: cells that follow rules, and amounts by name that the factors belong to."""

    dsp: int
    ramb18: int
    lut: dict[str, int]
    ff: dict[str, int]


def kinds() -> list[str]:
    """Of units."""
    return list(_PARTS)


def cells(kind: str, sizes: Sizes) -> Cells:
    """Predict the cells of a unit.

    Args:
        kind: one of `kinds()`.
        sizes: as the points of `cells.json` have them.
    """
    parts = _PARTS[kind](sizes)
    lut, ff = _factors(kind)
    return Cells(parts.dsp, _sum(parts.lut, lut), _sum(parts.ff, ff), parts.ramb18)


def _sum(amounts: Mapping[str, int], factors: Mapping[str, float]) -> float:
    return sum(amount * factors[name] for name, amount in amounts.items())


def requantise_dsp(sums: int) -> int:
    """Slices that multiply a sum of some bits by a factor."""
    return 1 if sums <= _DSP_BITS else 2


def blocks(depth: int, bits: int) -> tuple[int, int]:
    """Block RAMs of 18 Kbit that hold a memory, and how many of its rows lie in one of theirs, where it is deeper.

    Args:
        depth: rows.
        bits: of a row.
    """
    return min((-(-(-(-depth // rows) * bits) // width), -(-depth // rows)) for rows, width in _RAMB18.items())


@dataclass(frozen=True)
class _Rom:
    """A memory that is only read: block RAMs and bits that are chosen from their rows, or bits and columns of logic."""

    ramb18: int
    chosen: int
    bits: int
    columns: int

    @classmethod
    def of(cls, depth: int, bits: int) -> _Rom:
        count, together = blocks(depth, bits)
        if count * _RAMB18_COST < depth * bits * _ROM_COST:
            return cls(count, (together - 1) * bits, 0, 0)
        return cls(0, 0, depth * bits, bits)


def _ram(depth: int, bits: int) -> tuple[int, int]:
    """A memory that is written: block RAMs, and look-up tables that hold it."""
    small = depth <= 32
    slices, width = (1, 14) if small else (-(-depth // 64), 7)
    count, _ = blocks(depth, bits)
    # A look-up table chooses between up to four slices.
    if count * _RAMB18_COST < slices * bits / width * _LUTRAM_COST + (slices - 1) / 3 * bits:
        return count, 0
    return 0, 8 * slices * -(-bits // width)


def _bits(count: int) -> int:
    """That tell so many things apart."""
    return ceil(log2(count)) if count > 1 else 0


def _multiply(sizes: Sizes) -> _Parts:
    rows, m, values = sizes["rows"], sizes["m"], sizes.get("values", 8)
    lanes = sizes["groups"] * sizes["n"]
    multiplexers = rows // sizes["shared"] * lanes if m > 1 else 0
    chosen, word, weights = values * multiplexers, values * sizes["groups"] * m, 8 * rows * lanes
    given = word + weights + _bits(m) * multiplexers
    sums, products = rows * sizes["sums"], (8 + values) * rows * lanes
    additions, left, bits = 0, lanes, 8 + values
    while left > 1:
        bits += 1
        additions += rows * (left // 2) * bits
        left = -(-left // 2)
    lut = {"unit": 1, "chosen": chosen, "of more than 4": chosen * max(0, m - 4), "additions": additions, "sums": sums}
    ff = {"unit": 1, "given": given, "products": products, "sums": sums, "operands": chosen or word}
    # A short way leaves its first stage empty.
    again = given if lanes <= 4 else 0
    ff |= {"given again, chosen": again if m > 1 else 0, "given again": 0 if m > 1 else again}
    return _Parts(rows * lanes, 0, lut | {"given": word + weights}, ff)


def _requantise(sizes: Sizes) -> _Parts:
    sums, serial = sizes["rows"] * sizes["sums"], sizes["serial"]
    amounts = {"unit": 1, "sums": sums, "product": sizes["wide"]}
    amounts |= {"serial": serial, "product, serial": serial * sizes["wide"]}
    return _Parts(0 if serial else requantise_dsp(sizes["sums"]), 0, dict(amounts), dict(amounts))


def _pool(sizes: Sizes) -> _Parts:
    mean, taps = sizes["mean"], sizes["taps"]
    amounts = {"unit": 1 - mean, "taps": (1 - mean) * taps, "mean": mean, "taps of a mean": mean * taps}
    return _Parts(mean, 0, dict(amounts), dict(amounts))


def _look_up(sizes: Sizes) -> _Parts:
    return _Parts(0, 0, {"unit": 1}, {"unit": 1})


def _vector_memory(sizes: Sizes) -> _Parts:
    word, words, trips, inputs = (sizes[name] for name in ("WORD", "WORDS", "TRIPS", "INPUTS"))
    roms = [_Rom.of(trips, sizes["BITS"]), _Rom.of(trips, _bits(words))]
    if sizes["ORDERED"]:
        roms.append(_Rom.of(inputs, _bits(words) + _bits(word)))
    lut, ff = _rom_parts(roms[:2])
    lut |= {"order": sum(rom.bits for rom in roms[2:])}
    if sizes["CHUNK"] == 1:
        ram = [_ram(2 * words, 8)] * word
        lut |= {"memories": sum(cells for _, cells in ram), "choice": 0}
        ff |= {"registers": 8 * word}
        count = sum(count for count, _ in ram)
    else:
        lut |= {"memories": 0, "choice": 8 * word * (2 * words - 1)}
        ff |= {"registers": 8 * word + 16 * inputs}
        count = 0
    ff |= {"rows": sizes["BITS"]}
    return _Parts(0, count + sum(rom.ramb18 for rom in roms), lut, ff)


def _rom_parts(roms: list[_Rom]) -> tuple[dict[str, int], dict[str, int]]:
    """What memories that are only read take beside block RAMs; those in logic also a register after every column."""
    columns = sum(rom.columns for rom in roms)
    lut = {"unit": 1, "chosen": sum(rom.chosen for rom in roms), "bits": sum(rom.bits for rom in roms)}
    return lut | {"columns": columns}, {"unit": 1, "columns": columns}


def _queue_memory(sizes: Sizes) -> _Parts:
    word, words = sizes["WORD"], sizes["WORDS"]
    rom = _Rom.of(sizes["GROUPS"] * words, sizes["BITS"])
    lut, ff = _rom_parts([rom])
    held = [_ram(2 * words, 9)] * word + [_ram(2 * words, _bits(words))]
    lut |= {"memories": sum(cells for _, cells in held)}
    ff |= {"registers": 9 * word, "rows": sizes["BITS"]}
    return _Parts(0, rom.ramb18 + sum(count for count, _ in held), lut, ff)


def _cyclic_memory(sizes: Sizes) -> _Parts:
    rom = _Rom.of(sizes["DEPTH"], sizes["BITS"])
    lut, ff = _rom_parts([rom])
    return _Parts(0, rom.ramb18, lut, ff)


def _stream_memory(sizes: Sizes) -> _Parts:
    depth, bits = sizes["DEPTH"], sizes["BITS"]
    count, lutram = _ram(depth, bits)
    lut = {"unit": 1, "memories": lutram, "places": _bits(depth)}
    return _Parts(0, count, lut, {"unit": 1, "places": _bits(depth), "registers": 0 if count else bits})


def _line_windows(sizes: Sizes) -> _Parts:
    kernel = sizes["KERNEL_ROWS"], sizes["KERNEL_COLUMNS"]
    line = (sizes["WIDTH"] + sizes["LEFT"] + sizes["RIGHT"]) * sizes["CHANNELS"]
    above = 8 * (kernel[0] - 1) * sizes["DILATION_ROWS"]
    lines = _ram(line, above) if above else (0, 0)
    back, depth = 8 * kernel[0] * (kernel[1] - 1), sizes["DILATION_COLUMNS"] * sizes["CHANNELS"]
    columns = _ram(depth, back) if depth > 1 and back else (0, 0)
    lut = {"unit": 1, "memories": lines[1] + columns[1], "lines": above}
    ff = {"unit": 1, "window": 8 * kernel[0] * kernel[1], "lines": 0 if lines[0] else above}
    ff |= {"columns": 0 if columns[0] or columns[1] else back}
    return _Parts(0, lines[0] + columns[0], lut, ff)


_PARTS = {
    "multiply": _multiply,
    "requantise": _requantise,
    "pool": _pool,
    "look_up": _look_up,
    "vector_memory": _vector_memory,
    "queue_memory": _queue_memory,
    "cyclic_memory": _cyclic_memory,
    "line_windows": _line_windows,
    "stream_memory": _stream_memory,
}


@functools.cache
def points() -> dict[str, Any]:
    """What `cells.json` holds: points of every kind, each of `sizes` and mapped `cells`, and the versions of tools."""
    text = (resources.files("sparsecomp.targets.hls") / "cells.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


@functools.cache
def _factors(kind: str) -> tuple[dict[str, float], dict[str, float]]:
    """Of look-up tables and of flip-flops."""
    every = points()["points"][kind]
    return _fit(kind, every, "LUT"), _fit(kind, every, "FF")


def _fit(kind: str, every: list[Any], cell: str) -> dict[str, float]:
    rows = [_amounts(kind, point["sizes"], cell) for point in every]
    mapped = np.array([float(point["cells"][cell]) for point in every])
    matrix = np.array([list(row.values()) for row in rows], float) / mapped[:, None]
    # Columns of one size, for the solver.
    scale = np.maximum(matrix.max(axis=0), np.finfo(float).tiny)
    found = nnls(matrix / scale, np.ones(len(mapped)))[0] / scale
    return dict(zip(rows[0], found.tolist(), strict=True))


def _amounts(kind: str, sizes: Sizes, cell: str) -> dict[str, int]:
    parts = _PARTS[kind](sizes)
    return parts.lut if cell == "LUT" else parts.ff


def fold_errors(kind: str, cell: str, folds: int = 5) -> npt.NDArray[np.float64]:
    """Relative errors of points of `cells.json`, each predicted from a fit to the other folds.

    Args:
        kind: of unit.
        cell: "LUT" or "FF".
        folds: that the points are dealt to in turn.
    """
    every = points()["points"][kind]
    errors = np.zeros(len(every))
    for fold in range(folds):
        factors = _fit(kind, [point for at, point in enumerate(every) if at % folds != fold], cell)
        for at in range(fold, len(every), folds):
            point = every[at]
            errors[at] = _sum(_amounts(kind, point["sizes"], cell), factors) / point["cells"][cell] - 1
    return errors
