"""Packing into pairs of rows and back, and how much the pairs share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecomp.patterns import rows
from sparsecomp.patterns.rows import RowWeight

SPECIAL = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.0, 1e-42)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def without_negative_zeros(weight: torch.Tensor) -> torch.Tensor:
    return torch.where(weight == 0, torch.zeros_like(weight), weight)


def random_weight(outputs: int, inputs: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    return weight * (torch.rand(outputs, inputs, generator=generator) < density)


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Any bits (NaN payloads, infinities, subnormals, both zeros), at any density, of ragged and empty sizes."""
    outputs, inputs = draw(st.integers(0, 21)), draw(st.integers(0, 37))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    raw = torch.randint(-(2**31), 2**31, (outputs, inputs), generator=generator).to(torch.int32)
    special = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (outputs, inputs), generator=generator)]
    kept = torch.rand(outputs, inputs, generator=generator) < draw(st.sampled_from([0.0, 0.05, 0.3, 0.6, 1.0]))
    chosen = torch.where(torch.rand(outputs, inputs, generator=generator) < 0.5, bits(special), raw)
    return torch.where(kept, chosen, 0).to(torch.int32).view(torch.float32)


CHUNKS = st.sampled_from([2, 4, 6, 16, 64])
BLOCKS = st.sampled_from([1, 3, 7, 16, 64])


@given(weights(), CHUNKS, BLOCKS)
def test_unpack_is_the_inverse_but_for_negative_zeros(weight: torch.Tensor, chunk: int, block: int) -> None:
    restored = RowWeight.pack(weight, chunk=chunk, block=block).unpack()
    assert restored.dtype == torch.float32
    assert torch.equal(bits(restored), bits(without_negative_zeros(weight)))


@given(weights(), CHUNKS, BLOCKS)
def test_the_arrays_cover_every_kept_entry_once(weight: torch.Tensor, chunk: int, block: int) -> None:
    packed = RowWeight.pack(weight, chunk=chunk, block=block)
    nonzeros = int(torch.count_nonzero(weight))
    assert len(packed.values) == nonzeros
    assert len(packed.columns) == nonzeros - packed.shared
    assert packed.nbytes == 4 * nonzeros + 2 * len(packed.columns) + 4 * 7 * len(packed.pairs)
    assert (packed.values.dtype, packed.columns.dtype) == (np.float32, np.uint16)
    assert packed.pairs.dtype == packed.rows.dtype == np.int32
    # Every place of values is read by one entry, and every place of columns by one, or by two that share it.
    pair, member, value_at, column_at = packed.entries()
    assert sorted(value_at.tolist()) == list(range(nonzeros))
    assert sorted(set(column_at.tolist())) == list(range(len(packed.columns)))
    assert len({*zip(pair.tolist(), member.tolist(), column_at.tolist(), strict=True)}) == nonzeros
    assert (packed.columns < block).all()


