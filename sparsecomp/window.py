"""The window of a convolution and the maps that it slides over."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """The window of a convolution, two numbers each; a one-dimensional one slides over maps of height 1.

    Attributes:
        kernel: Taps.
        stride: Steps of the window.
        padding: Zeros on either side of the map.
        dilation: Distance of the taps.
        groups: Groups of channels that do not see each other.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def taps(self) -> int:
        """Products of one input channel."""
        return self.kernel[0] * self.kernel[1]

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for a map of this size; not positive where the window does not fit."""
        sizes = zip((height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        rows, columns = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)
        return rows, columns

    def __str__(self) -> str:
        parts = [f"{self.kernel[0]}x{self.kernel[1]}"]
        for name, value in (("/", self.stride), ("p", self.padding), ("d", self.dilation)):
            if value != ((0, 0) if name == "p" else (1, 1)):
                parts.append(f"{name}{value[0]}" if value[0] == value[1] else f"{name}{value[0]},{value[1]}")
        return " ".join(parts + ([f"g{self.groups}"] if self.groups > 1 else []))


@dataclass(frozen=True)
class Maps:
    """What a convolution is called with: so many images of height by width."""

    images: int
    height: int
    width: int

    def positions(self, window: Window) -> int:
        """Output positions of all images."""
        rows, columns = window.output(self.height, self.width)
        return self.images * max(rows, 0) * max(columns, 0)

    def __str__(self) -> str:
        return f"{self.images} x {self.height} x {self.width}"
