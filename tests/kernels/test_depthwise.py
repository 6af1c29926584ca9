"""The depthwise kernels against PyTorch: in strips as x86 runs it, and with a padded copy of the map as ARM does."""

from __future__ import annotations

import pytest
import torch
from conv_cases import check, expected, random_weight, windows
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_cases import Guarded, close, needs_avx2, needs_x86

from sparsecomp.kernels import depthwise, depthwise_strips
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.runtime.launch import KernelSource, Launch, Weights, function_of
from sparsecomp.targets.base import ConvEpilogue
from sparsecomp.targets.cpu import conv_schedules
from sparsecomp.targets.x86.conv_kernels import X86DepthwiseKernel
from sparsecomp.targets.x86.cpu import best_level, level
from sparsecomp.window import Maps, Window

sizes = st.tuples(st.integers(1, 24), st.integers(1, 40))


def depthwise_window(window: Window, channels: int) -> Window:
    return Window(window.kernel, window.stride, window.padding, window.dilation, channels, window.extra)


@needs_x86
@settings(max_examples=12)
@given(
    window=windows,
    size=sizes,
    images=st.integers(1, 2),
    channels=st.integers(2, 5),
    multiplier=st.integers(1, 2),
)
def test_strips_are_torch(window: Window, size: tuple[int, int], images: int, channels: int, multiplier: int) -> None:
    window = depthwise_window(window, channels)
    assume(min(window.output(*size)) > 0 and depthwise_strips.supports(window))
    weight = random_weight(channels * multiplier, 1, window, 1.0)
    x = torch.randn(images, channels, *size, generator=torch.Generator().manual_seed(0))
    check(X86DepthwiseKernel(level(best_level()), weight, window), x, weight, window, residual=True)


@needs_avx2
@pytest.mark.parametrize("level_name", ["avx2", best_level()])
@pytest.mark.parametrize(("size", "stride", "taps"), [(7, 1, 5), (14, 1, 3), (29, 2, 3), (56, 1, 3)])
def test_maps_of_networks(level_name: str, size: int, stride: int, taps: int) -> None:
    window = Window((taps, taps), (stride, stride), (taps // 2, taps // 2), groups=6, extra=(stride - 1,) * 2)
    weight = random_weight(6, 1, window, 1.0)
    x = torch.randn(1, 6, size, size, generator=torch.Generator().manual_seed(0))
    check(X86DepthwiseKernel(level(level_name), weight, window), x, weight, window, residual=False)


@needs_x86
def test_what_lies_outside_of_the_map_has_no_influence() -> None:
    window = Window((3, 3), padding=(1, 1), groups=3)
    weight = random_weight(3, 1, window, 1.0)
    x = torch.full((1, 3, 6, 9), float("nan"))
    x[:, 1] = torch.randn(6, 9)  # the maps before and behind are not looked at
    out = torch.empty(1, 3, 6, 9)
    X86DepthwiseKernel(level(best_level()), weight, window).run(x, None, None, ConvEpilogue(), out)
    close(out[:, 1:2], torch.nn.functional.conv2d(x[:, 1:2], weight[1:2], padding=1))


def test_windows_that_no_kernel_is_made_for() -> None:
    assert depthwise_strips.supports(Window((5, 5), (2, 2)))
    assert not depthwise_strips.supports(Window((5, 5), (1, 3)))
    assert not depthwise_strips.supports(Window((65, 1)))


@needs_x86
@settings(max_examples=15)
@given(window=windows, size=sizes, channels=st.integers(2, 4))
def test_the_kernel_with_a_padded_copy_is_torch(window: Window, size: tuple[int, int], channels: int) -> None:
    window = depthwise_window(window, channels)
    assume(min(window.output(*size)) > 0)
    machine, maps = level(best_level()), Maps(2, *size)
    weight = random_weight(2 * channels, 1, window, 1.0)
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
    layout = depthwise.Layout.of(window, maps)
    schedule = conv_schedules.depthwise_schedule(machine, layout, window, maps)
    epilogue = Epilogue("relu", residual=True, residual_first=True)
    build = lambda: depthwise.build(schedule, epilogue)  # noqa: E731 -- the kernel is built where it is not cached
    function = function_of(KernelSource("depthwise", f"{schedule!r} {epilogue!r}", build, machine.tvm_target))
    weights = Weights([weight.flatten(1).numpy(), layout.distances, layout.phases])
    dims = depthwise.dims(schedule, layout, window, maps, 2 * channels)
    height, width = window.output(*size)
    scratch = depthwise.scratch_floats(schedule, layout, height)
    out = Guarded((2, 2 * channels, height, width))
    terms, residual = torch.randn(4 * channels), torch.randn(out.tensor.shape)
    Launch(function, weights, dims, 4 * channels, 1, scratch).run(x, terms, residual, out.tensor)
    out.check()
    close(out.tensor, expected(x, weight, window, terms, residual))
