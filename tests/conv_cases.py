"""Windows, weights and the comparison with PyTorch that the tests of the convolution kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from kernel_cases import Guarded, close

from sparsecomp.targets.base import ConvEpilogue, ConvKernel
from sparsecomp.targets.cpu.level import Level
from sparsecomp.window import Window, convolve

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
windows = st.builds(
    Window,
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=pairs,
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 3),
    extra=st.tuples(st.integers(0, 1), st.integers(0, 1)),
)


def random_weight(outputs: int, inputs: int, window: Window, density: float = 0.4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(outputs + 10 * inputs)
    values = torch.randn(outputs, inputs, *window.kernel, generator=generator)
    return values * (torch.rand(values.shape, generator=generator) < density)


def expected(
    x: torch.Tensor, weight: torch.Tensor, window: Window, terms: torch.Tensor, residual: torch.Tensor | None
) -> torch.Tensor:
    shift, scale = terms.reshape(2, -1, 1, 1)
    value = convolve(x, weight, window) * scale + shift
    return torch.relu(value if residual is None else value + residual)


def check(kernel: ConvKernel, x: torch.Tensor, weight: torch.Tensor, window: Window, *, residual: bool) -> None:
    terms = torch.randn(2 * weight.shape[0], generator=torch.Generator().manual_seed(1))
    shape = (x.shape[0], weight.shape[0], *window.output(x.shape[2], x.shape[3]))
    added = torch.randn(shape, generator=torch.Generator().manual_seed(2)) if residual else None
    out = Guarded(shape)
    kernel.run(x, terms, added, ConvEpilogue("relu", True), out.tensor)
    out.check()
    close(out.tensor, expected(x, weight, window, terms, added))


def check_maps(
    kind: Callable[..., Any],
    machine: Level,
    inputs: int,
    outputs: int,
    size: tuple[int, int],
    images: int,
    window: Window,
) -> None:
    """Check a class of kernels on maps of a network, at the widest tile that the level has registers for."""
    weight = random_weight(outputs, inputs, window, 0.2)
    x = torch.randn(images, inputs, *size, generator=torch.Generator().manual_seed(0))
    vectors = 7 if machine.lanes == 16 else 3
    check(kind(machine, weight, window, vectors), x, weight, window, residual=False)
