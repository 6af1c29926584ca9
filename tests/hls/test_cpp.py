"""C simulation of written projects, bit for bit."""

from __future__ import annotations

from pathlib import Path

import hls_designs as d
import numpy as np
import pytest

from sparsecomp.hls.network import Lookup, Patches, Pool, Requantise, Shape

pytestmark = pytest.mark.fpga


def test_random_layers_of_every_pattern_are_bit_exact(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    made = []
    for at in range(200):
        pattern = d.PATTERNS[at % len(d.PATTERNS)]
        weight = d.pruned(rng, pattern, int(rng.integers(1, 40)), 9 * int(rng.integers(1, 8)))
        network = d.network_of([d.linear(rng, weight)], Shape(int(rng.integers(1, 4)), weight.shape[1]))
        layer = network.layers[0]
        made.append(d.built(network, [d.random_tile(rng, layer, pattern, network.shape)]))
    assert d.simulate(made, tmp_path).count("0 of ") == len(made)


def test_convolutions_poolings_and_tables_are_bit_exact(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    made = []
    for at in range(12):
        channels, size = int(rng.integers(1, 5)), int(rng.integers(6, 10))
        patches = Patches((3, 2), (1 + at % 2, 1), (1, 0, at % 3, 1), (1, 1 + at % 2), -7)
        first = d.linear(rng, d.pruned(rng, "unstructured@0.5", 6, channels * 6), patches)
        shape = first.out(Shape(size * (size + 1), channels, size))
        mean = Requantise.of(np.array([0.21]), 3)
        pool = Pool("pool", Patches((2, 2), (2, 1), (0, 1, 1, 0), (1, 1), 5), 13, mean if at % 2 else None)
        table = Lookup("table", rng.integers(-128, 128, 256))
        flat = pool.out(shape)
        last = d.linear(rng, d.pruned(rng, "2:4", 5, flat.values))
        order = np.arange(flat.values).reshape(flat.width, flat.vectors).T.reshape(-1)
        last = type(last)("flat", last.weight, last.bias, last.requantise, None, order)
        network = d.network_of([first, pool, table, last], Shape(size * (size + 1), channels, size))
        made.append(d.built(network, d.random_options(rng, network)))
    assert d.simulate(made, tmp_path).count("0 of ") == len(made)


def test_a_fault_in_a_weight_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    network = d.network_of([d.linear(rng, d.pruned(rng, "2:4", 8, 16))], Shape(1, 16))
    design = d.built(network, d.random_options(rng, network))
    design.schedules[0].weights[0, 0, 0] ^= 64
    with pytest.raises(AssertionError, match="expected"):
        d.simulate([design], tmp_path)
