"""Thresholds reach their rates, and the scales that the papers give lose less where they should."""

from __future__ import annotations

import pytest
import tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsecomp.skipping.scores import RATES, Scores, ffn_scores, input_scores
from sparsecomp.skipping.sites import InputGroup, find_ffns


def _inputs(spread: float = 1.0, seed: int = 0) -> tuple[InputGroup, torch.Tensor]:
    """Two linears whose columns differ in size, and inputs for them."""
    torch.manual_seed(seed)
    linears = (nn.Linear(24, 16, bias=False), nn.Linear(24, 8, bias=False))
    with torch.no_grad():
        for linear in linears:
            linear.weight.mul_(torch.logspace(0, spread, 24))
    return InputGroup(("a", "b"), linears), torch.randn(256, 24)


@settings(max_examples=20)
@given(st.sampled_from(RATES), st.integers(0, 3))
def test_a_threshold_drops_its_share(rate: float, seed: int) -> None:
    group, sample = _inputs(seed=seed)
    choices = input_scores(group, sample, rate).choices(rate)
    assert [choice.site for choice in choices] == ["a", "b"]
    assert choices[0].expected == pytest.approx(rate, abs=1 / 256)
    # The same entries are skipped for all of the group.
    assert choices[0].threshold == choices[1].threshold


def test_column_norms_are_taken_where_columns_differ() -> None:
    group, sample = _inputs(spread=2.0)
    found = input_scores(group, sample, 0.5)
    assert found.scale is not None
    plain = Scores(found.names, "input", sample, sample, found.matrix, None, 1)
    assert found.error(0.5) < 0.5 * plain.error(0.5)


def test_errors_grow_from_nothing_to_all() -> None:
    group, sample = _inputs()
    found = input_scores(group, sample, 0.5)
    errors = found.errors()
    assert errors[0] == 0.0
    assert errors == sorted(errors)
    # Independent inputs: the sum of squares is the square of the sum, in the mean.
    at = RATES.index(0.5)
    assert errors[at] == pytest.approx(found.error(0.5), rel=0.1)


def test_gates_of_small_up_projections_are_dropped_first() -> None:
    model = tiny.llama(1)
    (ffn,) = find_ffns(model)
    gate = torch.randn(512, 64)
    up = torch.randn(512, 64) * torch.logspace(-2, 0, 64)
    found = ffn_scores(ffn, (gate, gate * up), 0.5)
    (choice,) = found.choices(0.5)
    assert isinstance(choice.threshold, torch.Tensor)
    assert choice.scale is None
    assert choice.threshold[0] > 10 * choice.threshold[-1]
    kept = gate.abs() > choice.threshold
    assert float(kept.float().mean()) == pytest.approx(0.5, abs=0.01)


def test_exact_zeros_are_dropped_at_no_loss() -> None:
    group, sample = _inputs()
    sample = sample.relu()
    found = input_scores(group, sample, 0.3)
    assert found.error(0.3) == 0.0
    assert found.choices(0.3)[0].expected >= 0.45
