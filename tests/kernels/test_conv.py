"""The convolution kernels against PyTorch: windows of every kind, maps of every size, groups, batches and threads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conv_cases import check, check_maps, expected, random_weight, windows
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_cases import close, needs_avx2, needs_x86

from sparsecomp.kernels import conv
from sparsecomp.kernels.conv_geometry import Geometry
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.patterns.quads import QuadWeight
from sparsecomp.targets.base import ConvEpilogue
from sparsecomp.targets.cpu.conv_schedules import call, packing, uses
from sparsecomp.targets.x86.conv_kernels import X86ConvKernel
from sparsecomp.targets.x86.cpu import best_level, caches, level
from sparsecomp.window import Maps, Window, convolve, form_of, read_form


@given(window=windows, size=st.tuples(st.integers(1, 9), st.integers(1, 9)), images=st.integers(1, 2))
def test_the_reference_is_torch(window: Window, size: tuple[int, int], images: int) -> None:
    assume(min(window.output(*size)) > 0)
    weight = random_weight(4 * window.groups, 2, window)
    x = torch.randn(images, 2 * window.groups, *size, generator=torch.Generator().manual_seed(0))
    packed = QuadWeight.pack(weight.flatten(1), chunk=4, block=5, groups=window.groups)
    terms = torch.randn(2 * len(weight), generator=torch.Generator().manual_seed(1))
    residual = torch.randn(convolve(x, weight, window).shape, generator=torch.Generator().manual_seed(2))
    given_ = conv.reference(
        x.numpy(), packed, window, terms.numpy(), residual.numpy(), Epilogue("relu", True, residual_first=True)
    )
    close(given_, expected(x, weight, window, terms, residual))


@given(window=windows, size=st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_every_tap_of_a_position_is_a_constant_distance_away(window: Window, size: tuple[int, int]) -> None:
    height, width = window.output(*size)
    assume(min(height, width) > 0)
    geometry = Geometry.of(window, Maps(1, *size))
    assert geometry.pitch >= width
    for index, (phase, ay, ax) in enumerate(geometry.taps):
        ky, kx = divmod(index, window.kernel[1])
        py, px = geometry.phases[phase]
        assert window.stride[0] * ay + py == ky * window.dilation[0] - window.padding[0]
        assert window.stride[1] * ax + px == kx * window.dilation[1] - window.padding[1]
        # What a position that counts reads inside of the map lies inside of the plane.
        columns = [window.stride[1] * (x + ax) + px for x in range(width)]
        inside = [x + ax for x, column in enumerate(columns) if 0 <= column < size[1]]
        assert all(0 <= column < geometry.pitch for column in inside)


@needs_x86
@settings(max_examples=25)
@given(
    window=windows,
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    images=st.integers(1, 3),
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 5),
    threads=st.integers(1, 2),
)
def test_the_kernel_is_torch(
    window: Window, size: tuple[int, int], images: int, outputs: int, inputs: int, threads: int
) -> None:
    assume(min(window.output(*size)) > 0)
    machine = level(best_level())
    weight = random_weight(outputs * window.groups, inputs, window)
    x = torch.randn(images, inputs * window.groups, *size, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        vectors = 4 if machine.lanes == 16 else 2
        check(X86ConvKernel(machine, weight, window, vectors), x, weight, window, residual=True)
    finally:
        torch.set_num_threads(before)


SHAPES = [
    # input and output channels, maps, images, window: tiles within maps, over several maps, and over unused columns
    (16, 24, (28, 28), 1, Window((1, 1))),
    (150, 260, (14, 14), 1, Window((1, 1))),
    (40, 30, (14, 14), 2, Window((3, 3), padding=(1, 1))),
    (24, 20, (7, 7), 5, Window((3, 3), padding=(1, 1))),
    (9, 12, (56, 56), 1, Window((3, 3), stride=(2, 2), padding=(1, 1))),
    (12, 20, (15, 15), 2, Window((1, 1), stride=(2, 2))),
    (3, 8, (40, 40), 1, Window((7, 7), stride=(2, 2), padding=(3, 3))),
    (8, 8, (1, 50), 2, Window((1, 5))),
]


@needs_avx2
@pytest.mark.parametrize(("inputs", "outputs", "size", "images", "window"), SHAPES)
@pytest.mark.parametrize("level_name", ["avx2", best_level()])
def test_maps_of_networks(
    level_name: str, inputs: int, outputs: int, size: tuple[int, int], images: int, window: Window
) -> None:
    check_maps(X86ConvKernel, level(level_name), inputs, outputs, size, images, window)


@needs_x86
def test_what_lies_outside_of_the_map_has_no_influence() -> None:
    window = Window((3, 3), padding=(1, 1))
    weight = random_weight(4, 2, window, 1.0)
    weight[:, 1] = 0  # the second map is not looked at
    x = torch.randn(1, 2, 8, 8)
    x[0, 1] = float("nan")
    out = torch.empty(1, 4, 8, 8)
    X86ConvKernel(level(best_level()), weight, window, 2).run(x, None, None, ConvEpilogue(), out)
    close(out, convolve(x[:, :1], weight[:, :1], window))


@needs_x86
def test_maps_beyond_32_bits_are_refused() -> None:
    kernel = X86ConvKernel(level(best_level()), torch.ones(4, 1, 1, 1), Window((1, 1)), 2)
    with pytest.raises(ValueError, match="call with fewer images"):
        kernel.build(Maps(1 << 20, 64, 64), ConvEpilogue(), False)


def test_a_window_says_its_size_and_what_is_not_plain() -> None:
    assert str(Window((3, 3), (2, 2), (1, 1))) == "3x3 /2 p1"
    assert str(Window((1, 5), (1, 2), (0, 2), groups=4)) == "1x5 /1,2 p0,2 g4"
    assert Window((3, 3), extra=(1, 1)).output(4, 4) == (3, 3)
    assert np.prod(Window((3, 3)).output(2, 5)) <= 0
    assert Maps(2, 2, 5).positions(Window((3, 3))) == 0


@given(window=windows, outputs=st.integers(1, 4096))
def test_a_window_is_read_from_its_text(window: Window, outputs: int) -> None:
    assert read_form(form_of(window, outputs)) == (replace(window, groups=1), outputs)


@needs_x86
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_windows_of_one_position_use_maps_of_whole_vectors_where_they_lie(groups: int, stride: int) -> None:
    machine = level(best_level())
    window = Window((1, 1), (stride, stride), groups=groups)
    weight = random_weight(12 * groups, 70, window)
    x = torch.randn(2, 70 * groups, 16 * stride, 12 * stride, generator=torch.Generator().manual_seed(0))
    geometry = Geometry.of(window, Maps(2, 16 * stride, 12 * stride))
    nonzeros = int(weight.count_nonzero())
    block = packing(machine, (12 * groups, 70), groups, 2, caches().l1, nonzeros)["block"]
    packed = (2, block, uses((12 * groups, 70), groups, nonzeros))
    assert call(machine, geometry, 2, (12, groups), packed, 1, caches()).direct
    check(X86ConvKernel(machine, weight, window, 2), x, weight, window, residual=True)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("kernel", [1, 3])
def test_what_whole_tiles_leave_of_a_map_goes_to_a_narrower_one(images: int, kernel: int) -> None:
    machine = level(best_level())
    window = Window((kernel, kernel), padding=(kernel // 2, kernel // 2))
    weight = random_weight(12, 10, window)
    size = (6 * machine.lanes + 1, 2)
    shape, nonzeros = (12, 10 * kernel * kernel), int(weight.count_nonzero())
    block = packing(machine, shape, 1, 4, caches().l1, nonzeros)["block"]
    packed = (4, block, uses(shape, 1, nonzeros))
    cut = call(machine, Geometry.of(window, Maps(images, *size)), images, (12, 1), packed, 1, caches(), tails=True)
    assert cut.tail is not None
    assert (cut.vectors, cut.tail.vectors) == (4, 1)
    x = torch.randn(images, 10, *size, generator=torch.Generator().manual_seed(0))
    check(X86ConvKernel(machine, weight, window, 4), x, weight, window, residual=True)
