"""The benchmarks' helpers: turns, ratios and verdicts. No test looks at a clock's value."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from timing import Results, Row, Timings, interleave


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    timings = interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, warmup=0, sample_us=0.0
    )
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert {name: len(times) for name, times in timings.samples.items()} == {"a": 4, "b": 4}


def test_short_calls_are_repeated() -> None:
    counts: Counter[str] = Counter()
    interleave({"a": lambda: counts.update("a")}, rounds=2, warmup=0, sample_us=20_000.0)
    assert counts["a"] > 20


def test_a_ratio_is_taken_within_rounds() -> None:
    # The machine was ten times slower in the second round: the ratio of medians would not be 2.
    timings = Timings({"fast": [1.0, 10.0, 1.0], "slow": [2.0, 20.0, 2.0]})
    assert timings.speedup("fast", over="slow") == 2.0
    assert timings.median("slow") == 2.0


def test_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="candidates"):
        interleave({})


@pytest.mark.parametrize(
    ("value", "goal", "at_most", "verdict"),
    [(2.0, 1.5, False, "reached"), (1.0, 1.5, False, "missed"), (1.0, 1.5, True, "reached"), (1.0, None, False, "")],
)
def test_verdict(value: float, goal: float | None, at_most: bool, verdict: str) -> None:
    assert Row("case", value, "x", goal, at_most=at_most).verdict == verdict


def test_results_are_written(tmp_path: Path) -> None:
    import write_results

    results = Results("example", notes=["how"])
    results.add(Row("one", 2.0, "x", 1.5, details={"us": 1234.5, "kernel": "rows[2:4]"}))
    content = json.loads(results.finish(tmp_path).read_text())
    assert content["rows"][0]["verdict"] == "reached"
    assert content["machine"]["cores"] >= 1
    page = write_results.section(content)
    assert "| one | 2 | x | >= 1.5 | reached | us 1234, kernel rows[2:4] |" in page
