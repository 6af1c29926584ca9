"""Tiles under budgets."""

from __future__ import annotations

from itertools import product

import hls_designs as d
import numpy as np
import pytest

from sparsecomp.hls.design import design, options_of
from sparsecomp.hls.network import Network, Shape
from sparsecomp.targets.hls import cycles_of, part


def network(pattern: str = "2:4", vectors: int = 16) -> Network:
    rng = np.random.default_rng(0)
    layers = [d.linear(rng, d.pruned(rng, pattern, *shape)) for shape in ((48, 32), (16, 48))]
    return d.network_of(layers, Shape(vectors, 32))


def test_more_slices_never_make_it_slower_and_the_limit_holds() -> None:
    before = None
    for limit in (6, 12, 24, 48, 96):
        made = design(network(), part("xczu7ev"), max_dsp=limit)
        assert made.dsp <= limit
        assert before is None or made.cycles[0] <= before
        before = made.cycles[0]


def test_the_choice_is_the_best_of_all() -> None:
    small = network(vectors=4)
    every = [options_of(layer, shape) for layer, shape in zip(small.layers, small.shapes(), strict=False)]
    for limit in (10, 20, 40):
        best = min(
            cycles_of([option.cost for option in chosen], small.shape.values, small.shape.vectors)[0]
            for chosen in product(*every)
            if sum(option.cost.dsp for option in chosen) <= limit
        )
        assert design(small, part("xczu7ev"), max_dsp=limit).cycles[0] <= best * 1.03


def test_a_latency_gives_the_fewest_slices_that_keep_it() -> None:
    fast = design(network(), part("xczu7ev"), max_dsp=96)
    made = design(network(), part("xczu7ev"), max_cycles=2 * fast.cycles[0])
    assert made.cycles[0] <= 2 * fast.cycles[0]
    assert made.dsp < fast.dsp


def test_sparse_layers_take_half_the_slices_at_equal_cycles() -> None:
    sparse, dense = network("2:4", 64), network("dense", 64)
    whole = design(dense, part("xczu7ev"), max_dsp=68)
    half = design(sparse, part("xczu7ev"), max_cycles=whole.cycles[0])
    assert half.dsp - 4 <= 0.55 * (whole.dsp - 4)


def test_only_allowed_patterns_are_used() -> None:
    made = design(network(), part("xczu7ev"), max_dsp=40, patterns=["dense"])
    assert {option.pattern for option in made.options} == {"dense"}


def test_what_does_not_fit_says_by_how_much() -> None:
    with pytest.raises(ValueError, match=r"needs 6 DSP slices at least, 2 more than the 4 given; layer 'layer'"):
        design(network(), part("xczu7ev"), max_dsp=4)
    with pytest.raises(ValueError, match=r"a call takes \d+ cycles on 20 DSP slices, more than the 5 given"):
        design(network(), part("xczu7ev"), max_dsp=20, max_cycles=5)
    rng = np.random.default_rng(0)
    large = d.network_of([d.linear(rng, rng.integers(-128, 128, (1024, 1024)))], Shape(1, 1024))
    with pytest.raises(
        ValueError, match=r"needs \d+ block RAMs of 36 Kbit, \d+ more than Zynq-7020 has; layer 'layer'"
    ):
        design(large, part("xc7z020"))


def test_an_unknown_part_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown part 'xczu7': did you mean 'xczu7ev'\? The parts are xc7z020"):
        part("xczu7")
