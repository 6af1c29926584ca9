"""Sizes that cells are predicted from are those that the Verilog is written with, and so are the cells."""

from __future__ import annotations

import hls_designs as d
import numpy as np
import pytest

from sparsecomp.hls.design import design, linear_options
from sparsecomp.hls.kernel import Tile
from sparsecomp.hls.network import Patches, Pool, Requantise, Shape
from sparsecomp.hls.rtl import modules, rtl_project
from sparsecomp.hls.rtl_tools import map_cells
from sparsecomp.hls.units import linear_units, pool_units
from sparsecomp.patterns import Pattern
from sparsecomp.targets.hls import part


def test_a_network_is_written_in_the_modules_that_are_counted() -> None:
    rng = np.random.default_rng(0)
    conv = d.linear(rng, d.pruned(rng, "2:4", 6, 16), Patches((4, 2), (1, 2), (1, 0, 1, 1), (1, 2), -7))
    mean = Pool("mean", Patches((2, 2), (2, 1), (0, 0, 0, 0), (1, 1), 0), 13, Requantise.of(np.array([0.21]), 3))
    shape = Shape(72, 2, 8)
    last = d.linear(rng, d.pruned(rng, "dense", 5, 6))
    network = d.network_of([conv, mean, last], shape)
    shapes = network.shapes()
    tiles = [Tile(2, 2, 2, 4), None, Tile(1, 3)]
    options = d.random_options(rng, network)
    counted = []
    for at, (layer, tile) in enumerate(zip(network.layers, tiles, strict=True)):
        if isinstance(layer, Pool):
            counted += pool_units(layer, shapes[at])
            continue
        assert tile is not None
        options[at] = linear_options(layer, shapes[at], Pattern.parse("2:4" if tile.m > 1 else "dense"), tile)[at % 2]
        made = d.built(network, options).schedules[at]
        assert made is not None
        counted += linear_units(layer, shapes[at], tile, made.trips, options[at].serial)
    chain = modules(d.built(network, options), {})
    written = [module for top in chain for module in (top, top.side) if module is not None]
    assert [module.kind for module in written] == [kind for kind, _ in counted]
    for module, (kind, sizes) in zip(written, counted, strict=True):
        if not module.source:
            numbers = {name: value for name, value in module.parameters.items() if isinstance(value, int)}
            assert numbers == sizes, kind


@pytest.mark.slow
@pytest.mark.fpga
def test_a_whole_design_takes_the_cells_that_are_predicted() -> None:
    d.needs("xls", "pyosys")
    rng = np.random.default_rng(1)
    layers = [d.linear(rng, d.pruned(rng, "2:4", 96, 64)), d.linear(rng, d.pruned(rng, "dense", 8, 96))]
    made = design(d.network_of(layers, Shape(4, 64)), part("xczu7ev"), max_dsp=14)
    files = {name: content.decode() for name, content in rtl_project(made).items()}
    verilog = "".join(text for name, text in files.items() if name.endswith(".v"))
    memories = {name: text for name, text in files.items() if name.endswith(".hex")}
    found = map_cells(verilog, ["top"], "xcup", memories)[0]
    assert (found["DSP"], found["RAMB18"]) == (made.cells.dsp, made.cells.ramb18)
    assert found["RAMB18"] > 0
    assert made.cells.lut == pytest.approx(found["LUT"], rel=0.2)
    assert made.cells.ff == pytest.approx(found["FF"], rel=0.2)
