"""FPGA designs at the level of registers: verilator against the integer reference, and slices mapped by yosys.

`python benchmarks/bench_hls_rtl.py [--skip-cells]`, with the extra `fpga`: the feed-forward block of MiniLM (2:4) and a
digits network (2:4 but its first layer) whole, 1000 vectors each, then the tile loops of the block's layers at equal
interval. It fails where a simulated value differs. A few minutes, most of them in yosys.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from bench_hls import ROWS, block
from torch import nn

import sparsecomp
from sparsecomp.hls import dslx
from sparsecomp.hls.api import export_hls
from sparsecomp.hls.design import Design
from sparsecomp.hls.kernel import Tile
from sparsecomp.hls.network import Linear
from sparsecomp.hls.rtl import Module, to_verilog
from sparsecomp.hls.rtl_tools import build_simulation, map_cells, simulate_rtl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import hls_digits

TILES = {
    "dense": Tile(8, 48),
    "2:4": Tile(8, 12, 2, 4),
    "16:2:4": Tile(16, 6, 2, 4, 16),
    "1:4": Tile(8, 12, 1, 4),
}
"""Tiles that take a weight of 1536 x 384 of their pattern in 1536 trips."""


def feed_forward() -> tuple[Design, npt.NDArray[np.int8]]:
    torch.manual_seed(0)
    samples = nn.functional.layer_norm(torch.randn(64, 384), (384,)).numpy()
    with tempfile.TemporaryDirectory() as folder:
        made = export_hls(block("2:4"), output=folder, part="xcvu9p", calibration={"x": samples}, max_dsp=400)
    calls = -(-1000 // ROWS)
    x = nn.functional.layer_norm(torch.randn(ROWS * calls, 384), (384,)).numpy()
    return made, made.network.quantise(x).reshape(calls, ROWS, 384)


def digits() -> tuple[Design, npt.NDArray[np.int8]]:
    torch.manual_seed(0)
    x, y, test_x, _ = hls_digits.digits()
    model = hls_digits.network()
    hls_digits.train(model, x, y, 30)
    sparse = copy.deepcopy(model)
    sparsecomp.sparsify_(sparse, "2:4", filter_fn=lambda _, name: name != "0")
    with sparsecomp.freeze_masks(sparse):
        hls_digits.train(sparse, x, y, 15)
    with tempfile.TemporaryDirectory() as folder:
        made = export_hls(
            hls_digits.exported(sparse, x), output=folder, part="xc7z020", calibration={"x": x.numpy()}, max_dsp=100
        )
    pictures = torch.cat([test_x, x[:500]]).numpy()
    return made, made.network.quantise(pictures).reshape(len(pictures), 64, 1)


def simulate(name: str, made: Design, inputs: npt.NDArray[np.int8]) -> None:
    expected = np.stack([made.network.run(call) for call in inputs])
    with tempfile.TemporaryDirectory() as folder:
        found = simulate_rtl(build_simulation(made, Path(folder)), made, inputs)
    if not np.array_equal(found.outputs, expected):
        raise SystemExit(f"{name}: {np.count_nonzero(found.outputs != expected)} values differ from the reference")
    cycles, interval = made.cycles
    layers = zip(made.network.layers, made.network.shapes()[1:], strict=True)
    kept = sum(np.count_nonzero(layer.weight) * out.vectors for layer, out in layers if isinstance(layer, Linear))
    print(
        f"{name}: {len(inputs)} calls bit-exact; cycles {found.cycles}, predicted {cycles} "
        f"({100 * (cycles / found.cycles - 1):+.2f} %); interval {found.interval:.0f}, predicted {interval}; "
        f"kept products / DSP / simulated cycle {kept / made.dsp / found.interval:.2f}",
        flush=True,
    )


def cells() -> None:
    print("| pattern | DSP | over dense | multipliers | LUT | FF |\n| --- | --- | --- | --- | --- | --- |")
    dense = 0
    for pattern, tile in TILES.items():
        module = Module("multiply", "multiply", 32 * tile.rows, dslx.multiply(tile))
        found = map_cells(to_verilog(module), "multiply", "xcup")
        dense = dense or found["DSP"]
        count = tile.rows * tile.lanes
        print(
            f"| {pattern} | {found['DSP']} | {found['DSP'] / dense:.2f} | {count} | {found['LUT']} | {found['FF']} |",
            flush=True,
        )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--skip-cells", action="store_true", help="no mapping by yosys")
    given = arguments.parse_args()
    simulate("feed-forward block, 2:4", *feed_forward())
    simulate("digits, 2:4", *digits())
    if not given.skip_cells:
        cells()


if __name__ == "__main__":
    main()
