"""The registry of targets, and the facts of weights that nobody has."""

from __future__ import annotations

import platform

import pytest
import torch

from sparsecomp.patterns import Pattern
from sparsecomp.targets import get_target, target_names
from sparsecomp.targets.base import PANEL_SIZES, WeightFacts


def test_the_arm_cpu_of_a_machine_that_has_none_has_to_be_named() -> None:
    if platform.machine() in ("aarch64", "arm64"):
        assert get_target("arm").name.startswith("arm:")
    else:
        with pytest.raises(ValueError, match="name one, such as 'arm:cortex-a53'"):
            get_target("arm")


def test_every_name_gives_the_target_of_that_name() -> None:
    for name in target_names():
        if name.startswith("arm:"):
            assert get_target(name).name == name


@pytest.mark.parametrize(("machine", "family"), [("x86_64", "x86"), ("aarch64", "arm"), ("arm64", "arm")])
def test_without_a_name_the_machine_decides(machine: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert get_target().name.startswith(f"{family}:")


def test_code_for_x86_runs_on_x86_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    target = get_target("x86")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "aarch64" in str(target.why_not_here())
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert target.why_not_here() is None


@pytest.mark.parametrize("name", ["arm:cortex-a7", "arm:", "x87", "cuda:v100", "", 5])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown target .*x86:avx2.*arm:cortex-a76"):
        get_target(name)


@pytest.mark.parametrize("name", ["x86:generic", "arm:cortex-a76", "cuda:h100"])
def test_what_is_venoms_runs_as_rows_where_no_kernel_is_made_for_it(name: str) -> None:
    facts = WeightFacts.of(Pattern.parse("64:2:4:8").project(torch.randn(128, 256)))
    offered = get_target(name).candidates(facts, ["64:2:4:8"])
    assert "rows[64:2:4:8]" in map(str, offered)
    assert not any(candidate.kernel == "panel" for candidate in offered)
    assert [str(candidate) for candidate in get_target(name).candidates(facts, ["64:2:4:16"])] == ["dense"]


@pytest.mark.parametrize("text", ["unstructured@0.7", "2:4", "8:2:4", "16:2:4:8", "16x1@0.5", "dense"])
def test_assumed_facts_are_those_of_a_random_weight(text: str) -> None:
    pattern = Pattern.parse(text)
    counted = WeightFacts.of(pattern.project(torch.randn(128, 512, generator=torch.Generator().manual_seed(0))))
    assumed = WeightFacts.assumed(128, 512, pattern)
    assert assumed.density == pytest.approx(counted.density, rel=0.01)
    for v in PANEL_SIZES:
        assert assumed.panels[v] == pytest.approx(counted.panels[v], rel=0.03)
    assert any(pattern.admits(found.pattern) for found in assumed.patterns)
