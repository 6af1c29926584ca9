from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecomp import Plan
from sparsecomp.planner import Budget, Option, PlanError, Prediction, SiteChoice, Summary
from sparsecomp.planner.reader import MAX_BYTES
from sparsecomp.targets.base import DENSE, Candidate
from sparsecomp.window import Maps, Window

PANEL = Candidate("panel", "32:2:4", (("tile", 6), ("v", 32)))


def site(name: str = "encoder.0", tokens: int = 128, chosen: Candidate = PANEL) -> SiteChoice:
    return SiteChoice(
        name=name,
        shape=(3072, 768),
        tokens=tokens,
        density=0.5,
        chosen=chosen,
        reason="panel[32:2:4]: because",
        dtype="bfloat16",
        patterns=("32:2:4", "unstructured@0.5"),
        predictions=(Prediction(DENSE, 640.0, 4718592), Prediction(PANEL, 320.5, 2500000, measured_us=300.25)),
        activation="gelu",
        residual=True,
        dynamic=True,
    )


def document() -> dict[str, Any]:
    return Plan("x86", [site()], threads=2).to_dict()


def read(changed: Any) -> Plan:
    return Plan.from_json(json.dumps(changed))


def test_round_trip(tmp_path: Path) -> None:
    plan = Plan("x86:avx2", [site(), site(tokens=1, chosen=DENSE)], threads=4)
    assert Plan.from_json(plan.to_json()) == plan
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def planned() -> Plan:
    options = (Option("", DENSE, 640.0, 0.0), Option("32:2:4", PANEL, 320.5, 0.125))
    summary = Summary(2000.0, 1360.0, 1680.5, "KL divergence per token", 0.125, measured_loss=0.25)
    return Plan(
        "x86", [replace(site(), prune="32:2:4", options=options)], budget=Budget("speedup", 1.1), summary=summary
    )


def test_a_plan_under_a_budget_comes_back_with_its_options(tmp_path: Path) -> None:
    plan = planned()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.from_json(replace(plan, budget=None).to_json()).budget is None


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("sites", 0, "prune"), "unstructured", "sites[0].prune: 'unstructured' does not say how much"),
        (("sites", 0, "prune"), "dense", "sites[0].prune: 'dense' does not say how much"),
        (("sites", 0, "prune"), "5:4", "sites[0].prune"),
        (("sites", 0, "options", 1, "loss"), -1, "sites[0].options[1].loss"),
        (("sites", 0, "options", 1, "us"), None, "sites[0].options[1].us"),
        (("sites", 0, "options", 1, "gain"), 1, "unknown field 'gain'"),
        (("budget", "kind"), "speed", "did you mean 'speedup'?"),
        (("budget", "value"), 0.5, "budget.value: speedup must be a number from 1 on"),
        (("summary", "rest_us"), "much", "summary.rest_us"),
        (("summary", "gain"), 0, "summary.gain: expected a number from 0.5 to 2.0, given 0"),
        (("summary",), [], "summary: expected an object"),
    ],
)
def test_bad_budgets_and_options_are_refused(place: tuple[str | int, ...], value: Any, message: str) -> None:
    changed: Any = planned().to_dict()
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(PlanError) as error:
        read(changed)
    assert message in str(error.value)


def test_costs_and_bytes() -> None:
    choice = site()
    assert choice.dense_us == 640.0
    assert choice.chosen_us == 300.25
    assert choice.dense_bytes == 3072 * 768 * 2
    assert replace(choice, dtype="int8").dense_bytes == 3072 * 768
    assert choice.packed_bytes == 2500000
    assert site(chosen=DENSE).packed_bytes is None


def test_only_name_and_chosen_are_needed() -> None:
    entry = {"name": "a", "chosen": {"kernel": "dense"}}
    plan = read({"format": "sparsecomp-plan", "version": 1, "target": "x86", "sites": [entry]})
    assert plan.sites[0].chosen == DENSE
    assert (plan.sites[0].shape, plan.sites[0].tokens) == ((0, 0), 0)


def test_entries_by_name_and_tokens() -> None:
    plan = Plan("x86", [site(tokens=128), site(tokens=1, chosen=DENSE)])
    one = plan.site("encoder.0", 1)
    other = plan.site("encoder.0", 64)
    assert one is not None
    assert one.chosen == DENSE
    assert other is not None
    assert other.tokens == 128
    assert plan.site("encoder.1") is None
    plan.add([site(tokens=128, chosen=DENSE), site("encoder.1")])
    assert [(choice.name, choice.tokens) for choice in plan] == [
        ("encoder.0", 128),
        ("encoder.0", 1),
        ("encoder.1", 128),
    ]
    assert plan.sites[0].chosen == DENSE


