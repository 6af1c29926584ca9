"""SparseGPT: masks by second-order cost, and the update of what is kept."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsecomp.patterns import Pattern
from sparsecomp.pruning.sparsegpt import DAMPING, sparsegpt
from sparsecomp.pruning.statistics import Statistics


def correlated(rows: int, inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, inputs // 2, generator=generator) @ torch.randn(inputs // 2, inputs, generator=generator)
    return mixed + 0.3 * torch.randn(rows, inputs, generator=generator)


def error(rows: Tensor, weight: Tensor, pruned: Tensor) -> float:
    return float((rows @ (weight - pruned).T).square().sum())


def test_inputs_that_do_not_correlate_give_the_magnitude_mask_and_no_update() -> None:
    weight = torch.randn(6, 16)
    for text in ("2:4", "2:1:4", "2x1@0.5", "unstructured@0.5"):
        pattern = Pattern.parse(text)
        mask, updated = sparsegpt(weight, pattern, Statistics.of(3 * torch.eye(16), gram=True))
        assert torch.equal(mask, pattern.mask(weight.square()))
        assert torch.equal(updated, weight * mask)


def test_the_update_for_one_dropped_column_is_the_least_squares_solution() -> None:
    rows, weight = correlated(200, 10).double(), torch.randn(4, 10).double()
    mask = torch.ones(4, 10, dtype=torch.bool)
    mask[:, 0] = False
    _, updated = sparsegpt(weight, Pattern.parse("unstructured@0.1"), Statistics.of(rows, gram=True), mask)
    gram = rows.T @ rows
    hessian = gram + DAMPING * gram.diagonal().mean() * torch.eye(10)
    # Minimise (w - v) H (w - v) over v with v_0 = 0.
    best = torch.linalg.solve(hessian[1:, 1:], (hessian @ weight.T)[1:]).T
    torch.testing.assert_close(updated[:, 1:], best)


@settings(max_examples=20)
@given(st.sampled_from(["2:4", "4:2:4", "4:2:4:8", "unstructured@0.6", "4x2@0.5"]), st.integers(0, 100))
def test_the_update_lowers_the_output_error_of_the_same_mask(text: str, seed: int) -> None:
    rows = correlated(300, 48, seed)
    weight = torch.randn(8, 48, generator=torch.Generator().manual_seed(seed + 1))
    mask, updated = sparsegpt(weight, Pattern.parse(text), Statistics.of(rows, gram=True))
    assert error(rows, weight, updated) < 0.9 * error(rows, weight, weight * mask)


@pytest.mark.parametrize("text", ["unstructured@0.7", "3x5@0.7"])
def test_windows_add_up_to_the_share(text: str) -> None:
    # 300 columns are more than two windows.
    weight, pattern = torch.randn(7, 300), Pattern.parse(text)
    mask, updated = sparsegpt(weight, pattern, Statistics.of(correlated(400, 300), gram=True))
    assert pattern.check(updated)
    blocks = 7 * 300 if text[0] == "u" else 3 * 60
    tall, wide = (1, 1) if text[0] == "u" else (3, 5)
    assert int(mask[::tall, ::wide].sum()) == round(0.3 * blocks)


def test_windows_do_not_matter_to_the_update() -> None:
    # The lazy update behind a window is the same sum: with float64 and a given mask, columns may be cut anywhere. These
    # patterns have one whole slice of columns, so that their order stays.
    rows, weight = correlated(500, 300).double(), torch.randn(3, 300).double()
    mask = torch.rand(3, 300) < 0.5
    statistics = Statistics.of(rows, gram=True)
    _, wide = sparsegpt(weight, Pattern.parse("125:250"), statistics, mask)
    _, narrow = sparsegpt(weight, Pattern.parse("100:200"), statistics, mask)
    torch.testing.assert_close(wide, narrow)


@settings(max_examples=20)
@given(st.sampled_from(["2:4", "4:2:4", "4:2:4:8", "unstructured@0.6", "4x2@0.5"]), st.integers(0, 100))
def test_where_columns_stand_does_not_matter(text: str, seed: int) -> None:
    # Slices that are chosen together are ordered by their costs, so that other places of them change nothing.
    pattern, step = (
        Pattern.parse(text),
        {"2:4": 4, "4:2:4": 4, "4:2:4:8": 8, "unstructured@0.6": 16, "4x2@0.5": 128}[text],
    )
    rows, generator = correlated(600, 3 * step, seed).double(), torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 3 * step, generator=generator).double()
    places = torch.arange(3 * step).reshape(3, step)[torch.randperm(3, generator=generator)].flatten()
    mask, updated = sparsegpt(weight, pattern, Statistics.of(rows, gram=True))
    moved, again = sparsegpt(weight[:, places], pattern, Statistics.of(rows[:, places], gram=True))
    assert torch.equal(moved, mask[:, places])
    torch.testing.assert_close(again, updated[:, places])


def test_what_costs_most_is_pruned_first() -> None:
    # The last columns matter most: pruned first, they leave others to make up for them.
    rows = correlated(500, 64) * torch.linspace(0.2, 3, 64)
    weight, statistics = torch.randn(16, 64), Statistics.of(rows, gram=True)
    mask, updated = sparsegpt(weight, Pattern.parse("2:4"), statistics)
    # One slice of columns, whose order stays.
    _, in_place = sparsegpt(weight, Pattern.parse("32:64"), statistics, mask)
    assert error(rows, weight, updated) < error(rows, weight, in_place)


def test_singular_inputs_are_damped() -> None:
    weight = torch.randn(4, 32)
    for rows in (torch.ones(10, 32), torch.zeros(10, 32), torch.cat([torch.randn(9, 16), torch.zeros(9, 16)], 1) * 1e4):
        mask, updated = sparsegpt(weight, Pattern.parse("2:4"), Statistics.of(rows, gram=True))
        assert torch.isfinite(updated).all()
        assert int(mask.sum()) == 64


def test_a_gram_matrix_that_rounding_made_indefinite_is_damped_more() -> None:
    statistics = Statistics.of(torch.ones(10, 8), gram=True)
    statistics.gram[0, 1] = statistics.gram[1, 0] = 15.0
    _, updated = sparsegpt(torch.randn(4, 8), Pattern.parse("2:4"), statistics)
    assert torch.isfinite(updated).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_of_the_weight_stays(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 8).to(dtype)
    _, updated = sparsegpt(weight, Pattern.parse("2:4"), Statistics.of(torch.randn(20, 8), gram=True))
    assert updated.dtype == dtype


def test_what_cannot_be_computed_is_an_error() -> None:
    statistics = Statistics.of(torch.randn(20, 8), gram=True)
    bad = torch.randn(4, 8)
    bad[1, 1] = math.nan
    with pytest.raises(ValueError, match="the weight holds NaN"):
        sparsegpt(bad, Pattern.parse("2:4"), statistics)
    statistics.gram[0, 0] = math.inf
    with pytest.raises(ValueError, match="cannot be factorised"):
        sparsegpt(torch.randn(4, 8), Pattern.parse("2:4"), statistics)
