"""Queues of hidden units: the numbers stay, the time follows the units that stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hls_designs as d
import numpy as np
import pytest

from sparsecomp.hls.design import linear_options
from sparsecomp.hls.kernel import Tile, queued_trips
from sparsecomp.hls.network import Linear, Lookup, Network, Shape
from sparsecomp.hls.rtl_tools import build_simulation, simulate_rtl
from sparsecomp.hls.skipping import with_skips
from sparsecomp.patterns import Pattern

HIDDEN, OUT, ZERO = 48, 24, -128


def block(rng: np.random.Generator, pattern: str = "dense", vectors: int = 1) -> Network:
    """Two linears with ReLU between; the first input, where it is large, keeps most units at zero."""
    up = d.linear(rng, d.pruned(rng, "dense", HIDDEN, 9))
    up.weight[:, 1:] //= 4
    up.weight[:, 0] = -100
    up = replace(up, bias=np.zeros(HIDDEN, np.int64), requantise=replace(up.requantise, zero=ZERO, low=ZERO))
    return d.network_of([up, d.linear(rng, d.pruned(rng, pattern, OUT, HIDDEN))], Shape(vectors, 9))


def calls(rng: np.random.Generator, count: int, vectors: int = 1) -> np.ndarray:
    """Inputs whose first value goes from -128 to 127."""
    x = rng.integers(-128, 128, (count, vectors, 9))
    x[:, :, 0] = np.linspace(-128, 127, count).astype(np.int64)[:, None]
    return x


def test_relu_changes_no_number_and_a_threshold_only_small_units() -> None:
    rng = np.random.default_rng(0)
    network, x = block(rng), calls(rng, 40)
    skipped = with_skips(network, "relu", x)
    assert skipped.layers[1].skip is not None
    assert all(np.array_equal(skipped.run(call), network.run(call)) for call in x)
    most = with_skips(network, "threshold:.8", x).layers[1].skip
    assert most.most > 0
    assert 0.15 < most.stays.mean() <= 0.2


@pytest.mark.fpga
def test_queues_in_c_are_bit_exact(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    made = []
    for at, (pattern, tile) in enumerate(
        [("dense", Tile(5, 1)), ("dense", Tile(3, 7)), ("2:4", Tile(4, 2, 2, 4)), ("4:2:4", Tile(8, 1, 2, 4, 4))]
    ):
        network = with_skips(block(rng, pattern, 2), "relu" if at % 2 else "threshold:.6", calls(rng, 20, 2))
        options = d.random_options(rng, network)
        options[1] = linear_options(network.layers[1], network.shapes()[1], Pattern.parse(pattern), tile)[at // 2]
        made.append(d.built(network, options))
    assert d.simulate(made, tmp_path, calls=12).count("0 of ") == len(made)


@pytest.mark.fpga
@pytest.mark.slow
def test_cycles_in_registers_are_those_of_the_units_that_stay(tmp_path: Path) -> None:
    d.needs("xls", "verilator")
    rng = np.random.default_rng(2)
    x = calls(rng, 24).astype(np.int8)
    network = with_skips(block(rng), "relu", x)
    up, down = network.layers
    # The first takes 48 cycles, one for each unit of its stream; the second 12 groups of rows for each that stays.
    options = [
        linear_options(up, network.shape, Pattern.parse("dense"), Tile(2, 9))[0],
        linear_options(down, network.shapes()[1], Pattern.parse("dense"), Tile(2, 1))[0],
    ]
    made = d.built(network, options)
    program = build_simulation(made, tmp_path)
    found = simulate_rtl(program, made, x)
    assert np.array_equal(found.outputs, np.stack([network.run(call) for call in x]))
    paused = simulate_rtl(program, made, x[::5], pauses=1)
    assert np.array_equal(paused.outputs, np.stack([network.run(call) for call in x[::5]]))
    stay = np.maximum(down.skip.stays.sum(axis=1), 1)
    assert stay.min() <= 3
    assert stay.max() >= 40
    expected = np.maximum(12 * stay, HIDDEN)
    assert np.abs(np.diff(found.ends) - expected[1:]).max() <= 40  # a call's end also depends on what is before it
    assert abs(np.diff(found.ends).sum() - expected[1:].sum()) <= 0.03 * expected[1:].sum()


def test_the_trips_of_a_sample_are_its_words_with_a_unit_that_stays() -> None:
    weight = np.ones((6, 8), np.int64)
    stays = np.zeros((4, 8), np.bool_)
    stays[1, [0, 1]] = True
    stays[2] = True
    # Words of two: 1 (of zeros), 1, 4 and 1 in each of three groups of rows.
    assert queued_trips(weight, Tile(2, 2), stays) == np.ceil(3 * 7 / 4)
    assert queued_trips(weight, Tile(2, 1, 1, 2), stays) is None


def test_what_cannot_be_skipped_is_said() -> None:
    rng = np.random.default_rng(3)
    network, x = block(rng), calls(rng, 4)
    with pytest.raises(ValueError, match=r"skip must be 'relu' or 'threshold:P'.*given 'gelu'"):
        with_skips(network, "gelu", x)
    smooth = Network(network.shape, (network.layers[0], Lookup("gelu", np.arange(-128, 128), 0)), (1, 1), (0, 0))
    last = Linear("down", network.layers[1].weight, network.layers[1].bias, network.layers[1].requantise)
    smooth = replace(smooth, layers=(*smooth.layers, last))
    with pytest.raises(ValueError, match=r"no linear of vectors reads units after a ReLU \(after another"):
        with_skips(smooth, "relu", x)
    assert with_skips(smooth, "threshold:.5", x).layers[2].skip is not None
