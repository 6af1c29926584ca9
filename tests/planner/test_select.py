from __future__ import annotations

from dataclasses import replace

import pytest

from sparsecomp import Plan
from sparsecomp.planner import Option, Prediction, SiteChoice, Summary
from sparsecomp.planner.pricing import with_gain
from sparsecomp.targets.base import DENSE, Candidate

ROWS = Candidate("rows", "unstructured")


def site(name: str, *options: tuple[str, float, float]) -> SiteChoice:
    """A dense site of 100 us with options `(pattern, us, loss)`."""
    kept = Option("", DENSE, 100.0, 0.0)
    return SiteChoice(
        name,
        (64, 32),
        128,
        1.0,
        DENSE,
        "dense",
        predictions=(Prediction(DENSE, 100.0, 8192),),
        options=(kept, *(Option(prune, ROWS, us, loss) for prune, us, loss in options)),
    )


def plan() -> Plan:
    """Two sites of 100 us in a model of 300."""
    sites = [
        site("a", ("unstructured@0.5", 80, 0.01), ("unstructured@0.9", 20, 0.5)),
        site("b", ("unstructured@0.5", 70, 0.02), ("unstructured@0.9", 10, 0.9)),
    ]
    return Plan("fake", sites, summary=Summary(300.0, 100.0, 300.0, "distance", 0.0))


def prunes(chosen: Plan) -> list[str]:
    return [choice.prune for choice in chosen]


def test_a_quality_budget_gives_the_fastest_plan() -> None:
    chosen = plan().replan(max_quality_loss=0.03)
    assert prunes(chosen) == ["unstructured@0.5", "unstructured@0.5"]
    assert chosen.summary is not None
    assert (chosen.summary.planned_us, chosen.summary.speedup) == (250, 1.2)
    assert chosen.summary.estimated_loss == pytest.approx(0.03)
    assert prunes(plan().replan(max_quality_loss=0.02)) == ["", "unstructured@0.5"]


def test_a_quality_budget_under_which_nothing_can_be_pruned_names_the_least() -> None:
    with pytest.raises(ValueError) as error:
        plan().replan(max_quality_loss=0.005)
    assert str(error.value) == (
        "under a loss of at most 0.005 no layer can be pruned: the least that is estimated to gain anything loses "
        "0.01, for 280 us instead of 300 us"
    )
    assert prunes(plan().replan(max_quality_loss=0.01)) == ["unstructured@0.5", ""]


def test_a_latency_budget_gives_the_best_plan() -> None:
    chosen = plan().replan(max_latency="200 us")
    assert prunes(chosen) == ["unstructured@0.9", "unstructured@0.5"]
    assert [choice.chosen for choice in chosen] == [ROWS, ROWS]
    assert prunes(plan().replan(speedup=1.5)) == prunes(chosen)
    assert prunes(plan().replan(speedup=1.0)) == ["", ""]
    assert chosen.budget is not None
    assert chosen.sites[0].reason == (
        "rows[unstructured]: pruned to unstructured@0.9, 20 us instead of 100 us for an estimated loss of 0.5"
    )


def test_what_cannot_be_reached_names_the_best() -> None:
    with pytest.raises(ValueError) as error:
        plan().replan(speedup=3)
    message = str(error.value)
    assert "a speed-up of 3 cannot be reached" in message
    assert "take 130 us (2.31 times as fast as the dense model's 300 us) at an estimated loss of 1.4" in message
    assert "100 us are spent outside" in message


def test_a_plan_without_options_cannot_be_planned_again() -> None:
    with pytest.raises(ValueError, match="holds no options"):
        Plan("fake", [replace(site("a"), options=())]).replan(speedup=2)


def test_the_calls_of_one_module_are_one_choice() -> None:
    options = (("unstructured@0.5", 60, 0.1), ("unstructured@0.9", 20, 0.5))
    twice = replace(plan(), sites=[site("a", *options), site("a#2", *options), site("b", ("2:4", 90, 0.4))])
    twice = replace(twice, summary=Summary(300.0, 0.0, 300.0, "distance", 0.0))
    chosen = twice.replan(max_quality_loss=0.4)
    assert prunes(chosen) == ["unstructured@0.5", "unstructured@0.5", ""]
    assert chosen.summary is not None
    assert chosen.summary.planned_us == 220
    assert chosen.summary.estimated_loss == pytest.approx(0.1)
    odd = replace(twice, sites=[site("a", *options), site("a#2", ("2:4", 60, 0.1))])
    with pytest.raises(ValueError, match="'a' in the plan offer different options"):
        odd.replan(speedup=1.1)


def test_the_front_is_a_front_and_keeps_both_ends() -> None:
    front = plan().pareto()
    costs = [point.us for point in front]
    losses = [point.loss for point in front]
    assert costs == sorted(set(costs))
    assert losses == sorted(set(losses), reverse=True)
    assert (costs[0], losses[0]) == (130, pytest.approx(1.4))
    assert (costs[-1], losses[-1]) == (300, 0.0)
    assert {point.us for point in front} >= {190.0, 250.0}
    for point in front:
        assert point.plan.summary is not None
        assert point.plan.summary.planned_us == point.us
    assert "2.31" in str(front)


@pytest.mark.parametrize(("measured", "gain"), [(96.0, 1.2), (147.0, 0.9), (1000.0, 0.5)])
def test_the_fastest_choice_takes_what_it_was_measured_to_take(measured: float, gain: float) -> None:
    corrected = with_gain(plan(), lambda _: measured)
    assert corrected.summary is not None
    assert corrected.summary.gain == pytest.approx(gain)
    front = corrected.pareto()
    assert front.points[0].us == pytest.approx(300 - gain * (300 - 130))
    assert front.points[-1].us == pytest.approx(300)
    for point in front:  # a latency budget is of the corrected latency
        chosen = corrected.replan(max_latency=1e-6 * point.us * (1 + 1e-9)).summary
        assert chosen is not None
        assert chosen.estimated_loss == pytest.approx(point.loss)


def test_a_front_has_two_points_at_least() -> None:
    with pytest.raises(ValueError, match="at least 2 points, asked for 1"):
        plan().pareto(1)
    assert len(plan().pareto(2)) == 2


def test_the_picture_shows_the_front_and_the_plan() -> None:
    pytest.importorskip("matplotlib", reason="pip install 'sparsecomp[plot]'")
    chosen = plan().replan(speedup=1.5)
    axes = chosen.pareto().plot()
    curve, own = axes.get_lines()[:2]
    assert list(curve.get_xdata()) == [point.us / 1e3 for point in chosen.pareto()]
    assert list(own.get_xdata()) == [0.19]
    assert "distance" in axes.get_ylabel()


def test_a_picture_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"sparsecomp\[plot\]"):
        plan().pareto().plot()


def test_it_prints_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # narrower ones fold the cells
    text = str(plan().replan(max_latency="200 us"))
    assert "2 of 2 sites are pruned under a latency of at most 200 us" in text
    assert "(1.58 times as fast)" in text
    assert "loss (distance): estimated 0.52" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("a "))
    assert " ".join(row.split()) == "a 32 to 64 128 unstructured@0.9 rows[unstructured] 20 / 100 0.5"
    assert "0 of 0 sites" in str(Plan("fake"))
