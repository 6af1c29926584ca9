"""ONNX models in ONNX Runtime: the optimised file with its library, and without, over the original on the same zeros.

`python benchmarks/bench_onnx.py [--quick] [--only bert,sizes,nsfw,paraphrase,overhead]`; `make bench` runs it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from timing import Results, Row, interleave

import sparsecomp.onnx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import onnx_cases as cases  # noqa: E402 -- lies with the tests, which use it more

PARTS = ("bert", "sizes", "nsfw", "paraphrase", "overhead")
BERT_GOALS = {0.8: 2.8, 0.9: 4.2}
WITHOUT_LIBRARY = 0.95
TOLERANCE = 1e-4
CHAIN = 200
TOKENS = (1, 2, 3, 4, 6, 8, 11, 12, 16, 24, 32, 64, 128)


class _Encoder:
    """Builds an encoder of BERT's form, as PyTorch exports it, with random weights of which a share is zero."""

    def __init__(self, width: int, heads: int, share: float) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Any] = {}
        self._width, self._heads, self._share = width, heads, share
        self._random = np.random.default_rng(0)
        self._count = 0

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        self._count += 1
        output = f"v{self._count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        weight = (self._random.standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(np.float32)
        weight[np.abs(weight) < np.quantile(np.abs(weight), self._share)] = 0
        product = self.op("MatMul", x, self.constant(weight))
        return self.op("Add", self.constant(self._random.standard_normal(outputs).astype(np.float32)), product)

    def norm(self, x: str) -> str:
        scale, shift = np.ones(self._width, np.float32), np.zeros(self._width, np.float32)
        return self.op("LayerNormalization", x, self.constant(scale), self.constant(shift), axis=-1)

    def layer(self, x: str) -> str:
        width, size = self._width, self._width // self._heads
        split = self.constant(np.array([0, -1, self._heads, size], np.int64))
        q, k, v = (self.op("Reshape", self.linear(x, width, width), split) for _ in range(3))
        scores = self.op(
            "MatMul", self.op("Transpose", q, perm=[0, 2, 1, 3]), self.op("Transpose", k, perm=[0, 2, 3, 1])
        )
        weights = self.op("Softmax", self.op("Div", scores, self.constant(np.float32(np.sqrt(size)))), axis=-1)
        mixed = self.op(
            "Transpose", self.op("MatMul", weights, self.op("Transpose", v, perm=[0, 2, 1, 3])), perm=[0, 2, 1, 3]
        )
        merged = self.op("Reshape", mixed, self.constant(np.array([0, -1, width], np.int64)))
        x = self.norm(self.op("Add", self.linear(merged, width, width), x))
        h = self.linear(x, width, 4 * width)
        erf = self.op("Erf", self.op("Div", h, self.constant(np.float32(np.sqrt(2)))))
        gelu = self.op(
            "Mul", self.op("Mul", h, self.op("Add", erf, self.constant(np.float32(1)))), self.constant(np.float32(0.5))
        )
        return self.norm(self.op("Add", self.linear(gelu, 4 * width, width), x))


def bert(share: float, layers: int = 6, width: int = 768, heads: int = 12) -> onnx.ModelProto:
    """The encoder of BERT-base with fewer layers, on `x [batch, tokens, width]`."""
    encoder = _Encoder(width, heads, share)
    x = "x"
    for _ in range(layers):
        x = encoder.layer(x)
    encoder.nodes.append(helper.make_node("Identity", [x], ["y"]))
    return cases.model_of(encoder.nodes, {"x": ["batch", "tokens", width]}, encoder.constants)


