"""The window of a convolution and the maps that it slides over."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Window:
    """The window of a convolution, two numbers each; a one-dimensional one slides over maps of height 1.

    Attributes:
        kernel: Taps.
        stride: Steps of the window.
        padding: Zeros on either side of the map.
        extra: More zeros below and on the right of it.
        dilation: Distance of the taps.
        groups: Groups of channels that do not see each other.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    extra: tuple[int, int] = (0, 0)

    @property
    def taps(self) -> int:
        """Products of one input channel."""
        return self.kernel[0] * self.kernel[1]

    def is_depthwise(self, in_features: int) -> bool:
        """Whether each output sees one input channel only, where a row of the weight has so many entries."""
        return self.groups > 1 and in_features == self.taps

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for a map of this size; not positive where the window does not fit."""
        padded = (height + self.extra[0], width + self.extra[1])
        sizes = zip(padded, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        rows, columns = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)
        return rows, columns

    def __str__(self) -> str:
        parts = [f"{self.kernel[0]}x{self.kernel[1]}"]
        pairs = (("/", self.stride), ("p", self.padding), ("+", self.extra), ("d", self.dilation))
        for name, value in pairs:
            if value != ((0, 0) if name in "p+" else (1, 1)):
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


def form_of(window: Window, outputs: int) -> str:
    """A window and the number of output channels as one text, which an op takes faster than five lists."""
    sizes = (window.kernel, window.stride, window.padding, window.dilation, window.extra)
    return " ".join(str(size) for size in (outputs, *(number for pair in sizes for number in pair)))


@functools.lru_cache(maxsize=1024)
def read_form(form: str) -> tuple[Window, int]:
    """The window, without its groups, and the number of output channels of a text from `form_of`."""
    outputs, *sizes = (int(number) for number in form.split())
    kernel, stride, padding, dilation, extra = zip(sizes[::2], sizes[1::2], strict=True)
    return Window(kernel, stride, padding, dilation, extra=extra), outputs


def convolve(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """The dense convolution of `[N, I, H, W]` or `[N, I, L]`."""
    stride, padding, dilation = window.stride, window.padding, window.dilation
    if any(window.extra):
        x = functional.pad(x, (0, window.extra[1], 0, window.extra[0]) if x.dim() == 4 else (0, window.extra[1]))
    if x.dim() == 3:
        return functional.conv1d(x, weight, None, stride[1:], padding[1:], dilation[1:], window.groups)
    return functional.conv2d(x, weight, None, stride, padding, dilation, window.groups)
