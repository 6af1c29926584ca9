"""Latency against DSP slices, and its picture."""

from __future__ import annotations

from itertools import pairwise

import hls_designs as d
import numpy as np
import pytest

from sparsecomp.hls.design import design
from sparsecomp.hls.network import Network, Shape
from sparsecomp.hls.pareto import front
from sparsecomp.targets.hls import part


def network() -> Network:
    rng = np.random.default_rng(0)
    layers = [d.linear(rng, d.pruned(rng, "2:4", *shape)) for shape in ((48, 32), (16, 48))]
    return d.network_of(layers, Shape(16, 32))


def test_more_slices_are_faster_along_the_front_and_no_design_beats_it() -> None:
    made = design(network(), part("xczu7ev"), max_dsp=40)
    points = list(front(made, points=8))
    assert len(points) >= 4
    for before, after in pairwise(points):
        assert before.cells.dsp < after.cells.dsp
        assert before.cycles > after.cycles
    for point in points:
        again = design(network(), part("xczu7ev"), max_dsp=point.cells.dsp)
        assert again.cycles[0] == pytest.approx(point.cycles, rel=0.01)
    assert points[-1].cycles == design(network(), part("xczu7ev")).cycles[0]


def test_the_picture_shows_the_front_and_the_design() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'sparsecomp[plot]'")
    made = design(network(), part("xczu7ev"), max_dsp=40)
    found = front(made, clock_ns=4.0, points=4)
    best, chosen = found.plot().get_lines()
    assert best.get_xydata().tolist() == [[point.cells.dsp, point.cycles * 4e-6] for point in found]
    assert chosen.get_xydata().tolist() == [[made.dsp, made.cycles[0] * 4e-6]]
    assert "DSP" in str(found)


def test_a_front_of_one_point_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 points, asked for 1"):
        front(design(network(), part("xczu7ev")), points=1)
