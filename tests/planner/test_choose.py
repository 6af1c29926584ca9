from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fakes import ROWS, FakeTarget
from torch import Tensor

from sparsecomp import Options, Pattern, Plan
from sparsecomp.planner import SiteChoice, choose
from sparsecomp.targets.base import DENSE, Candidate, Problem, WeightFacts


def pruned(pattern: str, shape: tuple[int, int] = (64, 32)) -> Tensor:
    return Pattern.parse(pattern).project(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def facts_of(pattern: str) -> WeightFacts:
    return WeightFacts.of(pruned(pattern))


def decide(
    pattern: str,
    target: FakeTarget | None = None,
    *,
    tokens: int = 128,
    measured: dict[Candidate, float] | None = None,
    plan: Plan | None = None,
    patterns: tuple[str, ...] | None = None,
) -> SiteChoice:
    facts = facts_of(pattern)
    options = Options(plan=plan, patterns=patterns)
    problem = Problem(facts, tokens, 1)
    return choose(facts, problem, target or FakeTarget(), options, name="layer", measured=measured)


def test_the_cheapest_wins_with_its_reason() -> None:
    choice = decide("unstructured@0.9")
    assert choice.chosen == ROWS
    assert choice.reason == (
        "rows[unstructured]: predicted 100 us against dense 500 us (5.0 times as fast, density 0.10)"
    )
    assert choice.dense_us == 500
    assert choice.chosen_us == pytest.approx(100, rel=0.01)
    assert choice.shape == (64, 32)
    assert choice.predictions[0].candidate == DENSE


def test_dense_wins_with_the_best_sparse_in_the_reason() -> None:
    choice = decide("unstructured@0.25")
    assert choice.chosen == DENSE
    assert choice.reason == (
        "dense: best sparse candidate rows[unstructured] predicted 750 us against dense 500 us (density 0.75)"
    )


@pytest.mark.parametrize(("dense_us", "sparse"), [(510.0, False), (524.0, False), (526.0, True)])
def test_a_sparse_kernel_must_win_by_the_margin(dense_us: float, sparse: bool) -> None:
    choice = decide("unstructured@0.5", FakeTarget(us=1000, dense_us=dense_us))
    assert choice.chosen.is_dense is not sparse
    assert ("a gain below 5%" in choice.reason) is not sparse


def test_a_full_weight_stays_dense() -> None:
    choice = decide("dense", FakeTarget(us=0.0))
    assert choice.chosen == DENSE
    assert choice.reason == "dense: the weight has no zeros"


def test_the_option_patterns_restricts() -> None:
    choice = decide("2:4", patterns=("32:2:4",))
    assert choice.chosen == DENSE
    assert "no kernel among patterns=['32:2:4']" in choice.reason
    assert "satisfies" in choice.reason
    assert "2:4" in choice.reason


def test_what_cannot_take_the_problem_is_left_out() -> None:
    target = FakeTarget()
    target.overhead["rows"] = float("inf")
    choice = decide("unstructured@0.9", target)
    assert [item.candidate for item in choice.predictions] == [DENSE]
    assert choice.chosen == DENSE


def test_measurements_go_before_the_model() -> None:
    choice = decide("unstructured@0.9", measured={DENSE: 90.0, ROWS: 100.0})
    assert choice.chosen == DENSE
    assert "measured 100 us against dense 90 us" in choice.reason
    assert choice.dense_us == 90.0
    won = decide("unstructured@0.25", measured={DENSE: 90.0, ROWS: 10.0})
    assert won.chosen == ROWS


def test_a_candidate_without_a_measurement_cannot_win() -> None:
    choice = decide("2:4", FakeTarget(us=2.0, dense_us=500.0), measured={DENSE: 500.0, ROWS: 400.0})
    assert choice.chosen == ROWS


def asked(candidate: Candidate, **changes: object) -> Plan:
    entry = SiteChoice("layer", (64, 32), 128, 0.5, candidate, "by hand")
    return Plan("fake", [replace(entry, **changes)])  # type: ignore[arg-type]


def test_a_plan_forces_dense_and_sparse() -> None:
    dense = decide("unstructured@0.9", plan=asked(DENSE))
    assert (dense.chosen, dense.reason) == (DENSE, "dense: the plan says so")
    sparse = decide("unstructured@0.25", plan=asked(ROWS))
    assert sparse.chosen == ROWS
    assert sparse.reason.startswith("rows[unstructured]: the plan says so")
    assert sparse.chosen_us == 750


def test_a_plan_goes_before_the_option_patterns() -> None:
    choice = decide("unstructured@0.9", plan=asked(ROWS), patterns=("2:4",))
    assert choice.chosen == ROWS
    assert choice.prediction(ROWS) is not None


def test_a_plan_is_not_followed_where_the_weight_does_not_satisfy_it() -> None:
    choice = decide("unstructured@0.9", plan=asked(Candidate("panel", "32:2:4")))
    assert choice.chosen == ROWS
    assert choice.reason.startswith("the plan asks for panel[32:2:4], but the weight does not satisfy 32:2:4; rows[")


def test_blocks_in_a_plan_are_for_weights_of_such_blocks() -> None:
    plan = asked(Candidate("panel", "16x1"))
    choice = decide("unstructured@0.25", plan=plan)
    assert choice.chosen == DENSE
    assert choice.reason.startswith("the plan asks for panel[16x1], but the weight does not satisfy 16x1; dense: ")
    assert "which target fake does not offer" in decide("16x1@0.5", plan=plan).reason
    assert "which target fake does not offer" in decide("32:2:4", plan=plan).reason


def test_a_plan_for_another_weight_is_not_followed() -> None:
    choice = decide("unstructured@0.25", plan=asked(ROWS, shape=(32, 64)))
    assert choice.chosen == DENSE
    assert "is for a weight of 64 to 32, not 32 to 64" in choice.reason


def test_a_plan_asks_for_a_kernel_that_is_not_there() -> None:
    choice = decide("unstructured@0.9", plan=asked(Candidate("wheels", "unstructured")))
    assert choice.chosen == ROWS
    assert "which target fake does not offer" in choice.reason


def test_params_in_a_plan_are_a_wish() -> None:
    plan = asked(Candidate("panel", "8:2:4", (("v", 64),)))
    assert decide("8:2:4", plan=plan).chosen == Candidate("panel", "8:2:4", (("v", 8),))


def test_at_other_numbers_of_tokens_a_plan_fixes_the_pattern() -> None:
    assert decide("unstructured@0.9", plan=asked(ROWS), tokens=1).chosen == ROWS
    choice = decide("unstructured@0.25", plan=asked(ROWS), tokens=1)
    assert choice.chosen == DENSE
    assert "the plan asks for rows[unstructured] at 128 tokens; at 1" in choice.reason
    assert decide("unstructured@0.25", plan=asked(ROWS, tokens=0), tokens=1).chosen == ROWS
    assert decide("unstructured@0.9", plan=asked(DENSE), tokens=1).chosen == DENSE


def test_other_sites_of_a_plan_do_not_matter() -> None:
    assert decide("unstructured@0.9", plan=asked(DENSE, name="other")).chosen == ROWS
