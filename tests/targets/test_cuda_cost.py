"""The prices of NVIDIA cards: laws that hold on every card, and published times that they were not fitted to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecomp.patterns import Pattern
from sparsecomp.targets import get_target
from sparsecomp.targets.base import DENSE, Problem, WeightFacts
from sparsecomp.targets.cuda.cards import card, card_names
from sparsecomp.targets.cuda.target import SEMI

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "cuda_published.json"
HALF = torch.float16


def problem(tokens: int, outputs: int, inputs: int, dtype: torch.dtype = HALF) -> Problem:
    """A linear with a 2:4 weight."""
    return Problem(WeightFacts.assumed(outputs, inputs, Pattern.parse("2:4")), tokens, threads=1, dtype=dtype)


@given(st.sampled_from(card_names()), st.integers(1, 4096), st.integers(1, 64), st.integers(1, 64))
def test_no_product_is_faster_than_its_arithmetic_and_its_bytes(
    name: str, tokens: int, outputs: int, inputs: int
) -> None:
    found, target = card(name), get_target(f"cuda:{name}")
    asked = problem(tokens, 256 * outputs, 256 * inputs)
    weight = asked.facts.out_features * asked.facts.in_features
    arithmetic = 2 * tokens * weight / (1e6 * found.rate(HALF, sparse=False))
    assert target.predict(DENSE, asked) > arithmetic
    assert target.predict(SEMI, asked) > 2 * tokens * weight / (1e6 * found.rate(HALF, sparse=True))
    if 2 * weight > found.l2:
        assert target.predict(DENSE, asked) > 2 * weight / (1e3 * found.bandwidth)


@given(st.sampled_from(card_names()), st.integers(1, 2000), st.integers(1, 32))
def test_more_tokens_never_cost_less_dense(name: str, tokens: int, more: int) -> None:
    target = get_target(f"cuda:{name}")
    fewer, greater = (target.predict(DENSE, problem(count, 2048, 2048)) for count in (tokens, tokens + more))
    assert fewer <= greater


def test_a_wave_more_shows() -> None:
    target = get_target("cuda:a100")
    # 108 multiprocessors: 9 x 12 tiles of 128 x 256 fill one wave; one token more begins another row of tiles.
    full, over, further = (target.predict(DENSE, problem(tokens, 256 * 12, 16384)) for tokens in (1152, 1153, 1154))
    assert over > 1.02 * full
    assert further == pytest.approx(over, rel=1e-3)


@pytest.mark.parametrize("name", card_names())
def test_weights_of_a_large_model_come_from_memory(name: str) -> None:
    found, near = card(name), get_target(f"cuda:{name}")
    far = near.for_model(found.l2 + 1)
    assert near.for_model(found.l2) is near
    assert far.for_model(found.l2 + 1) is far
    few, many = problem(8, 512, 1024), problem(8192, 512, 1024)
    for candidate in near.candidates(few.facts):
        if (us := near.predict(candidate, few)) < float("inf"):
            assert far.predict(candidate, few) >= us
            assert far.predict(candidate, few) > near.packed_bytes(candidate, few.facts, HALF) / (1e3 * found.bandwidth)
    # What has to come from memory anyway, or takes longer to multiply, costs the same.
    assert far.predict(DENSE, many) == pytest.approx(near.predict(DENSE, many), rel=0.02)


def test_padding_of_tokens_costs() -> None:
    target = get_target("cuda:h100")
    assert target.predict(SEMI, problem(1023, 4096, 4096)) > target.predict(SEMI, problem(1024, 4096, 4096))
    assert target.predict(SEMI, problem(1016, 4096, 4096)) <= target.predict(SEMI, problem(1024, 4096, 4096))


@pytest.mark.parametrize("name", card_names())
@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype"),
    [(255, 4096, HALF), (4096, 128, HALF), (4104, 4096, HALF), (4096, 4112, torch.int8), (4096, 4096, torch.float32)],
)
def test_what_the_libraries_do_not_take_is_not_priced(name: str, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    target, asked = get_target(f"cuda:{name}"), problem(64, outputs, inputs, dtype)
    assert target.predict(SEMI, asked) == float("inf")
    assert 0 < target.predict(DENSE, asked) < float("inf")


def test_two_to_four_loses_with_few_channels_and_wins_with_many() -> None:
    target = get_target("cuda:h100-pcie")
    small, large = problem(512, 512, 512, torch.bfloat16), problem(8192, 8192, 8192, torch.bfloat16)
    assert target.predict(SEMI, small) > target.predict(DENSE, small)
    assert target.predict(SEMI, large) < target.predict(DENSE, large)


def test_published_speed_ups_and_winners_are_reproduced() -> None:
    groups = json.loads(PUBLISHED.read_text(encoding="utf-8"))["groups"]
    within, wrong = [], []
    for number, group in enumerate(groups):
        for name, dtype, tokens, outputs, inputs, dense, sparse in group["rows"]:
            target, asked = get_target(f"cuda:{name}"), problem(tokens, outputs, inputs, getattr(torch, dtype))
            speedup, published = target.predict(DENSE, asked) / target.predict(SEMI, asked), dense / sparse
            within.append((number, abs(speedup - published) <= 0.25 * published))
            if max(published, 1 / published) >= 1.05 and (speedup > 1) != (published > 1):
                wrong.append((name, dtype, tokens, outputs, inputs))
    # The tables and issues of PyTorch and NVIDIA, and layers of the source that was fitted to.
    assert sum(close for number, close in within if number) >= 12
    assert sum(close for _, close in within) >= 85
    assert len(wrong) <= 1, wrong


def test_facts_name_their_sources() -> None:
    text = Path(__file__).parents[2].joinpath("targets", "cuda", "facts.json").read_text(encoding="utf-8")
    facts = json.loads(text)
    for name, found in facts["cards"].items():
        assert found["sources"], name
        assert found.get("like", name) in facts["constants"]
        assert found["arch"] in facts["architectures"]
