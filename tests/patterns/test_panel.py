"""Packing into panels and back, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecomp.patterns import PanelWeight, Pattern

INTS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(INTS[tensor.dtype])


@st.composite
def any_bits(draw: st.DrawFn, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Any bits: NaN with payloads, infinities, subnormals, zeros of both signs; most entries zero."""
    dtype = dtype or draw(st.sampled_from(list(INTS)))
    info = torch.iinfo(INTS[dtype])
    rows, cols = draw(st.integers(0, 37)), draw(st.integers(0, 23))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    raw = torch.randint(info.min, info.max + 1, (rows, cols), generator=generator)
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.0], dtype=dtype)
    picked = bits(special)[torch.randint(0, len(special), (rows, cols), generator=generator)]
    kept = torch.rand(rows, cols, generator=generator)
    raw = torch.where(kept < 0.7, 0, torch.where(kept < 0.85, picked.to(torch.int64), raw))
    return raw.to(INTS[dtype]).view(dtype)


@given(any_bits(), st.sampled_from([1, 2, 3, 8, 16, 32, 64]))
def test_unpack_is_the_inverse_bit_for_bit(weight: torch.Tensor, v: int) -> None:
    restored = PanelWeight.pack(weight, v).unpack()
    assert restored.dtype == weight.dtype
    assert restored.is_contiguous()
    assert torch.equal(bits(restored), bits(weight))


@given(any_bits(), st.sampled_from([1, 3, 8, 32]))
def test_the_arrays_are_what_a_kernel_expects(weight: torch.Tensor, v: int) -> None:
    packed = PanelWeight.pack(weight, v)
    panels = -(-weight.shape[0] // v)
    assert packed.shape == tuple(weight.shape)
    assert all(array.is_contiguous() for array in (packed.ptr, packed.cols, packed.values))
    assert packed.nbytes == 4 * (panels + 1 + packed.cols.numel() * (1 + v))
    assert packed.ptr[0] == 0
    for panel in range(panels):
        start, stop = packed.ptr[panel : panel + 2].tolist()
        block = bits(weight)[panel * v : (panel + 1) * v]
        assert packed.cols[start:stop].tolist() == (block != 0).any(0).nonzero().squeeze(1).tolist()
        lanes = bits(packed.values[start:stop].contiguous())
        assert (lanes[:, block.shape[0] :] == 0).all()
        if weight.dtype == torch.float32:
            assert torch.equal(lanes[:, : block.shape[0]], block[:, packed.cols[start:stop].long()].T)


@given(any_bits(), st.sampled_from([1, 8]))
def test_without_signed_zeros_only_they_change(weight: torch.Tensor, v: int) -> None:
    packed = PanelWeight.pack(weight, v, signed_zeros=False)
    expected = torch.where((weight == 0) & torch.signbit(weight), 0, bits(weight))
    assert torch.equal(bits(packed.unpack()), expected)
    assert not (torch.signbit(packed.values) & (packed.values == 0)).any()


def test_a_negative_zero_is_kept_unless_told() -> None:
    weight = torch.tensor([[0.0, -0.0, 1.0]])
    assert PanelWeight.pack(weight, 8).cols.tolist() == [1, 2]
    assert PanelWeight.pack(weight, 8, signed_zeros=False).cols.tolist() == [2]


@given(st.integers(1, 70), st.integers(1, 30), st.sampled_from([8, 16, 32]))
def test_shared_rows_pack_without_padding(rows: int, cols: int, v: int) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + cols)
    pattern = Pattern("vnm", n=2, m=4, v=v)
    weight = pattern.project(torch.randn(rows, cols, generator=generator))
    packed = PanelWeight.pack(weight, v)
    whole, tail = divmod(cols, 4)
    assert packed.cols.numel() <= -(-rows // v) * (2 * whole + (tail + 1) // 2)
    assert torch.equal(packed.unpack(), weight)


def test_views_and_parameters_pack() -> None:
    weight = Pattern.parse("2:4").project(torch.randn(12, 20))
    assert torch.equal(PanelWeight.pack(torch.nn.Parameter(weight), 8).unpack(), weight)
    assert torch.equal(PanelWeight.pack(weight.T, 8).unpack(), weight.T)
    assert torch.equal(PanelWeight.pack(weight[1:, ::2], 8).unpack(), weight[1:, ::2])


def test_wrong_inputs_are_explained() -> None:
    with pytest.raises(ValueError, match=r"given torch\.float64 of shape \(2, 2\)"):
        PanelWeight.pack(torch.ones(2, 2, dtype=torch.float64), 8)
    with pytest.raises(ValueError, match=r"of shape \(2,\)"):
        PanelWeight.pack(torch.ones(2), 8)
    with pytest.raises(ValueError, match="at least one row, given 0"):
        PanelWeight.pack(torch.ones(2, 2), 0)
    packed = PanelWeight.pack(torch.ones(2, 2), 8)
    with pytest.raises(ValueError, match="must be int32, int32 and float32"):
        PanelWeight(v=8, shape=(2, 2), ptr=packed.ptr[:-1], cols=packed.cols, values=packed.values)
    with pytest.raises(ValueError, match="must be int32, int32 and float32"):
        PanelWeight(v=8, shape=(2, 2), ptr=packed.ptr, cols=packed.cols.long(), values=packed.values)
