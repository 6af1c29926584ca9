"""HLS designs: C simulation of random layers of every pattern, and the feed-forward block of MiniLM under DSP limits.

`python benchmarks/bench_hls.py [--layers 200]`, about two minutes on one core. All simulations are bit-exact or this
fails. Cycles and DSP slices are predictions of the cost model; no synthesis is run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from timing import Results, Row
from torch import nn

from sparsecomp.hls.api import export_hls
from sparsecomp.hls.network import Linear, Shape
from sparsecomp.patterns import Pattern

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import hls_designs
from models import minilm

ROWS = 16


def layers(pattern: str, count: int) -> float:
    """Simulate random layers of a pattern in random tiles; seconds."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        weight = hls_designs.pruned(rng, pattern, int(rng.integers(1, 40)), 9 * int(rng.integers(1, 8)))
        network = hls_designs.network_of(
            [hls_designs.linear(rng, weight)], Shape(int(rng.integers(1, 4)), weight.shape[1])
        )
        layer = network.layers[0]
        assert isinstance(layer, Linear)
        option = hls_designs.random_tile(rng, layer, pattern, network.shape)
        made.append(hls_designs.built(network, [option]))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        hls_designs.simulate(made, Path(folder))
    return time.perf_counter() - start


def block(pattern: str) -> onnx.ModelProto:
    """The first feed-forward block of MiniLM, pruned by magnitude."""
    layer = minilm()[0].encoder.layer[0]
    nodes, tensors = [], []
    for name, linear, source, target in (
        ("up", layer.intermediate.dense, "x", "h"),
        ("down", layer.output.dense, "g", "y"),
    ):
        assert isinstance(linear, nn.Linear)
        weight = Pattern.parse(pattern).project(linear.weight).numpy()
        nodes.append(helper.make_node("Gemm", [source, f"{name}.w", f"{name}.b"], [target], transB=1, name=name))
        tensors += [numpy_helper.from_array(weight, f"{name}.w")]
        tensors += [numpy_helper.from_array(linear.bias.detach().numpy(), f"{name}.b")]
    nodes.insert(1, helper.make_node("Gelu", ["h"], ["g"], name="gelu"))
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, 384])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, 384])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def feed_forward(results: Results, pattern: str, max_dsp: int) -> None:
    """Export and simulate the block under a limit of DSP slices."""
    torch.manual_seed(0)
    samples = nn.functional.layer_norm(torch.randn(64, 384), (384,)).numpy()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        made = export_hls(block(pattern), output=folder, part="xcvu9p", calibration={"x": samples}, max_dsp=max_dsp)
        exported = time.perf_counter()
        subprocess.run(["make", "-s", "-C", folder, "csim"], check=True, stdout=subprocess.DEVNULL)
    done = time.perf_counter()
    kept = sum(np.count_nonzero(layer.weight) for layer in made.network.layers if isinstance(layer, Linear)) * ROWS
    cycles, interval = made.cycles
    details = {"DSP": made.dsp, "BRAM": made.bram, "cycles": cycles, "interval": interval}
    details |= {"kept products a DSP and cycle": kept / (made.dsp * interval), "export s": exported - start}
    case = f"feed-forward block, {pattern}, at most {max_dsp} DSP: export and C simulation"
    results.add(Row(case, done - start, "s", 60, True, details))


def main() -> None:
    """Run the benchmark and write its results."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--layers", type=int, default=200, help="random layers of every pattern")
    given = arguments.parse_args()
    results = Results("hls")
    results.notes += [
        f"feed-forward block of MiniLM, 384 to 1536 to 384, {ROWS} vectors a call, on an xcvu9p",
        "C simulation by g++; cycles, DSP and block RAMs are predictions of the cost model",
    ]
    for pattern in hls_designs.PATTERNS:
        seconds = layers(pattern, given.layers)
        case = f"random layers, {pattern}, all outputs as the reference"
        results.add(Row(case, given.layers, "layers", 200, details={"seconds": seconds}))
    for pattern, limit in (("dense", 800), ("2:4", 400), ("16:2:4", 400), ("1:4", 200), ("unstructured@0.8", 400)):
        feed_forward(results, pattern, limit)
    results.finish()


if __name__ == "__main__":
    main()
