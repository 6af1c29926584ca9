"""VENOM's two levels: the choice of a panel's columns, and of the entries of its rows among them."""

from __future__ import annotations

import itertools
import math

import models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsecomp.patterns import Pattern, groups
from sparsecomp.patterns.venom import closed_entries, venom_mask


def scores(rows: int, columns: int, seed: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 11), st.integers(1, 21), st.integers(2, 5), st.integers(0, 1000))
def test_panels_choose_their_columns_and_rows_their_best_of_them(rows: int, columns: int, v: int, seed: int) -> None:
    score = scores(rows, columns, seed)
    mask = venom_mask(score, v, 2, 4, 7)
    for top, left in itertools.product(range(0, rows, v), range(0, columns, 7)):
        group, kept = score[top : top + v, left : left + 7], mask[top : top + v, left : left + 7]
        length = group.shape[1]
        n, k = (math.ceil(count * length / 7) for count in (2, 4))
        assert (kept.sum(1) == n).all()
        chosen = kept.any(0)
        assert int(chosen.sum()) <= k
        best = max(
            float(group[:, list(some)].topk(n, dim=1).values.sum()) for some in itertools.combinations(range(length), k)
        )
        # The bound of a greedy choice; what it really reaches is far nearer to the best.
        assert (1 - 1 / math.e) * best - 1e-6 <= float(group[kept].sum()) <= best + 1e-6
        for row, keeps in zip(group, kept, strict=True):
            others = row[chosen & ~keeps]
            assert not len(others) or others.max() <= row[keeps].min()


def test_a_column_counts_by_what_it_adds_to_the_rows() -> None:
    # Columns 0 and 1 are the largest, but the rows that they serve keep one entry only; columns 0 and 2 serve all rows.
    score = torch.tensor([[9.0, 8.0, 0.0, 0.0], [9.0, 8.0, 0.0, 0.0], [0.0, 0.0, 3.0, 1.0]])
    assert venom_mask(score, 3, 1, 2, 4).int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]


def test_on_a_real_weight_it_keeps_nearly_the_most() -> None:
    model, _ = models.minilm()
    score = model.encoder.layer[2].attention.self.query.weight.detach().square()
    kept = float(score[venom_mask(score, 16, 2, 4, 8)].sum())
    panels = score.unflatten(0, (-1, 16)).unflatten(2, (-1, 8))
    sets = [panels[..., list(some)] for some in itertools.combinations(range(8), 4)]
    best = float(torch.stack([some.topk(2, dim=3).values.sum((1, 3)) for some in sets]).amax(0).sum())
    columns = groups.spread(groups.top_of_groups(groups.block_scores(score, 16, 1), 4, 8), 16, 1, (384, 384))
    by_sums = float(score[groups.top_of_groups(score.masked_fill(~columns, -1), 2, 8) & columns].sum())
    assert 0.999 * best < kept < 1.00001 * best
    assert kept > 1.005 * by_sums


def test_equal_and_infinite_scores_have_an_order() -> None:
    assert venom_mask(torch.ones(4, 8), 4, 2, 4, 8).int().tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]] * 4
    score = torch.zeros(2, 8)
    score[0, 5], score[1, 6], score[:, 0] = math.inf, math.inf, -math.inf
    mask = venom_mask(score, 2, 2, 4, 8)
    assert mask[0, 5]
    assert mask[1, 6]
    assert not mask[:, 0].any()
    assert mask.sum(1).tolist() == [2, 2]


@settings(max_examples=20)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 100))
def test_a_score_in_parts_gives_the_same_mask(rows: int, columns: int, seed: int) -> None:
    score = scores(rows, columns, seed)
    whole = venom_mask(score, 2, 1, 2, 4)
    parts = [venom_mask(part, 2, 1, 2, 4) for part in score.split(2)]
    assert whole.shape == score.shape
    assert torch.equal(whole, torch.cat(parts))


def test_the_measure_counts_rows_and_panels_that_hold_too_much() -> None:
    pattern = Pattern.parse("2:1:2:4")
    weight = torch.tensor([[1.0, 0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    fit = pattern.measure(weight)
    # Two inputs are left at the end: a panel chooses one of them, and the first row keeps two.
    assert (fit.violations, fit.slots, fit.nonzeros) == (2, 8, 5)
    assert pattern.check(weight[:, :4])
    assert pattern.measure(torch.ones(2, 4)).violations == 3


def test_closed_entries_are_those_of_columns_that_no_row_of_the_panel_keeps() -> None:
    mask = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]).bool()
    assert closed_entries(mask, 2).int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]]