def compare(
    name: str, model: onnx.ModelProto, feeds: dict[str, Any], goal: float | None, rounds: int, results: Results
) -> None:
    """The original, the optimised file without its library, and with it, all in turn."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.onnx"
        sizes = {key: list(value.shape) for key, value in feeds.items()}
        report = sparsecomp.onnx.optimize(model, output, shapes=sizes)
        sessions = {
            "original": cases.session(model),
            "without": cases.session(output),
            "with": cases.session(output, sparsecomp.onnx.library_of(output)),
        }
        expected = sessions["original"].run(None, feeds)
        error = max(
            float(np.abs(a - b).max() / np.abs(b).max())
            for key in ("without", "with")
            for a, b in zip(sessions[key].run(None, feeds), expected, strict=True)
            if b.dtype == np.float32
        )
        if not error <= TOLERANCE:
            raise AssertionError(f"{name}: differs from the original by {error:.2g} of the largest value")
        timings = interleave({key: (lambda s=s: s.run(None, feeds)) for key, s in sessions.items()}, rounds=rounds)
    details = {
        "ms": timings.median("with") / 1e3,
        "original ms": timings.median("original") / 1e3,
        "spread": timings.spread("with"),
        "error": error,
        "sites": len(report.rewritten),
    }
    results.add(Row(name, timings.speedup("with", over="original"), "x ONNX Runtime", goal, details=details))
    without = timings.speedup("without", over="original")
    results.add(Row(f"{name}, without the library", without, "x ONNX Runtime", WITHOUT_LIBRARY))


def sizes(share: float, rounds: int, results: Results) -> None:
    """One file, chosen for 128 tokens, at every number of tokens over the original: the slowest counts."""
    model = bert(share, layers=2)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.onnx"
        sparsecomp.onnx.optimize(model, output, shapes={"x": [1, 128, 768]})
        original, ours = cases.session(model), cases.session(output, sparsecomp.onnx.library_of(output))
        speedups = {}
        for tokens in TOKENS:
            x = np.random.default_rng(0).standard_normal((1, tokens, 768)).astype(np.float32)
            calls = {"original": lambda x=x: original.run(None, {"x": x}), "ours": lambda x=x: ours.run(None, {"x": x})}
            speedups[tokens] = interleave(calls, rounds=rounds).speedup("ours", over="original")
    details = {f"at {tokens}": speedup for tokens, speedup in speedups.items()}
    name = (
        f"BERT-base, 2 layers, chosen for 128 tokens, unstructured@{share}, slowest of {len(TOKENS)} numbers of tokens"
    )
    results.add(Row(name, min(speedups.values()), "x ONNX Runtime", 1 / 1.03, details=details))


def overhead(rounds: int, results: Results) -> None:
    """What a call of one of the operations costs beyond one of a built-in MatMul, both of 16 by 16."""
    weight = cases.sparse_array(16, 16, density=0.2) / 4
    nodes = [
        helper.make_node("MatMul", ["x" if i == 0 else f"h{i}", "w"], ["y" if i == CHAIN - 1 else f"h{i + 1}"])
        for i in range(CHAIN)
    ]
    model = cases.model_of(nodes, {"x": [1, 16]}, {"w": weight})
    with tempfile.TemporaryDirectory() as folder:
        output, _ = cases.optimized(model, Path(folder), kernel="gather")
        sessions = {"built in": cases.session(model), "ours": cases.session(output, sparsecomp.onnx.library_of(output))}
        feeds = {"x": np.ones((1, 16), np.float32)}
        timings = interleave({key: (lambda s=s: s.run(None, feeds)) for key, s in sessions.items()}, rounds=rounds)
    more = (timings.median("ours") - timings.median("built in")) / CHAIN
    details = {key: timings.median(key) / CHAIN for key in sessions}
    results.add(
        Row("one call of an operation over a MatMul of 16 x 16", more, "us", 2.0, at_most=True, details=details)
    )


def main() -> None:
    """Run the chosen parts, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, for a first look")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run (default: all)")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; expected of {', '.join(PARTS)}")
    torch.set_num_threads(1)  # what the choices are for
    rounds = 7 if arguments.quick else 31
    import onnxruntime

    notes = [f"ONNX Runtime {onnxruntime.__version__}, one thread, {rounds} rounds in turn; the zeros are the same"]
    results = Results("onnx", notes=notes)
    generator = np.random.default_rng(0)
    if "bert" in chosen:
        for share, goal in BERT_GOALS.items():
            x = generator.standard_normal((1, 128, 768)).astype(np.float32)
            name = f"BERT-base, 6 layers, 128 tokens, unstructured@{share}"
            compare(name, bert(share), {"x": x}, goal, rounds, results)
    if "sizes" in chosen:
        for share in (0.5, 0.8, 0.9):
            sizes(share, rounds, results)
    if "nsfw" in chosen:
        x = (generator.random((1, 224, 224, 3)) * 255 - 110).astype(np.float32)
        compare(
            "OpenNSFW, unstructured@0.85", cases.pruned(cases.opennsfw(), 0.85), {"input:0": x}, 2.0, rounds, results
        )
    if "paraphrase" in chosen:
        model = cases.pruned(cases.paraphrase(), 0.85)
        compare(
            "paraphrase-MiniLM-L3, 128 tokens, unstructured@0.85",
            model,
            cases.token_feeds(1, 128),
            None,
            rounds,
            results,
        )
    if "overhead" in chosen:
        overhead(rounds, results)
    results.finish()


if __name__ == "__main__":
    main()
