"""The cost model: predictions that can be true, prices with the names of the quantities, and the fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecomp.targets.base import DENSE, DEPTHWISE, Candidate, Problem, WeightFacts
from sparsecomp.targets.cpu.level import Caches
from sparsecomp.targets.x86 import calibration, conv_cost, cost, cpu
from sparsecomp.targets.x86.target import FEW_TOKENS, X86Target
from sparsecomp.window import Maps, Window

TARGETS = {name: X86Target(name) for name in cpu.LEVELS}  # prediction needs no such CPU
CANDIDATES = [
    DENSE,
    Candidate("rows", "unstructured"),
    Candidate("gather", "unstructured"),
    Candidate("mask", "unstructured"),
    *(Candidate("panel", "unstructured", (("v", v),)) for v in (8, 16, 32)),
]
SPARSE = CANDIDATES[1:]
FAMILIES = ("AuthenticAMD 25", "AuthenticAMD 26")
SHIPPED = {
    (name, family): calibration._shipped(name, "", family).coefficients for name in cpu.LEVELS for family in FAMILIES
}


def name_of(candidate: Candidate) -> str:
    return "".join([candidate.kernel, *(str(value) for _, value in candidate.params)])


def offered(level: str, candidate: Candidate) -> bool:
    return candidate.kernel != "mask" or bool(cpu.level(level).spread)


def nested(outputs: int, inputs: int, densities: tuple[float, ...]) -> list[WeightFacts]:
    """Facts of weights that lose more and more of their entries."""
    order = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(0))
    return [WeightFacts.of((order < density).float()) for density in densities]


DENSITIES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.38, 0.45, 0.6, 0.8, 0.99)
FACTS = {shape: nested(*shape, DENSITIES) for shape in ((33, 47), (768, 768), (3072, 256))}


@pytest.mark.parametrize("candidate", CANDIDATES, ids=name_of)
@pytest.mark.parametrize("level", cpu.LEVELS)
def test_predictions_are_positive(level: str, candidate: Candidate) -> None:
    if not offered(level, candidate):
        pytest.skip(f"{level} has no {candidate.kernel} kernel")
    for facts in (few for found in FACTS.values() for few in found):
        for tokens in (1, 2, 8, 9, 100, 1000):
            for threads in (1, 2, 16):
                predicted = TARGETS[level].predict(candidate, Problem(facts, tokens, threads, "gelu", True))
                if candidate.kernel in ("gather", "mask") and tokens > FEW_TOKENS:
                    assert predicted == math.inf
                else:
                    assert 0 < predicted < math.inf


@pytest.mark.parametrize("tokens", [1, 8, 128])
@pytest.mark.parametrize("candidate", SPARSE, ids=name_of)
@pytest.mark.parametrize("level", cpu.LEVELS)
def test_more_nonzeros_never_cost_less(level: str, candidate: Candidate, tokens: int) -> None:
    if not offered(level, candidate):
        pytest.skip(f"{level} has no {candidate.kernel} kernel")
    for found in FACTS.values():
        times = [TARGETS[level].predict(candidate, Problem(facts, tokens, 1)) for facts in found]
        assert times == sorted(times)


@pytest.mark.parametrize("tokens", [1, 8, 128])
def test_dense_costs_the_same_whatever_is_zero(tokens: int) -> None:
    for found in FACTS.values():
        assert len({TARGETS["avx2"].predict(DENSE, Problem(facts, tokens, 1)) for facts in found}) == 1


@pytest.mark.parametrize("candidate", CANDIDATES, ids=name_of)
def test_what_else_a_call_does_costs_more(candidate: Candidate) -> None:
    target, facts = TARGETS["avx2"], FACTS[768, 768][3]
    plain = target.predict(candidate, Problem(facts, 4, 1))
    assert target.predict(candidate, Problem(facts, 4, 1, "gelu")) > plain
    assert target.predict(candidate, Problem(facts, 8, 1)) >= plain
    narrow = target.predict(candidate, Problem(facts, 4, 1, dtype=torch.bfloat16))
    assert narrow == plain if candidate.is_dense else narrow > plain
    assert target.predict(candidate, Problem(facts, 0, 1)) == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", cpu.LEVELS)
def test_shipped_prices_have_the_names_of_the_quantities(level: str, family: str) -> None:
    shipped = SHIPPED[level, family]
    machine = cost.Machine(cpu.level(level), cpu.caches())
    seen = {"convert", "layout", "skip"}
    for candidate in CANDIDATES:
        if not offered(level, candidate):
            continue
        for tokens in (1, 4, 100):
            model, counted = cost.quantities(machine, candidate, Problem(FACTS[33, 47][3], tokens, 1))
            assert set(shipped[model]) == set(counted), model
            seen.add(model)
    window, maps = Window((3, 3), (2, 2), (1, 1)), Maps(1, 9, 9)
    problem = Problem(FACTS[33, 47][3], maps.positions(window), 1, window=window, maps=maps)
    for candidate in (DENSE, *(Candidate(name, "unstructured", (("vectors", 2),)) for name in ("conv", "conv_strips"))):
        model, counted = conv_cost.quantities(machine, candidate, problem)
        assert set(shipped[model]) == set(counted), model
        seen.add(model)
    window = Window((3, 3), (2, 2), (1, 1), groups=33)
    problem = Problem(WeightFacts.of(torch.ones(33, 9)), maps.positions(window), 1, window=window, maps=maps)
    for candidate in (DENSE, DEPTHWISE):
        model, counted = conv_cost.quantities(machine, candidate, problem)
        assert set(shipped[model]) == set(counted), model
        seen.add(model)
    # A calibration has a model for each of these and is refused if it has others than the shipped prices.
    assert set(shipped) == seen


@pytest.mark.parametrize(("level", "family"), SHIPPED)
def test_shipped_prices_are_times(level: str, family: str) -> None:
    for model, prices in SHIPPED[level, family].items():
        assert all(math.isfinite(price) and price >= 0 for price in prices.values()), model
        assert sum(prices.values()) > 0


def test_what_comes_from_where() -> None:
    machine = cost.Machine(cpu.level("avx2"), Caches(32 << 10, 1 << 20, 8 << 20))
    assert cost.traffic(machine, 1 << 19, 3, 1) == {"l3_bytes": 0.0, "memory_bytes": 0.0}
    assert cost.traffic(machine, 1 << 21, 3, 1) == {"l3_bytes": 3.0 * (1 << 21), "memory_bytes": 0.0}
    far = cost.traffic(machine, 1 << 26, 3, 1)
    assert far == {"l3_bytes": 0.0, "memory_bytes": 3.0 * (1 << 26)}
    assert cost.traffic(machine, 1 << 26, 3, 2)["memory_bytes"] > far["memory_bytes"]


@given(st.integers(0, 2**31), st.integers(2, 6))
def test_the_fit_recovers_planted_prices(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    prices = np.exp(random.uniform(-8, 4, count)) * (random.random(count) < 0.8)
    prices[0] = 2.0
    amounts = np.exp(random.uniform(0, 12, (6 * count, count)))
    rows = [{f"q{i}": float(amount) for i, amount in enumerate(row)} for row in amounts]
    found = cost.fit(rows, amounts @ prices)
    predicted = amounts @ np.array([found[f"q{i}"] for i in range(count)])
    assert np.allclose(predicted, amounts @ prices, rtol=1e-6)
    # A price shows as far as its quantity is a part of what was measured.
    part = (amounts * prices / (amounts @ prices)[:, None]).max(axis=0)
    for i in np.nonzero(part > 1e-3)[0]:
        assert found[f"q{i}"] == pytest.approx(prices[i], rel=1e-3)


def test_no_price_is_negative() -> None:
    rows = [{"a": 1.0, "b": float(b), "never": 0.0} for b in range(1, 9)]
    found = cost.fit(rows, np.array([100.0 - 5 * b for b in range(1, 9)]))
    assert found["b"] == 0
    assert found["a"] > 0
    assert found["never"] == 0


@pytest.mark.parametrize("level", cpu.LEVELS)
def test_weights_of_a_large_model_come_from_memory(level: str) -> None:
    near = TARGETS[level]
    room = cpu.caches().l3
    far = near.for_model(room + 1)
    assert near.for_model(room) is near
    assert far.for_model(room + 1) is far
    facts = FACTS[768, 768][8]
    assert far.predict(DENSE, Problem(facts, 1, 1)) > near.predict(DENSE, Problem(facts, 1, 1))
    assert far.predict(DENSE, Problem(facts, 128, 1)) == near.predict(DENSE, Problem(facts, 128, 1))
    # What reads less of the weight gains more where bytes are what counts.
    gains = [own.predict_skip(facts, 1.0, 1, 1) - own.predict_skip(facts, 0.5, 1, 1) for own in (near, far)]
    assert gains[1] > gains[0]


@pytest.mark.parametrize("level", cpu.LEVELS)
def test_a_single_row_takes_one_thread_in_float32(level: str) -> None:
    def us(tokens: int, threads: int, dtype: torch.dtype) -> float:
        return TARGETS[level].predict(DENSE, Problem(FACTS[768, 768][8], tokens, threads, dtype=dtype))

    assert us(1, 2, torch.float32) == us(1, 1, torch.float32)
    assert us(4, 2, torch.float32) < us(4, 1, torch.float32)
    assert us(1, 2, torch.bfloat16) < us(1, 1, torch.bfloat16)
