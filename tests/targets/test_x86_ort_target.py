"""Forms of a weight for every number of tokens, and the prices of ONNX Runtime."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecomp.patterns import Pattern
from sparsecomp.runtime.ort_library import MOST_FORMS
from sparsecomp.targets import get_target
from sparsecomp.targets.base import DENSE, Candidate, Problem, WeightFacts
from sparsecomp.targets.x86 import ort_target
from sparsecomp.targets.x86.cpu import LEVELS, supported
from sparsecomp.targets.x86.ort_target import FULL, GRID, LibraryTarget, choose_forms, slower_maps, slower_than_dense
from sparsecomp.window import Maps

ROWS, GATHER = Candidate("rows", "unstructured"), Candidate("gather", "unstructured")
costs = st.lists(st.floats(1, 1000), min_size=len(GRID), max_size=len(GRID))


@given(rows=costs, gather=costs, full=costs, unit=st.integers(1, 200))
def test_a_call_takes_the_cheapest_form_that_is_there(
    rows: list[float], gather: list[float], full: list[float], unit: int
) -> None:
    table = {ROWS: rows, GATHER: gather, FULL: full}

    def price(candidate: Candidate, tokens: int) -> float:
        return table[candidate][GRID.index(tokens // unit)]

    forms = choose_forms(price, [ROWS, GATHER], ROWS, unit)
    assert forms.candidates[0] == ROWS
    assert len(set(forms.candidates)) == len(forms.candidates) <= MOST_FORMS
    limits = [tokens for tokens, _ in forms.choice]
    assert limits == sorted(set(limits))
    assert all(a != b for (_, a), (_, b) in itertools.pairwise(forms.choice))
    if len(forms.candidates) > 1:
        assert limits[-1] == unit * GRID[-1]
    for at, multiple in enumerate(GRID):
        places = [place for limit, place in forms.choice if unit * multiple <= limit] or [0]
        taken = table[forms.candidates[places[0]]][at]
        assert taken == min(table[candidate][at] for candidate in forms.candidates)
        if len(forms.candidates) < MOST_FORMS:
            assert taken <= 1.1 * min(costs[at] for costs in table.values())


def test_the_dense_form_is_there_where_nothing_else_is_as_fast_as_dense() -> None:
    target = LibraryTarget(get_target("x86"))
    torch.manual_seed(0)
    weight = torch.randn(768, 768) * (torch.rand(768, 768) < 0.2)
    facts = WeightFacts.of(weight)

    def price(candidate: Candidate, tokens: int) -> float:
        return target.predict(candidate, Problem(facts, tokens, 1))

    offered = [candidate for candidate in target.candidates(facts) if not candidate.is_dense]
    best = min(offered, key=lambda candidate: price(candidate, 128))
    assert price(best, 128) < price(DENSE, 128)
    forms = choose_forms(price, offered, best, 1)
    assert FULL in forms.candidates
    assert slower_than_dense(price, forms, 1) is None
    assert slower_than_dense(price, ort_target.Forms((best,)), 1) is not None


def test_sites_that_would_be_slower_at_some_size_say_so() -> None:
    def price(candidate: Candidate, tokens: int) -> float:
        return 10.0 if candidate == DENSE else 1000.0 / tokens

    reason = slower_than_dense(price, ort_target.Forms((ROWS,)), 4)
    assert reason == "at 4 tokens, which a call may have, rows[unstructured] would take 250 us, dense 10 us"
    assert slower_than_dense(price, ort_target.Forms((ROWS,)), 128) is None

    def maps_price(candidate: Candidate, maps: Maps) -> float:
        return 10.0 if candidate == DENSE else 100.0 / maps.images

    seen = Maps(16, 7, 7)
    assert slower_maps(maps_price, ROWS, seen, (False, True, True)) is None
    assert "maps of 1 x 7 x 7" in (slower_maps(maps_price, ROWS, seen, (True, False, False)) or "")


def test_targets_without_a_library_are_told() -> None:
    class Other(LibraryTarget):
        def __init__(self) -> None:
            self.name = "arm:neon"

    with pytest.raises(ValueError, match="no ONNX Runtime library for target 'arm:neon'"):
        LibraryTarget(Other())


@pytest.mark.parametrize("level", ["avx2", "generic"])
def test_prices_that_are_estimates_say_so(level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECOMP_CACHE_DIR", str(tmp_path))
    assert "dense in ONNX Runtime: shipped prices (estimated" in LibraryTarget(get_target(f"x86:{level}")).description


@pytest.mark.parametrize("tokens", [1, 2, 8, 64, 512])
def test_fewer_lanes_never_make_dense_cheaper(tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECOMP_CACHE_DIR", str(tmp_path))
    problem = Problem(WeightFacts.assumed(768, 768, Pattern.parse("dense")), tokens, 1)
    for candidate in (DENSE, FULL):
        costs = [
            LibraryTarget(get_target(f"x86:{name}")).predict(candidate, problem) for name in LEVELS if supported(name)
        ]
        assert costs == sorted(costs)


def test_a_weight_among_many_comes_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is small in memory gains most where the caches hold other weights."""
    monkeypatch.setenv("SPARSECOMP_CACHE_DIR", str(tmp_path))
    target = LibraryTarget(get_target())
    facts = WeightFacts.assumed(768, 768, Pattern.parse("unstructured@0.8"))

    def gain() -> float:
        alone = (target.predict(candidate, Problem(facts, 1, 1)) for candidate in (DENSE, GATHER))
        return next(alone) / next(alone)

    by_itself = gain()
    target.weight_bytes = 1 << 34
    assert gain() > by_itself
