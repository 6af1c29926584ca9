"""Criteria that score: magnitude, Wanda, RIA."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsecomp.patterns import Pattern
from sparsecomp.pruning.criterion import CRITERIA, choose_per_row, criterion_named
from sparsecomp.pruning.ria import ria
from sparsecomp.pruning.statistics import Statistics, balanced
from sparsecomp.pruning.wanda import wanda

PATTERNS = (
    *(
        "unstructured@0.3",
        "unstructured@0.8",
        "2:4",
        "3:5",
        "4:2:4",
        "32:1:8",
        "4:2:4:8",
        "4x1@0.5",
        "3x7@0.6",
        "dense",
    ),
    *("taps:2:4", "3:taps:2:5"),
)


def of_norms(*norms: float) -> Statistics:
    return Statistics.of(torch.diag(torch.tensor(norms)), gram=True)


@pytest.mark.parametrize("name", list(CRITERIA))
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("shape", [(12, 40), (9, 13), (1, 5)])
def test_every_criterion_works_for_every_pattern(name: str, text: str, shape: tuple[int, int]) -> None:
    weight, pattern = torch.randn(shape), Pattern.parse(text)
    pruned = CRITERIA[name].prune(weight, pattern, Statistics.of(torch.randn(50, shape[1]), gram=True))
    result = weight * pruned.mask if pruned.weight is None else pruned.weight
    assert pattern.check(result)
    assert not (result * ~pruned.mask).any()
    # As many entries as by magnitude: nothing is dropped that the pattern allows.
    kept, allowed = int(pruned.mask.sum()), int(pattern.mask(weight.abs()).sum())
    # Blocks and taps at the edge have fewer entries.
    assert abs(kept - allowed) <= (21 if pattern.kind in ("block", "taps") else 0)


def test_wanda_weighs_by_the_norm_of_the_input() -> None:
    score = wanda(torch.tensor([[1.0, -3.0, 2.0]]), of_norms(4.0, 1.0, 2.0))
    torch.testing.assert_close(score, torch.tensor([[16.0, 9.0, 16.0]]) / 16)
    assert wanda(torch.ones(1, 3).half(), of_norms(1, 1, 1)).dtype == torch.float32
    assert wanda(torch.ones(1, 3).double(), of_norms(1, 1, 1)).dtype == torch.float64
    assert wanda(torch.ones(1, 2), of_norms(0.0, 0.0)).tolist() == [[0.0, 0.0]]


def test_wanda_ranks_entries_alone_by_other_norms_than_panels() -> None:
    # The first input is larger in the long row, the second in most of the rows, and so by rows of one length.
    rows = torch.tensor([[100.0, 1.0]] + [[0.1, 1.0]] * 5)
    known, weight = Statistics.of(balanced(rows), gram=False), torch.ones(2, 2)
    assert known.norms[0] > known.norms[1]
    assert known.tail_norms[0] < known.tail_norms[1]
    alone, panel = (CRITERIA["wanda"].prune(weight, Pattern.parse(text), known).mask for text in ("1:2", "2:1:2"))
    assert alone.tolist() == [[False, True]] * 2
    assert panel.tolist() == [[True, False]] * 2


def test_wanda_takes_the_same_share_of_every_row() -> None:
    weight = torch.arange(1.0, 65.0).reshape(8, 8)
    pruned = CRITERIA["wanda"].prune(weight, Pattern.parse("unstructured@0.5"), of_norms(*[1.0] * 8))
    assert pruned.mask.sum(1).tolist() == [4] * 8
    assert pruned.mask[:, 4:].all()


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 0.99))
def test_rows_together_keep_the_share_of_the_pattern(rows: int, cols: int, share: float) -> None:
    pattern = Pattern("unstructured", sparsity=share)
    score = torch.rand(rows, cols)
    mask = choose_per_row(score, pattern)
    counts = mask.sum(1)
    assert int(counts.sum()) == int(pattern.mask(score).sum())
    assert int(counts.max() - counts.min()) <= 1
    for row in range(rows):
        kept, dropped = score[row][mask[row]], score[row][~mask[row]]
        assert not len(kept) or not len(dropped) or kept.min() >= dropped.max()


def test_ria_weighs_by_shares_of_row_and_column() -> None:
    weight = torch.tensor([[1.0, -3.0], [1.0, 1.0]])
    norms = torch.tensor([1.0, 0.25])
    expected = (torch.tensor([[0.25 + 0.5, 0.75 + 0.75], [0.5 + 0.5, 0.5 + 0.25]]) * norms.sqrt()) ** 2
    torch.testing.assert_close(ria(weight, of_norms(1.0, 0.25)), expected)
    assert torch.isfinite(ria(torch.zeros(2, 2), of_norms(0.0, 0.0))).all()


def test_ria_keeps_a_channel_of_small_weights() -> None:
    weight = torch.rand(8, 8) + 1.0
    weight[3] *= 1e-3
    weight[3, 2] *= 20
    pattern, same = Pattern.parse("unstructured@0.5"), of_norms(*[1.0] * 8)
    assert not CRITERIA["magnitude"].prune(weight, pattern, None).mask[3].any()
    assert CRITERIA["ria"].prune(weight, pattern, same).mask[3].any()


def group_errors(weight: Tensor, rows: Tensor, columns: list[int]) -> float:
    return float((rows[:, columns] @ weight[:, columns].T).square().sum())


def test_the_saliency_of_a_group_decides_for_a_panel() -> None:
    # One row of four wants column 0 much, all want column 1 a little: together they lose more by dropping column 1.
    weight = torch.tensor([[3.0, 2.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    rows = torch.eye(2)
    assert group_errors(weight, rows, [1]) > group_errors(weight, rows, [0])
    for name in ("wanda", "sparsegpt"):
        pruned = CRITERIA[name].prune(weight, Pattern.parse("4:1:2"), Statistics.of(rows, gram=True))
        assert pruned.mask.tolist() == [[False, True]] * 4


@pytest.mark.parametrize(("name", "message"), [("wnada", "did you mean 'wanda'"), ("best", "one of magnitude, wanda")])
def test_unknown_criteria_name_the_known_ones(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        criterion_named(name)
