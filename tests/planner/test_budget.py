from __future__ import annotations

from typing import Any

import pytest

from sparsecomp.planner.budget import Budget


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("8 ms", 0.008), ("800us", 8e-4), (" .5 S ", 0.5), ("1.25 ms", 0.00125), (0.25, 0.25), (2, 2)],
)
def test_latencies_are_texts_with_a_unit_or_seconds(given: float | str, seconds: float) -> None:
    budget = Budget.of(None, given, None)
    assert budget.kind == "max_latency"
    assert budget.value == pytest.approx(seconds)


def test_every_kind_reads_as_a_sentence() -> None:
    assert str(Budget.of(None, "8 ms", None)) == "latency of at most 8 ms"
    assert str(Budget.of(0.02, None, None)) == "loss of at most 0.02"
    assert str(Budget.of(None, None, 2)) == "speed-up of 2"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None, None), "exactly one of max_quality_loss, max_latency, speedup; given none"),
        ((0.1, None, 2.0), "given max_quality_loss, speedup"),
        ((None, "8", None), "'8 ms', given '8'"),
        ((None, "fast", None), "given 'fast'"),
        ((None, "-3 ms", None), "given '-3 ms'"),
        ((-0.1, None, None), "max_quality_loss must be a number from 0 on, given -0.1"),
        ((float("nan"), None, None), "given nan"),
        ((None, None, 0.5), "speedup must be a number from 1 on, given 0.5"),
        ((None, None, float("inf")), "given inf"),
        ((None, None, "twice"), "given 'twice'"),
        ((True, None, None), "given True"),
    ],
)
def test_what_is_no_budget_is_refused(given: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Budget.of(*given)
    assert message in str(error.value)
