"""Convolutions of ours beside dense ones: the mixture that gains most, against all mixtures."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_cases as cases
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from sparsecomp.frontends.onnx import Overlay, build
from sparsecomp.frontends.onnx_layout import best_mixture
from sparsecomp.frontends.onnx_load import load
from sparsecomp.frontends.onnx_shapes import infer
from sparsecomp.passes import DetectConv, DetectLinear, FuseEpilogue, run_passes

VALUES = 4 * 5 * 5


def _overlay() -> Overlay:
    """a, b, c, d in a row, a added behind c; and e behind a Reshape, where layouts change anyway."""
    conv = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["a1"], **conv),
        helper.make_node("Relu", ["a1"], ["a2"]),
        helper.make_node("Conv", ["a2", "b"], ["b1"], **conv),
        helper.make_node("MaxPool", ["b1"], ["b2"], kernel_shape=[1, 1]),
        helper.make_node("Conv", ["b2", "c"], ["c1"], **conv),
        helper.make_node("Add", ["c1", "a2"], ["c2"]),
        helper.make_node("Conv", ["c2", "d"], ["d1"], **conv),
        helper.make_node("Reshape", ["d1", "shape"], ["d2"]),
        helper.make_node("Conv", ["d2", "e"], ["y"], **conv),
    ]
    constants: dict[str, Any] = {name: cases.sparse_array(4, 4, 3, 3) for name in "abcde"}
    model = load(cases.model_of(nodes, {"x": [1, 4, 5, 5]}, {**constants, "shape": np.array([1, 4, 5, 5])}))
    (overlay,) = build(model, infer(model))
    run_passes(overlay.graph, [DetectLinear(), DetectConv(), FuseEpilogue()])
    assert {site.name for site in overlay.graph.sites} == set("abcde")
    return overlay


OVERLAY = _overlay()
PAIRS = (("a", "b"), ("b", "c"), ("a", "c"), ("c", "d"))


@given(st.dictionaries(st.sampled_from("abcde"), st.integers(0, 400)))
def test_no_mixture_gains_more(gains: dict[str, int]) -> None:
    def gained(chosen: frozenset[str]) -> int:
        changes = sum((first in chosen) != (second in chosen) for first, second in PAIRS)
        return sum(gains[name] for name in chosen) - VALUES * changes

    found = best_mixture(OVERLAY, {name: float(gain) for name, gain in gains.items()}, 1.0)
    every = (frozenset(some) for size in range(len(gains) + 1) for some in itertools.combinations(gains, size))
    assert found <= set(gains)
    assert gained(frozenset(found)) == max(map(gained, every))
