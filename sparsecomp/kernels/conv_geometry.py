"""How the positions of a convolution are counted: by rows of `pitch` positions, taps as constant distances.

With a stride, the map is first taken apart into its phases: input column `s * j + p` is column j of phase p. A tap
that reads column `s * x + k - padding` for output column x reads column `x + a` of one phase, where
`k - padding = s * a + p`. Where all planes have rows of `pitch` floats, the input of a tap is then its plane,
`a_y * pitch + a_x` floats further.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsecomp.window import Maps, Window


@dataclass(frozen=True)
class Geometry:
    """The counting for one window on maps of one size.

    Attributes:
        height, width: Of the output.
        phases: Of the map, row and column, that some tap reads.
        taps: For every tap, row by row, the number of its phase and the rows and columns that it is moved by.
        rows: Of a plane.
        pitch: Floats of a row of a plane, and positions of a row of the output; at least `width`.
        opened: Whether planes are made by `sparsecomp.kernels.conv_open`; else the map itself has the form.
    """

    height: int
    width: int
    phases: tuple[tuple[int, int], ...]
    taps: tuple[tuple[int, int, int], ...]
    rows: int
    pitch: int
    opened: bool

    @classmethod
    def of(cls, window: Window, maps: Maps) -> Geometry:
        """The counting for a window and maps; the output must not be empty."""
        height, width = window.output(maps.height, maps.width)
        phases, taps = _taps(window)
        if window.stride == (1, 1) and width <= maps.width:
            return cls(height, width, phases, taps, maps.height, maps.width, opened=False)
        # Of a phase only what some tap reaches is needed.
        moves = _moves(window)
        rows = max(_reached(maps.height, window.stride[0], moves[0], height))
        columns = max(_reached(maps.width, window.stride[1], moves[1], width))
        return cls(height, width, phases, taps, rows, max(columns, width), opened=True)

    @property
    def length(self) -> int:
        """Positions of an image, those that do not count included."""
        return self.height * self.pitch

    @property
    def masked(self) -> bool:
        """Whether a tap may reach outside of the map."""
        return self.rows < self.height or any(any(moved) for _, *moved in self.taps)


def table(window: Window, channels: int) -> npt.NDArray[np.int32]:
    """For every column of a weight of so many channels, `[channels * taps, 4]`: plane, moved rows and columns, tap."""
    phases, found = _taps(window)
    taps = np.array([(*tap, index) for index, tap in enumerate(found)], np.int32)
    columns = np.tile(taps, (channels, 1))
    columns[:, 0] += np.repeat(np.arange(channels, dtype=np.int32) * len(phases), len(taps))
    return columns


def check_addressable(values: int) -> None:
    """Raise a ValueError for maps of more values than the kernels' indices of 32 bits reach."""
    if values > 2**31 - 1:
        raise ValueError(f"maps of {values} values are more than 32-bit numbers address; call with fewer images")


def _moves(window: Window) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """For the taps of either axis what they are moved by, and the phase that they read."""
    sizes = zip(window.kernel, window.stride, window.padding, window.dilation, strict=True)
    rows, columns = ([divmod(k * d - p, s) for k in range(taps)] for taps, s, p, d in sizes)
    return rows, columns


def _taps(window: Window) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int, int], ...]]:
    """The phases that are read, and for every tap the number of its phase and what it is moved by."""
    rows, columns = _moves(window)
    phases = sorted({(py, px) for _, py in rows for _, px in columns})
    number = {phase: index for index, phase in enumerate(phases)}
    return tuple(phases), tuple((number[py, px], ay, ax) for ay, py in rows for ax, px in columns)


def _reached(size: int, stride: int, moves: list[tuple[int, int]], outputs: int) -> list[int]:
    """For each move and phase of an axis, how much of the phase it needs; at least 1."""
    return [max(1, min(-(-(size - phase) // stride), outputs + move)) for move, phase in moves]
