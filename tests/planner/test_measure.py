from __future__ import annotations

import torch
from fakes import ROWS, FakeTarget
from torch._subclasses import FakeTensorMode

from sparsecomp.planner import measure
from sparsecomp.targets.base import DENSE, Problem, WeightFacts


def test_measures_candidates_and_dense() -> None:
    weight = torch.randn(16, 8)
    target = FakeTarget()
    problem = Problem(WeightFacts.of(weight), 4, 1)
    before = torch.random.get_rng_state()
    times = measure([DENSE, ROWS], weight, problem, target, rounds=5)
    assert set(times) == {DENSE, ROWS}
    assert all(us > 0 for us in times.values())
    assert target.prepared == [ROWS]
    assert target.runs == 6  # one to warm up
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_budget_ends_the_rounds() -> None:
    weight = torch.randn(16, 8)
    target = FakeTarget()
    measure([ROWS], weight, Problem(WeightFacts.of(weight), 4, 1), target, rounds=1000, budget_s=0.0)
    assert target.runs == 4


def test_runs_for_real_under_fake_tensors_and_in_bfloat16() -> None:
    weight = torch.randn(16, 8, dtype=torch.bfloat16)
    problem = Problem(WeightFacts.of(weight), 4, 1, dtype=torch.bfloat16)
    with FakeTensorMode():
        times = measure([ROWS], weight, problem, FakeTarget(), rounds=3)
    assert set(times) == {DENSE, ROWS}