@given(weights(), CHUNKS, BLOCKS)
def test_the_pairs_of_a_block_are_sorted_by_the_lengths_of_their_lists(
    weight: torch.Tensor, chunk: int, block: int
) -> None:
    packed = RowWeight.pack(weight, chunk=chunk, block=block)
    at = 0
    for index in range(packed.chunks):
        count = -(-min(chunk, weight.shape[0] - index * chunk) // 2)
        for _ in range(packed.blocks):
            lengths = packed.pairs[at : at + count, 2:].tolist()
            assert lengths == sorted(lengths)
            at += count


@given(weights(), CHUNKS, BLOCKS)
def test_the_pairs_of_a_block_are_a_matching_of_its_rows(weight: torch.Tensor, chunk: int, block: int) -> None:
    packed = RowWeight.pack(weight, chunk=chunk, block=block)
    outputs, inputs = weight.shape
    assert packed.blocks == -(-inputs // block)
    at = 0
    for first in range(0, outputs, chunk):
        size = min(chunk, outputs - first)
        for _ in range(packed.blocks):
            mine = packed.rows[at : at + -(-size // 2)]
            # An odd number of rows leaves one that is paired with the spare row behind the chunk.
            assert sorted(mine.ravel().tolist()) == [*range(size), *([chunk] if size % 2 else [])]
            assert all(row != chunk for row in mine[:, 0]) or not weight[first : first + size].any()
            at += len(mine)
    assert at == len(packed.pairs) == len(packed.rows)


@given(weights(), CHUNKS, BLOCKS)
def test_the_fields_of_a_pair_follow_from_its_rows(weight: torch.Tensor, chunk: int, block: int) -> None:
    packed = RowWeight.pack(weight, chunk=chunk, block=block)
    values, columns = 0, 0
    for value, column, both, turns, left in packed.pairs.tolist():
        assert (value, column) == (values, columns)
        assert min(both, turns, left) >= 0
        values += 2 * both + 2 * turns + left
        columns += both + 2 * turns + left


def test_what_both_rows_keep_stands_once() -> None:
    weight = torch.tensor([[1.0, 2.0, 0.0, 3.0], [4.0, 0.0, 5.0, 6.0], [7.0, 0.0, 0.0, 0.0]])
    packed = RowWeight.pack(weight, chunk=4, block=4)
    assert packed.rows.tolist() == [[2, 4], [0, 1]]
    assert packed.pairs.tolist() == [[0, 0, 0, 0, 1], [1, 1, 2, 1, 0]]
    assert packed.values.tolist() == [7.0, 1.0, 4.0, 3.0, 6.0, 2.0, 5.0]
    assert packed.columns.tolist() == [0, 0, 3, 1, 2]
    assert packed.shared == 2


def test_the_fuller_row_comes_first() -> None:
    weight = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 3.0, 4.0, 0.0]])
    packed = RowWeight.pack(weight, chunk=2, block=5)
    assert packed.rows.tolist() == [[1, 0]]
    assert packed.pairs[0, 2:].tolist() == [0, 1, 2]
    assert packed.values.tolist() == [2.0, 1.0, 3.0, 4.0]


@pytest.mark.parametrize("density", [0.05, 0.2, 0.35])
def test_matched_rows_share_more_than_neighbours(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [random_weight(64, 96, density, seed) for seed in range(6)]
    matched = [RowWeight.pack(weight, chunk=64, block=48).shared for weight in tensors]
    monkeypatch.setattr(rows, "_MATCH_BELOW", 0.0)
    neighbours = [RowWeight.pack(weight, chunk=64, block=48).shared for weight in tensors]
    assert sum(matched) > sum(neighbours)


def test_rows_that_are_alike_find_each_other() -> None:
    support = random_weight(16, 64, 0.25)
    support[:, :8] = torch.eye(16)[:, :8] + torch.eye(16)[:, 8:]  # no row lies inside another
    weight = torch.cat([support, support * 2])[torch.randperm(32, generator=torch.Generator().manual_seed(3))]
    packed = RowWeight.pack(weight, chunk=32, block=64)
    assert 2 * packed.shared >= 0.9 * len(packed.values)
    assert torch.equal(packed.unpack(), without_negative_zeros(weight))


def test_matching_in_slabs_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(24, 100, 0.2)
    whole = RowWeight.pack(weight, chunk=24, block=10)
    monkeypatch.setattr(rows, "_OVERLAP_CELLS", 1)
    slabs = RowWeight.pack(weight, chunk=24, block=10)
    assert np.array_equal(whole.rows, slabs.rows)
    assert np.array_equal(whole.pairs, slabs.pairs)


def test_the_last_column_of_the_widest_block() -> None:
    weight = torch.zeros(3, 65537)
    weight[0, 65535], weight[1, 65536], weight[2, 0] = 1.0, 2.0, 3.0
    packed = RowWeight.pack(weight, chunk=4, block=65536)
    assert packed.columns.max() == 65535
    assert torch.equal(packed.unpack(), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_widened(dtype: torch.dtype) -> None:
    weight = random_weight(9, 13, 0.4).to(dtype)
    assert torch.equal(RowWeight.pack(weight, chunk=4, block=5).unpack(), without_negative_zeros(weight.float()))


def test_views_and_parameters_pack() -> None:
    weight = random_weight(10, 14, 0.4)
    for view in (torch.nn.Parameter(weight), weight.t(), weight[1:, ::2]):
        restored = RowWeight.pack(view, chunk=4, block=5).unpack()
        assert torch.equal(restored, without_negative_zeros(view.detach()))


@pytest.mark.parametrize(("chunk", "block"), [(0, 4), (3, 4), (-2, 4), (4, 0), (4, 65537)])
def test_sizes_out_of_range_are_explained(chunk: int, block: int) -> None:
    with pytest.raises(ValueError, match=rf"given chunk={chunk}, block={block}"):
        RowWeight.pack(torch.ones(4, 4), chunk=chunk, block=block)


def test_what_is_no_matrix_is_explained() -> None:
    with pytest.raises(ValueError, match=r"a matrix \[outputs, inputs\]; given shape \(2, 3, 4\)"):
        RowWeight.pack(torch.ones(2, 3, 4), chunk=2, block=4)
