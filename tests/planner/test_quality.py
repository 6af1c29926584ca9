from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparsecomp.planner.quality import describe, loss_of
from sparsecomp.pruning.calibration import Call

CALL = Call((), {})


def test_logits_are_compared_by_the_divergence_per_token() -> None:
    dense, pruned = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = dense.softmax(-1), pruned.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean().item()
    given = loss_of(None, CALL, SimpleNamespace(logits=dense), {"logits": pruned})
    assert given == pytest.approx(expected, rel=1e-5)
    assert describe(None, {"logits": dense}) == "KL divergence per token"


def test_vectors_are_compared_by_their_cosine() -> None:
    dense = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    pruned = torch.tensor([[0.0, 3.0], [0.0, 1.0]])
    assert loss_of(None, CALL, dense, pruned) == pytest.approx(0.5)
    assert loss_of(None, CALL, (torch.ones(2, dtype=torch.int64), dense), (None, dense)) == pytest.approx(0, abs=1e-6)
    assert describe(None, {"last_hidden_state": dense}) == "1 - mean cosine of last_hidden_state"


def test_masked_positions_do_not_count() -> None:
    dense, pruned = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    before = loss_of(None, Call((), {"attention_mask": mask}), dense, pruned)
    pruned[mask == 0] = 100.0
    assert loss_of(None, Call((), {"attention_mask": mask}), dense, pruned) == before


def test_the_user_may_say_what_counts() -> None:
    def distance(dense: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
        return (dense - pruned).abs().max()

    assert loss_of(distance, CALL, torch.zeros(3), torch.full((3,), 2.0)) == 2
    assert describe(distance, None) == "distance"


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="NoneType without a floating-point tensor to compare: pass quality="):
        describe(None, None)
    with pytest.raises(ValueError, match="nan, not a finite number"):
        loss_of(None, CALL, torch.ones(2, 2), torch.full((2, 2), float("nan")))