def change(path: str, value: Any) -> dict[str, Any]:
    changed = document()
    place: Any = changed
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        place = place[part]
    place[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "other", "plan.format"),
        ("version", 2, "reads version 1, given 2"),
        ("version", "1", "plan.version: expected an integer"),
        ("target", None, "plan.target"),
        ("target", "x" * 5000, "at most 2000 characters"),
        ("sites", {}, "expected an array"),
        ("sites", [[]], "plan.sites[0]: expected an object"),
        ("sites", [{}] * 20001, "at most 20000 items"),
        ("tagret", "x86", "did you mean 'target'"),
        ("sites.0.tokns", 4, "did you mean 'tokens'"),
        ("sites.0.name", 3, "plan.sites[0].name"),
        ("sites.0.tokens", -1, "plan.sites[0].tokens"),
        ("sites.0.tokens", True, "plan.sites[0].tokens"),
        ("sites.0.tokens", 1.5, "plan.sites[0].tokens"),
        ("sites.0.out_features", 10**30, "a number out of range"),
        ("sites.0.density", "half", "plan.sites[0].density"),
        ("sites.0.residual", 1, "true or false"),
        ("sites.0.patterns", ["2:5:"], "plan.sites[0].patterns[0]"),
        ("sites.0.patterns", [["2:4"]], "expected a pattern"),
        ("sites.0.patterns", ["9" * 100], "at most 64 characters"),
        ("sites.0.chosen", "panel", "plan.sites[0].chosen: expected an object"),
        ("sites.0.chosen.kernel", "__import__('os')", "expected the name of a kernel"),
        ("sites.0.chosen.pattern", "2;4", "plan.sites[0].chosen.pattern"),
        ("sites.0.chosen.params", {"v": "32"}, "plan.sites[0].chosen.params.v"),
        ("sites.0.chosen.code", "x", "unknown field 'code'"),
        ("sites.0.candidates.0.us", 1e300, "plan.sites[0].candidates[0].us"),
    ],
)
def test_bad_documents_are_refused_with_the_place(path: str, value: Any, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        read(change(path, value))
    assert message in str(caught.value)


MAPS = Maps(1, 28, 28)


def convolution(maps: Maps = MAPS) -> SiteChoice:
    window = Window((3, 3), (2, 2), (1, 1), extra=(0, 1))
    return replace(site("conv", maps.positions(window)), window=window, maps=maps)


def test_convolutions_come_back_with_their_windows_and_are_told_apart_by_their_maps() -> None:
    wide, high = convolution(Maps(1, 14, 56)), convolution(Maps(1, 56, 14))
    plan = Plan("x86", [convolution(), wide, high])
    assert Plan.from_json(plan.to_json()) == plan
    positions = wide.tokens
    plan.add([replace(high, tokens=positions, reason="again")])
    plan.add([replace(high, tokens=positions, reason="and again")])
    assert len(plan) == 4
    found = plan.site("conv", positions, Maps(1, 56, 14))
    assert found is not None
    assert found.reason == "and again"
    assert plan.site("conv", positions, Maps(1, 14, 56)) == wide


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("window", "3x3", "plan.sites[0].window: expected an object"),
        ("maps", None, "a convolution has both a window and maps"),
        ("window", None, "a convolution has both a window and maps"),
        ("maps", {"images": 1, "height": 28}, "plan.sites[0].maps.width is missing"),
        ("maps", {"images": 1, "height": 28, "width": 28, "depth": 28}, "unknown field 'depth'"),
        ("window.kernel_x", 0, "plan.sites[0].window.kernel_x: expected at least 1, given 0"),
        ("window.groups", 0, "plan.sites[0].window.groups: expected at least 1, given 0"),
        ("window.padding_y", -1, "plan.sites[0].window.padding_y: expected an integer from 0"),
    ],
)
def test_bad_windows_are_refused(field: str, value: Any, message: str) -> None:
    changed: Any = Plan("x86", [convolution()]).to_dict()
    place = changed["sites"][0]
    *parents, last = field.split(".")
    for part in parents:
        place = place[part]
    place[last] = value
    with pytest.raises(PlanError) as caught:
        read(changed)
    assert message in str(caught.value)


@pytest.mark.parametrize("field", ["format", "version", "target"])
def test_missing_fields(field: str) -> None:
    changed = document()
    del changed[field]
    with pytest.raises(PlanError, match=f"plan.{field} is missing"):
        read(changed)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        '{"version": NaN}',
        '{"version": Infinity}',
        '{"version": 1, "version": 1}',
        "[" * 200_000,
        '{"a":' * 100_000,
        '{"version": ' + "9" * 10_000 + "}",
    ],
)
def test_texts_that_are_no_plan(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_large_and_odd_files(tmp_path: Path) -> None:
    large = tmp_path / "large.json"
    large.write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(PlanError, match="the most that is read"):
        Plan.load(large)
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe{}")
    with pytest.raises(PlanError, match="cannot read"):
        Plan.load(binary)
    with pytest.raises(PlanError, match="not a regular file"):
        Plan.load(tmp_path)
    with pytest.raises(PlanError, match="does not exist"):
        Plan.load(tmp_path / "nothing" / "plan.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["sites", "target", "sites.0.chosen", "sites.0.candidates", "sites.0.density", "threads"]), JSON)
def test_no_value_does_anything_but_load_or_be_refused(path: str, value: Any) -> None:
    changed = copy.deepcopy(change(path, value))
    try:
        plan = Plan.from_json(json.dumps(changed))
    except PlanError:
        return
    assert Plan.from_json(plan.to_json()) == plan
