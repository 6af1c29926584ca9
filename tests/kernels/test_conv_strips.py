"""The convolution kernel in strips against PyTorch."""

from __future__ import annotations

import pytest
import torch
from conv_cases import check, check_maps, random_weight, windows
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_cases import needs_avx2, needs_x86

from sparsecomp.kernels import conv_strips
from sparsecomp.kernels.conv_strips import StripSchedule
from sparsecomp.patterns.quads import MOST_COLUMNS
from sparsecomp.targets.base import ConvEpilogue
from sparsecomp.targets.x86.conv_kernels import X86StripsKernel
from sparsecomp.targets.x86.cpu import best_level, level
from sparsecomp.window import Maps, Window, convolve

FLOATS = 9830  # of scratch for a block


@given(window=windows, rows=st.integers(1, 7), inputs=st.integers(1, 9))
def test_the_number_of_a_column_is_the_vector_that_its_tap_reads(window: Window, rows: int, inputs: int) -> None:
    most = conv_strips.channels(window, 16, rows, FLOATS)
    assume(most)
    block, pitch = min(most, inputs), most * window.kernel[1]
    schedule = StripSchedule(16, rows, "shuffle", 16, pitch, window.kernel, window.stride, window.dilation)
    assert schedule.block_floats <= FLOATS
    weight = torch.randn(2, inputs, *window.kernel)
    arranged = conv_strips.arrange(weight, window, block, pitch)
    blocks = -(-inputs // block)
    width = arranged.shape[1] // blocks
    assert width <= MOST_COLUMNS
    assert arranged.count_nonzero() == weight.numel()
    for channel in range(inputs):
        for ky in range(window.kernel[0]):
            for kx in range(window.kernel[1]):
                vector = schedule.rows[ky * window.dilation[0]] * pitch + channel % block * window.kernel[1] + kx
                column = channel // block * width + vector
                torch.testing.assert_close(arranged[:, column], weight[:, channel, ky, kx])


@given(window=windows, rows=st.integers(1, 7))
def test_the_rows_of_a_tile_lie_a_constant_distance_apart(window: Window, rows: int) -> None:
    schedule = StripSchedule(16, rows, "shuffle", 16, 8, window.kernel, window.stride, window.dilation)
    for tap in range(0, window.kernel[0] * window.dilation[0], window.dilation[0]):
        for row in range(rows):
            assert schedule.rows[row * window.stride[0] + tap] == tap + row * schedule.step
    assert len(schedule.rows) == conv_strips.rows_read(window, rows)
    assert len(set(schedule.rows.values())) == len(schedule.rows)


def test_windows_that_no_kernel_is_made_for() -> None:
    assert conv_strips.channels(Window((3, 3), (2, 2)), 16, 7, FLOATS)
    assert not conv_strips.channels(Window((3, 3), (1, 3)), 16, 7, FLOATS)
    assert not conv_strips.channels(Window((31, 31)), 16, 7, FLOATS)
    assert not conv_strips.channels(Window((1, 10**9)), 16, 7, FLOATS)
    assert not conv_strips.channels(Window((2, 1), dilation=(300, 1)), 16, 7, FLOATS)
    machine = level(best_level())
    with pytest.raises(ValueError, match="no kernel in strips for a window 3x3 /3"):
        X86StripsKernel(machine, torch.ones(4, 1, 3, 3), Window((3, 3), (3, 3)), 4)


@needs_x86
@settings(max_examples=12)
@given(
    window=windows,
    size=st.tuples(st.integers(1, 24), st.integers(1, 36)),
    images=st.integers(1, 2),
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 5),
    threads=st.integers(1, 2),
)
def test_the_kernel_is_torch(
    window: Window, size: tuple[int, int], images: int, outputs: int, inputs: int, threads: int
) -> None:
    machine = level(best_level())
    assume(min(window.output(*size)) > 0 and conv_strips.channels(window, machine.lanes, 4, FLOATS))
    weight = random_weight(outputs * window.groups, inputs, window)
    x = torch.randn(images, inputs * window.groups, *size, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(X86StripsKernel(machine, weight, window, 4), x, weight, window, residual=True)
    finally:
        torch.set_num_threads(before)


SHAPES = [
    # Input and output channels, maps, images, window: whole vectors, narrow maps, several blocks, two splits of rows.
    (40, 20, (28, 28), 1, Window((3, 3), padding=(1, 1))),
    (50, 150, (14, 14), 2, Window((3, 3), padding=(1, 1))),
    (30, 12, (56, 20), 1, Window((3, 3), stride=(2, 2), padding=(1, 1))),
    (12, 20, (33, 33), 2, Window((1, 1), stride=(2, 2))),
    (3, 8, (40, 40), 1, Window((7, 7), stride=(2, 2), padding=(3, 3))),
    (8, 8, (1, 50), 2, Window((1, 5))),
]


@needs_avx2
@pytest.mark.parametrize(("inputs", "outputs", "size", "images", "window"), SHAPES)
@pytest.mark.parametrize("level_name", ["avx2", best_level()])
def test_maps_of_networks(
    level_name: str, inputs: int, outputs: int, size: tuple[int, int], images: int, window: Window
) -> None:
    check_maps(X86StripsKernel, level(level_name), inputs, outputs, size, images, window)


@needs_x86
def test_what_lies_outside_of_the_map_has_no_influence() -> None:
    window = Window((3, 3), padding=(1, 1))
    weight = random_weight(4, 3, window, 1.0)
    weight[:, ::2] = 0  # the maps before and behind are not looked at
    x = torch.randn(1, 3, 9, 17)
    x[0, ::2] = float("nan")
    out = torch.empty(1, 4, 9, 17)
    X86StripsKernel(level(best_level()), weight, window, 4).run(x, None, None, ConvEpilogue(), out)
    torch.testing.assert_close(out, convolve(x[:, 1:2], weight[:, 1:2], window), rtol=1e-4, atol=1e-5)


@needs_x86
def test_maps_beyond_32_bits_are_refused() -> None:
    kernel = X86StripsKernel(level(best_level()), torch.ones(4, 1, 3, 3), Window((3, 3)), 4)
    with pytest.raises(ValueError, match="call with fewer images"):
        kernel.build(Maps(1 << 20, 64, 64), ConvEpilogue(), False)
