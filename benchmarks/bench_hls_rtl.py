"""FPGA designs at the level of registers: verilator against the integer reference, and slices mapped by yosys.

`python benchmarks/bench_hls_rtl.py`, with the extra `fpga`: the feed-forward block of MiniLM (2:4) and a
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
from timing import Results, Row
from torch import Tensor, nn

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
GOALS = {"2:4": 0.55, "16:2:4": 0.55, "1:4": 0.3}
"""Slices over those of dense."""


def feed_forward() -> tuple[Design, npt.NDArray[np.int8]]:
    torch.manual_seed(0)
    samples = nn.functional.layer_norm(torch.randn(64, 384), (384,)).numpy()
    with tempfile.TemporaryDirectory() as folder:
        made = export_hls(block("2:4"), output=folder, part="xcvu9p", calibration={"x": samples}, max_dsp=400)
    calls = -(-1000 // ROWS)
    x = nn.functional.layer_norm(torch.randn(ROWS * calls, 384), (384,)).numpy()
    return made, made.network.quantise(x).reshape(calls, ROWS, 384)


def digits(model: nn.Module, pattern: str) -> tuple[nn.Module, Design]:
    """A trained network pruned but for its first layer, and its design."""
    x, y, _, _ = hls_digits.digits()
    sparse = copy.deepcopy(model)
    sparsecomp.sparsify_(sparse, pattern, filter_fn=lambda _, name: name != "0")
    with sparsecomp.freeze_masks(sparse):
        hls_digits.train(sparse, x, y, 15)
    with tempfile.TemporaryDirectory() as folder:
        made = export_hls(
            hls_digits.exported(sparse, x), output=folder, part="xc7z020", calibration={"x": x.numpy()}, max_dsp=100
        )
    return sparse, made


def classify(results: Results) -> tuple[Design, npt.NDArray[np.int8]]:
    """Accuracy of digits networks; the design of 2:4, and 1000 pictures as its input."""
    torch.manual_seed(0)
    x, y, test_x, test_y = hls_digits.digits()
    dense = hls_digits.network()
    hls_digits.train(dense, x, y, 30)
    right = _accuracy(dense, test_x, test_y)
    designs = {}
    for pattern in ("2:4", "1:4"):
        sparse, made = digits(dense, pattern)
        pictures = made.network.quantise(test_x.numpy()).reshape(len(test_x), 64, 1)
        guesses = np.array([made.network.run(picture)[0].argmax() for picture in pictures])
        found = 100 * int((guesses == test_y.numpy()).sum()) / len(test_y)
        details = {
            "float dense %": right,
            f"float {pattern} %": _accuracy(sparse, test_x, test_y),
            f"int8 {pattern} %": found,
            "pictures": len(test_x),
        }
        results.add(Row(f"digits, {pattern}, accuracy lost", right - found, "points", 1, True, details))
        designs[pattern] = made
    pictures = torch.cat([test_x, x[:500]]).numpy()
    return designs["2:4"], designs["2:4"].network.quantise(pictures).reshape(len(pictures), 64, 1)


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * int((model(x).argmax(1) == y).sum()) / len(y)


def simulate(results: Results, name: str, made: Design, inputs: npt.NDArray[np.int8], vectors: int) -> None:
    """Run calls in verilator.

    Args:
        results: to add rows to.
        name: of the network.
        made: its design.
        inputs: `[calls, vectors, width]`.
        vectors: how many inputs of the network these are.
    """
    expected = np.stack([made.network.run(call) for call in inputs])
    with tempfile.TemporaryDirectory() as folder:
        found = simulate_rtl(build_simulation(made, Path(folder)), made, inputs)
    if not np.array_equal(found.outputs, expected):
        raise SystemExit(f"{name}: {np.count_nonzero(found.outputs != expected)} values differ from the reference")
    results.add(Row(f"{name}, all outputs as the reference", vectors, "inputs", 1000))
    cycles, interval = made.cycles
    for what, real, predicted in (
        ("cycles of the first call", found.cycles, cycles),
        ("interval", found.interval, interval),
    ):
        error = 100 * abs(predicted / real - 1)
        results.add(
            Row(f"{name}, {what}", error, "% error", 3, True, {"simulated": round(real), "predicted": predicted})
        )
    layers = zip(made.network.layers, made.network.shapes()[1:], strict=True)
    kept = sum(np.count_nonzero(layer.weight) * out.vectors for layer, out in layers if isinstance(layer, Linear))
    use = kept / made.dsp / found.interval
    results.add(Row(f"{name}, kept products", use, "a DSP and simulated cycle", 0.9, details={"DSP": made.dsp}))


def cells(results: Results) -> None:
    """Map the loops of `TILES`."""
    dense = 0
    for pattern, tile in TILES.items():
        module = Module("multiply", "multiply", 32 * tile.rows, dslx.multiply(tile))
        found = map_cells(to_verilog(module), "multiply", "xcup")
        dense = dense or found["DSP"]
        details = {"DSP": found["DSP"], "multipliers": tile.rows * tile.lanes, "LUT": found["LUT"], "FF": found["FF"]}
        share = found["DSP"] / dense
        results.add(Row(f"tile loop, {pattern}, mapped", share, "DSP over dense", GOALS.get(pattern), True, details))


def main() -> None:
    """Run the benchmark and write its results."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = Results("hls_rtl")
    results.notes += [
        f"feed-forward block of MiniLM, 384 to 1536 to 384, {ROWS} vectors a call, on an xcvu9p; "
        "digits: examples/hls_digits.py, all layers pruned but the first",
        "Verilog by XLS in verilator; cells by synth_xilinx of yosys for UltraScale+; nothing was placed or timed",
        "digits, 2:4: 16 windows of 72 values, read one value in a cycle, are the interval, so multipliers wait",
        "tile loops: of a 1536 x 384 layer that takes 1536 trips in every pattern",
    ]
    made, inputs = feed_forward()
    simulate(results, "feed-forward block, 2:4", made, inputs, len(inputs) * ROWS)
    made, inputs = classify(results)
    simulate(results, "digits, 2:4", made, inputs, len(inputs))
    cells(results)
    results.finish()


if __name__ == "__main__":
    main()
