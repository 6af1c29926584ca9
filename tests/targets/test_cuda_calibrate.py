"""Calibration of a card: factors are measured over predicted, kept for this machine, and scale its prices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_tools import CardOnCpu, kernels_on_cpu

from sparsecomp.patterns import Pattern
from sparsecomp.targets import get_target, scales
from sparsecomp.targets.base import DENSE, Candidate, Problem, WeightFacts
from sparsecomp.targets.cuda import calibrate
from sparsecomp.targets.cuda.cards import card
from sparsecomp.targets.cuda.target import FFN_THRESHOLD, SEMI, CudaTarget


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECOMP_CACHE_DIR", str(tmp_path))


def test_a_card_that_is_slower_than_predicted_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    target = CardOnCpu()

    def slower(
        candidates: Iterable[Candidate], weight: torch.Tensor, problem: Problem, target: Any
    ) -> dict[Candidate, float]:
        assert weight.dtype == problem.dtype
        assert torch.count_nonzero(weight) == problem.facts.nonzeros
        factor = 4 if problem.dtype == torch.int8 else 2
        return {
            found: (factor + 1 if found == SEMI else factor) * target.predict(found, problem)
            for found in (DENSE, *candidates)
        }

    def slow_ffn(call: Callable[[], object], *, on_gpu: bool) -> float:
        assert isinstance(call(), torch.Tensor)
        assert not on_gpu
        return 1000.0

    monkeypatch.setattr(calibrate, "measure", slower)
    monkeypatch.setattr(calibrate, "call_us", slow_ffn)
    with kernels_on_cpu():
        found = calibrate.calibrate(target, [(512, 256)])
    families = {"dense", "panel", "block", "rows"}
    assert {*families, "semi_structured", "rows_token", "two_four"} <= set(found)
    assert {f"{family}, {kind}" for family in families for kind in ("int8", "float32")} - set(found) == {
        "block, float32"  # there is none
    }
    others = (SEMI.kernel, FFN_THRESHOLD)
    factors = {name: factor for name, (factor, _) in found.items() if not name.startswith(others)}
    assert all(factor == pytest.approx(4 if name.endswith("int8") else 2) for name, factor in factors.items())
    measured, plain = CudaTarget(card("h100"), scales.load("cuda-h100")[0]), CudaTarget(card("h100"))
    facts = WeightFacts.assumed(1024, 1024, Pattern.parse("2:4"))
    for dtype, factor in ((torch.half, 3), (torch.bfloat16, 3), (torch.int8, 5)):
        problem = Problem(facts, 64, 1, dtype=dtype)
        assert measured.predict(SEMI, problem) == pytest.approx(factor * plain.predict(SEMI, problem))
    # PyTorch has no dense product of int8 for one token to compare with: the factor of 16 bits counts.
    one, problem = Candidate("two_four", "2:4", (("tokens", 1),)), Problem(facts, 1, 1, dtype=torch.int8)
    assert measured.predict(one, problem) == pytest.approx(2 * plain.predict(one, problem))
    # Half of the units stay: of three linears one is read in full.
    gate, down = (WeightFacts.assumed(*shape, Pattern.parse("dense")) for shape in ((256, 512), (512, 256)))
    for dtype in (torch.half, torch.float32):
        parts = ((gate, 1.0, False), (gate, 0.5, False), (down, 0.5, True))
        us = sum(measured.predict_skip(own, kept, 1, 1, dtype, by_input) for own, kept, by_input in parts)
        assert us == pytest.approx(1000.0)
    problem = Problem(facts, 64, 1, dtype=torch.half)
    assert "measured on this machine" in measured.description
    # A card that is asked for by its name need not be the one here.
    assert get_target("cuda:h100").predict(SEMI, problem) == target.predict(SEMI, problem)


@pytest.mark.parametrize("text", ["", "[]", '{"scales": {"dense": -1}}', '{"scales": {"dense": NaN}}', '{"scales": 3}'])
def test_a_damaged_file_counts_as_none(text: str, tmp_path: Path) -> None:
    assert scales.load("cuda-l4") == ({}, "not measured")
    (tmp_path / "cuda-l4.json").write_text(text)
    assert scales.load("cuda-l4") == ({}, "its calibration cannot be read")


def test_a_card_that_is_not_here_is_not_measured() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card here")
    with pytest.raises(ValueError, match=r"cuda:h100 cannot be measured here: PyTorch .* sees no NVIDIA GPU"):
        calibrate.calibrate(get_target("cuda:h100"))


@pytest.mark.gpu
def test_a_card_is_measured() -> None:
    found = calibrate.calibrate(get_target("cuda"), [(1024, 1024)])
    assert {"dense", "semi_structured", "rows_token"} <= set(found)
    assert all(factor > 0 for factor, _ in found.values())
