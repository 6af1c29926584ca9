"""Networks without their dead units, bit for bit."""

from __future__ import annotations

import hls_designs as d
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecomp.hls.dead_units import without_dead_units
from sparsecomp.hls.network import Lookup, Network, Patches, Pool, Requantise, Shape


def picture(rng: np.random.Generator, dead: np.ndarray, unread: np.ndarray, pad: int) -> Network:
    """Two convolutions with a pooling and a table between, and a linear of the whole; the first has dead channels."""
    patches = Patches((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 3)
    first = d.pruned(rng, "unstructured@0.3", 8, 18)
    first[dead] = 0
    second = d.pruned(rng, "unstructured@0.3", 6, 8 * 4)
    second.reshape(6, 8, 4)[:, unread] = 0
    pool = Pool("pool", Patches((2, 2), (2, 2), (0, 0, 0, 0), (1, 1), 0), 7, Requantise.of(np.array([0.22]), 4))
    table = Lookup("table", rng.integers(-128, 128, 256))
    own = Patches((2, 2), (1, 1), (pad, pad, pad, pad), (1, 1), 9)
    layers = [d.linear(rng, first, patches), pool, table, d.linear(rng, second, own)]
    shape = Shape(48, 2, 6)
    flat = d.network_of(layers, shape).shapes()[-1]
    last = d.linear(rng, d.pruned(rng, "unstructured@0.3", 5, flat.values))
    last.weight[:, rng.random(flat.values) < 0.3] = 0
    order = np.arange(flat.values).reshape(flat.width, flat.vectors).T.reshape(-1)
    last = type(last)("flat", last.weight, last.bias, last.requantise, None, order)
    return d.network_of([*layers, last], shape)


@settings(max_examples=25)
@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 1), st.integers(0, 10**6))
def test_the_function_stays(dead: int, unread: int, pad: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = [(value >> np.arange(8)) & 1 == 1 for value in (dead, unread)]
    network = picture(rng, *masks, pad)
    made = without_dead_units(network)
    for x in rng.integers(-128, 128, (3, 48, 2)):
        assert np.array_equal(made.run(x), network.run(x))
    left = 8 - int(np.sum(masks[1] if pad else masks[0] | masks[1]))
    # Padding of another value keeps a constant channel, unless it happens to be the same.
    assert len(made.layers[0].weight) <= (left or 8)
    assert pad or left == 0 or len(made.layers[0].weight) == left


def test_units_that_become_dead_by_others_vanish_too() -> None:
    rng = np.random.default_rng(0)
    weights = [d.pruned(rng, "dense", *shape) for shape in ((12, 8), (10, 12), (4, 10))]
    weights[0][5] = 0
    weights[2][:, :3] = 0
    weights[1][3:, 7] = 0  # read by three units that nothing reads
    network = d.network_of([d.linear(rng, weight) for weight in weights], Shape(3, 8))
    made = without_dead_units(network)
    assert [layer.weight.shape for layer in made.layers] == [(10, 8), (7, 10), (4, 7)]
    x = rng.integers(-128, 128, (3, 8))
    assert np.array_equal(made.run(x), network.run(x))
