"""Verilog by XLS in verilator, bit for bit; cells by yosys."""

from __future__ import annotations

from pathlib import Path

import hls_designs as d
import numpy as np
import pytest

from sparsecomp.hls.design import Design, linear_options
from sparsecomp.hls.kernel import Tile
from sparsecomp.hls.network import Lookup, Patches, Pool, Requantise, Shape
from sparsecomp.hls.rtl import Module, dslx, to_verilog
from sparsecomp.hls.rtl_tools import build_simulation, map_cells, simulate_rtl
from sparsecomp.patterns import Pattern

pytestmark = pytest.mark.fpga


def _check(design: Design, folder: Path, calls: int) -> None:
    network = design.network
    shape = network.shape
    inputs = np.random.default_rng(9).integers(-128, 128, (calls, shape.vectors, shape.width)).astype(np.int8)
    expected = np.stack([network.run(call) for call in inputs])
    program = build_simulation(design, folder)
    made = simulate_rtl(program, design, inputs)
    assert np.array_equal(made.outputs, expected)
    cycles, interval = design.cycles
    # Small networks are mostly filling of pipelines, of which the model has one depth for all.
    assert abs(made.interval - interval) <= 0.03 * interval + 8
    assert abs(made.cycles - cycles) <= 0.03 * cycles + 16 * len(network.layers)
    assert np.array_equal(simulate_rtl(program, design, inputs[:3], pauses=1).outputs, expected[:3])


@pytest.mark.slow
def test_linears_of_every_pattern_in_a_row_are_bit_exact(tmp_path: Path) -> None:
    d.needs("xls", "verilator")
    rng = np.random.default_rng(0)
    tiles = {
        "dense": Tile(2, 4),
        "2:4": Tile(2, 1, 2, 4),
        "1:4": Tile(1, 2, 1, 4),
        "16:2:4": Tile(4, 1, 2, 4, 4),
        "unstructured@0.9": Tile(1, 1, 1, 8),
    }
    widths = (16, 12, 8, 16, 16, 6)
    layers = [d.linear(rng, d.pruned(rng, p, o, i)) for p, i, o in zip(tiles, widths[:-1], widths[1:], strict=True)]
    network = d.network_of([*layers, Lookup("table", rng.integers(-128, 128, 256))], Shape(3, widths[0]))
    shapes = network.shapes()
    options = d.random_options(rng, network)
    for at, (layer, (pattern, tile)) in enumerate(zip(layers, tiles.items(), strict=True)):
        options[at] = linear_options(layer, shapes[at], Pattern.parse(pattern), tile)[at % 2]
    _check(d.built(network, options), tmp_path, 50)


@pytest.mark.slow
def test_convolutions_and_poolings_are_bit_exact(tmp_path: Path) -> None:
    d.needs("xls", "verilator")
    rng = np.random.default_rng(2)
    first = d.linear(rng, d.pruned(rng, "2:4", 6, 16), Patches((4, 2), (1, 2), (1, 0, 1, 1), (1, 2), -7))
    shape = Shape(72, 2, 8)
    most = Pool("most", Patches((2, 2), (1, 1), (0, 1, 1, 0), (1, 1), -128))
    mean = Pool("mean", Patches((2, 2), (2, 1), (0, 0, 0, 0), (1, 1), 0), 13, Requantise.of(np.array([0.21]), 3))
    flat = mean.out(most.out(first.out(shape)))
    last = d.linear(rng, d.pruned(rng, "2:4", 5, flat.values))
    order = np.arange(flat.values).reshape(flat.width, flat.vectors).T.reshape(-1)
    last = type(last)("flat", last.weight, last.bias, last.requantise, None, order)
    network = d.network_of([first, most, mean, last], shape)
    _check(d.built(network, d.random_options(rng, network)), tmp_path, 20)


@pytest.mark.slow
def test_sparse_loops_take_their_share_of_the_slices_of_dense_and_a_requantisation_two() -> None:
    d.needs("xls", "pyosys")
    # All of them read four inputs in a trip.
    tiles = {"dense": Tile(2, 4), "half": Tile(2, 1, 2, 4), "quarter": Tile(2, 1, 1, 4)}
    sources = {name: ("multiply", dslx.multiply(tile)) for name, tile in tiles.items()}
    sources["finish"] = ("requantise", dslx.requantise(4, Requantise(np.array([3]), np.array([5]), 1)))
    verilog = "".join(to_verilog(Module(name, kind, 0, source)) for name, (kind, source) in sources.items())
    slices = {name: cells["DSP"] for name, cells in zip(sources, map_cells(verilog, [*sources], "xcup"), strict=True)}
    assert slices == {"dense": 8, "half": 4, "quarter": 2, "finish": 2}


def test_a_family_that_yosys_cannot_map_is_refused() -> None:
    d.needs("pyosys")
    with pytest.raises(ValueError, match="yosys maps xc7, xcup, not 'versal'"):
        map_cells("module a(); endmodule", ["a"], "versal")
