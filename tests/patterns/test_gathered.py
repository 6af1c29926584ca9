"""Packing for one token: index lists and bit masks, and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecomp.patterns.gathered import MASK_BITS, GatherWeight, MaskWeight

SPECIAL = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.0, 1e-42)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def without_negative_zeros(weight: torch.Tensor) -> torch.Tensor:
    return torch.where(weight == 0, torch.zeros_like(weight), weight)


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Any bits (NaN payloads, infinities, subnormals, both zeros), at any density, of ragged and empty sizes."""
    outputs, inputs = draw(st.integers(0, 13)), draw(st.integers(0, 53))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    raw = torch.randint(-(2**31), 2**31, (outputs, inputs), generator=generator).to(torch.int32)
    special = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (outputs, inputs), generator=generator)]
    kept = torch.rand(outputs, inputs, generator=generator) < draw(st.sampled_from([0.0, 0.05, 0.3, 0.6, 1.0]))
    chosen = torch.where(torch.rand(outputs, inputs, generator=generator) < 0.5, bits(special), raw)
    return torch.where(kept, chosen, 0).to(torch.int32).view(torch.float32)


GROUPS = st.sampled_from([1, 3, 4, 8, 16])


@given(weights(), GROUPS)
def test_gather_unpack_is_the_inverse_but_for_negative_zeros(weight: torch.Tensor, group: int) -> None:
    restored = GatherWeight.pack(weight, group=group).unpack()
    assert torch.equal(bits(restored), bits(without_negative_zeros(weight)))


@given(weights())
def test_mask_unpack_is_the_inverse_but_for_negative_zeros(weight: torch.Tensor) -> None:
    assert torch.equal(bits(MaskWeight.pack(weight).unpack()), bits(without_negative_zeros(weight)))


@given(weights(), GROUPS)
def test_gather_rows_are_padded_to_whole_groups(weight: torch.Tensor, group: int) -> None:
    packed = GatherWeight.pack(weight, group=group)
    counts = torch.count_nonzero(weight, dim=1).tolist()
    assert packed.shape == tuple(weight.shape)
    assert np.diff(packed.ptr).tolist() == [-(-count // group) for count in counts]
    assert len(packed.values) == len(packed.columns) == packed.ptr[-1] * group
    assert packed.nbytes == 6 * len(packed.values) + 4 * len(packed.ptr)
    assert (packed.values.dtype, packed.columns.dtype, packed.ptr.dtype) == (np.float32, np.uint16, np.int32)
    for row, count in enumerate(counts):
        start = int(packed.ptr[row]) * group
        columns = torch.nonzero(weight[row]).squeeze(1).tolist()
        assert packed.columns[start : start + count].tolist() == columns
        end = int(packed.ptr[row + 1]) * group
        # A kernel multiplies the padding too: it must be a zero times something that exists.
        assert (packed.values[start + count : end] == 0).all()
        assert (packed.columns[start + count : end] < max(weight.shape[1], 1)).all()


@given(weights())
def test_mask_bits_are_the_columns(weight: torch.Tensor) -> None:
    packed = MaskWeight.pack(weight)
    outputs, inputs = weight.shape
    counts = torch.count_nonzero(weight, dim=1)
    assert packed.masks.shape == (outputs, -(-inputs // MASK_BITS))
    assert packed.masks.flags.c_contiguous
    assert packed.ptr.tolist() == (counts.cumsum(0) - counts).tolist()
    assert len(packed.values) == int(counts.sum()) + MASK_BITS
    assert packed.nbytes == 2 * packed.masks.size + 4 * len(packed.values) + 4 * outputs
    for row in range(outputs):
        kept = {16 * word + bit for word, mask in enumerate(packed.masks[row]) for bit in range(16) if mask >> bit & 1}
        assert kept == set(torch.nonzero(weight[row]).squeeze(1).tolist())


def test_padding_never_multiplies_what_the_row_does_not_keep() -> None:
    # 0 x inf is NaN: padding with another row's column would spread an infinity that a dense sum over zeros has too,
    # but a row without kept entries must have no padding at all.
    packed = GatherWeight.pack(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), group=8)
    assert packed.ptr.tolist() == [0, 0, 1]


def test_the_widest_weight() -> None:
    weight = torch.zeros(2, 65536)
    weight[0, 65535], weight[1, 0] = 1.0, 2.0
    assert torch.equal(GatherWeight.pack(weight, group=4).unpack(), weight)
    with pytest.raises(ValueError, match="reach 65536 inputs; given 65537"):
        GatherWeight.pack(torch.zeros(1, 65537), group=4)
    wider = torch.zeros(1, 65537)
    wider[0, 65536] = 3.0
    assert torch.equal(MaskWeight.pack(wider).unpack(), wider)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_widened(dtype: torch.dtype) -> None:
    weight = (torch.randn(7, 19) * (torch.rand(7, 19) < 0.5)).to(dtype)
    expected = without_negative_zeros(weight.float())
    assert torch.equal(GatherWeight.pack(weight, group=4).unpack(), expected)
    assert torch.equal(MaskWeight.pack(weight).unpack(), expected)


def test_views_and_parameters_pack() -> None:
    weight = without_negative_zeros(torch.randn(10, 14) * (torch.rand(10, 14) < 0.5))
    for view in (torch.nn.Parameter(weight), weight.t(), weight[1:, ::2]):
        assert torch.equal(GatherWeight.pack(view, group=4).unpack(), view)
        assert torch.equal(MaskWeight.pack(view).unpack(), view)


def test_what_is_no_matrix_is_explained() -> None:
    with pytest.raises(ValueError, match=r"a matrix \[outputs, inputs\]; given shape \(3,\)"):
        GatherWeight.pack(torch.ones(3), group=4)
    with pytest.raises(ValueError, match=r"a matrix \[outputs, inputs\]; given shape \(\)"):
        MaskWeight.pack(torch.tensor(1.0))
