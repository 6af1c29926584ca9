"""Tiles under budgets."""

from __future__ import annotations

from dataclasses import replace
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
            if sum(option.cells.dsp for option in chosen) <= limit
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


def test_what_is_venoms_takes_tiles_of_its_rows() -> None:
    small = network("16:2:4:8", vectors=4)
    for allowed in (None, ["16:2:4:8"]):
        chosen = [options_of(*given, patterns=allowed) for given in zip(small.layers, small.shapes(), strict=False)]
        patterns = {str(option.pattern) for options in chosen for option in options}
        assert "2:8" in patterns
        assert "16:2:4:8" not in patterns


def test_only_allowed_patterns_are_used() -> None:
    made = design(network(), part("xczu7ev"), max_dsp=40, patterns=["dense"])
    assert {option.pattern for option in made.options} == {"dense"}


def test_an_interval_gives_the_fewest_slices_whose_layers_all_keep_it() -> None:
    small = network()
    every = [options_of(layer, shape) for layer, shape in zip(small.layers, small.shapes(), strict=False)]
    for interval in (1600, 6400):
        made = design(small, part("xczu7ev"), max_interval=interval)
        assert made.cycles[1] <= interval
        fewest = (min(way.cells.dsp for way in ways if way.cost.span <= interval) for ways in every)
        assert made.dsp == sum(fewest)
    with pytest.raises(
        ValueError, match=r"layer 'layer' takes 768 cycles for a call at least, more than the 500 given"
    ):
        design(small, part("xczu7ev"), max_interval=500)


def test_every_kind_of_cell_keeps_its_limit() -> None:
    small = network()
    free = design(small, part("xczu7ev")).cells
    for name in ("dsp", "lut", "ff"):
        limits = replace(part("xczu7ev").cells, **{name: int(0.7 * getattr(free, name))})
        made = design(small, replace(part("xczu7ev"), cells=limits))
        assert getattr(made.cells, name) <= getattr(limits, name)
        assert made.cycles[0] >= design(small, part("xczu7ev")).cycles[0]


def test_fewer_block_rams_take_another_tile() -> None:
    # A tile of many multipliers reads rows of many bits, which leave the depth of block RAMs unused.
    rng = np.random.default_rng(0)
    large = d.network_of([d.linear(rng, rng.integers(-128, 128, (96, 256)))], Shape(16, 256))
    free = design(large, part("xczu7ev"), max_dsp=100)
    assert free.cells.ramb18 > 15
    limits = replace(part("xczu7ev").cells, ramb18=15)
    made = design(large, replace(part("xczu7ev"), cells=limits), max_dsp=100)
    assert made.cells.ramb18 <= 15
    assert made.cycles[0] > free.cycles[0]


def test_what_does_not_fit_says_by_how_much() -> None:
    with pytest.raises(ValueError, match=r"needs 2 DSP slices at least, 1 more than the 1 given; layer 'layer'"):
        design(network(), part("xczu7ev"), max_dsp=1)
    with pytest.raises(ValueError, match=r"a call takes \d+ cycles on 20 DSP slices of .*, more than the 5 given"):
        design(network(), part("xczu7ev"), max_dsp=20, max_cycles=5)
    rng = np.random.default_rng(0)
    large = d.network_of([d.linear(rng, rng.integers(-128, 128, (1024, 1024)))], Shape(1, 1024))
    with pytest.raises(
        ValueError,
        match=r"needs [\d.]+ block RAMs of 36 Kbit at least, [\d.]+ more than the 140 that Zynq-7020 has; "
        r"layer 'layer' needs most",
    ):
        design(large, part("xc7z020"), patterns=["dense"])


@pytest.mark.parametrize(("name", "words"), [("lut", "look-up tables"), ("ff", "flip-flops")])
def test_too_few_cells_are_named(name: str, words: str) -> None:
    tiny = replace(part("xc7z020"), cells=replace(part("xc7z020").cells, **{name: 100}))
    with pytest.raises(
        ValueError, match=r"at least, [\d.]+ more than the 100 that Zynq-7020 has; layer 'layer'"
    ) as error:
        design(network(), tiny)
    assert words in str(error.value)


def test_limits_that_exclude_each_other_are_named_together() -> None:
    small = network()
    every = [options_of(layer, shape) for layer, shape in zip(small.layers, small.shapes(), strict=False)]
    dsp, lut = (sum(min(getattr(way.cells, name) for way in ways) for ways in every) for name in ("dsp", "lut"))
    # The fewest slices take more look-up tables than the fewest of these: both least amounts at once are not possible.
    both = replace(part("xczu7ev"), cells=replace(part("xczu7ev").cells, dsp=dsp, lut=lut + 1))
    with pytest.raises(
        ValueError, match=r"no choice of tiles keeps all of 2 DSP slices, .* look-up tables, .* at once"
    ):
        design(small, both)


def test_an_unknown_part_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown part 'xczu7': did you mean 'xczu7ev'\? The parts are xc7z020"):
        part("xczu7")
