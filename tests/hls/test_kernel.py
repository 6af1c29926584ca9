"""The tile loop, in NumPy, against the product."""

from __future__ import annotations

import hls_designs as d
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecomp.hls.kernel import Schedule, Tile, schedule, tiles, trips_of
from sparsecomp.patterns import Pattern


def product(made: Schedule, x: np.ndarray) -> np.ndarray:
    """What the loop computes for one vector."""
    tile = made.tile
    words = np.pad(x, (0, -len(x) % tile.word)).reshape(-1, tile.word)
    base = np.arange(tile.lanes) // tile.n * tile.m
    sums, found = np.zeros(tile.rows, np.int64), []
    for trip in range(made.trips):
        select = np.repeat(made.select[trip], tile.shared, axis=0)
        sums += (made.weights[trip] * words[made.words[trip]][base + select]).sum(axis=1)
        if made.last[trip]:
            found.append(sums)
            sums = np.zeros(tile.rows, np.int64)
    return np.concatenate(found)


@given(st.sampled_from(d.PATTERNS), st.integers(1, 34), st.integers(1, 6), st.integers(0, 10**6))
def test_any_tile_of_a_pattern_computes_the_product(pattern: str, outputs: int, nines: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = d.pruned(rng, pattern, outputs, 9 * nines)
    found = tiles(Pattern.parse(pattern), *weight.shape)
    tile = found[int(rng.integers(len(found)))]
    made = schedule(weight, tile)
    x = rng.integers(-128, 128, weight.shape[1])
    assert np.array_equal(product(made, x)[:outputs], weight @ x)
    assert made.trips == trips_of(weight, tile)


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 3), st.integers(0, 10**6))
def test_any_weight_runs_in_any_tile(shares: int, groups: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.integers(-128, 128, (11, 37)) * (rng.random((11, 37)) < 0.4)
    made = schedule(weight, Tile(2 * shares, groups, n, 5, shared=2))
    x = rng.integers(-128, 128, 37)
    assert np.array_equal(product(made, x)[:11], weight @ x)


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.5), ("16:2:4", 0.5), ("1:4", 0.25), ("16x1@0.75", 0.25)])
def test_trips_at_equal_multipliers_follow_the_pattern(pattern: str, share: float) -> None:
    rng = np.random.default_rng(0)
    weight = d.pruned(rng, pattern, 64, 256)
    dense = trips_of(weight + (weight == 0), Tile(16, 4))
    found = [
        tile for tile in tiles(Pattern.parse(pattern), 64, 256) if tile.rows * tile.lanes == 64 and tile.rows == 16
    ]
    assert min(trips_of(weight, tile) for tile in found) <= dense * share * 1.35
    if "x" not in pattern:
        assert min(trips_of(weight, tile) for tile in found) == dense * share


def test_a_tile_that_makes_no_sense_is_refused() -> None:
    for given_ in ({"n": 3, "m": 2}, {"rows": 3, "shared": 2}, {"groups": 0}):
        with pytest.raises(ValueError, match="no such tile"):
            Tile(**({"rows": 4, "groups": 1} | given_))
