"""The integer rules."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecomp.hls.network import Linear, Lookup, Network, Requantise, Shape


@given(st.floats(1e-9, 32767.0), st.integers(-(2**31), 2**31 - 1), st.integers(-128, 127))
def test_requantising_is_the_written_rule_and_near_the_real_product(scale: float, total: int, zero: int) -> None:
    rule = Requantise.of(np.array([scale]), zero)
    factor, shift = int(rule.factors[0]), int(rule.shifts[0])
    assert 0 <= factor < 2**16
    assert 1 <= shift <= 47
    exact = floor(Fraction(total * factor, 2**shift) + Fraction(1, 2)) + zero
    assert rule.run(np.array([total]))[0] == min(max(exact, -128), 127)
    # 16 bits of factor: one part in 2**16, on results that int8 holds less than a hundredth of a step.
    real = total * scale
    if abs(real) < 300 and scale > 1e-6:
        assert abs(total * factor / 2**shift - real) < 0.01


def test_sums_beyond_32_bits_are_refused_with_their_size() -> None:
    rule = Requantise.of(np.array([1e-6]), 0)
    weight = np.full((1, 200_000), 127)
    with pytest.raises(ValueError, match="layer 'wide': its sums reach 3251200000"):
        Linear("wide", weight, np.zeros(1, np.int64), rule)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), 40000.0])
def test_a_scale_that_no_factor_holds_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scales must be positive"):
        Requantise.of(np.array([scale]), 0)


def test_the_reference_checks_its_input() -> None:
    network = Network(Shape(2, 3), (Lookup("same", np.arange(-128, 128)),), (1.0, 1.0), (0, 0))
    x = np.array([[-128, 0, 127], [1, 2, 3]])
    assert np.array_equal(network.run(x), x)
    with pytest.raises(ValueError, match=r"expected \(2, 3\) values"):
        network.run(x[:1])
    with pytest.raises(ValueError, match="must lie in int8"):
        network.run(x + 1)
