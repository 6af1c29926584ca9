"""Models in float16 run in float32 inside, and are float16 to whoever calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_cases as cases
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparsecomp.onnx

HALF = TensorProto.FLOAT16
RANDOM = np.random.default_rng(5)
X = RANDOM.standard_normal((4, 32)).astype(np.float16)


def _model(nodes: list[onnx.NodeProto], constants: dict[str, Any], output: int = HALF) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", HALF, ["n", 32])],
        [helper.make_tensor_value_info("y", output, ["n", None])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _linear(density: float) -> onnx.ModelProto:
    weight = cases.sparse_array(32, 48, density=density).astype(np.float16)
    bias = RANDOM.standard_normal(48).astype(np.float16)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["h"]),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    return _model(nodes, {"w": weight, "b": bias})


def _run(model: onnx.ModelProto | Path, library: Path | None = None) -> Any:
    return cases.session(model, library).run(None, {"x": X})[0]


@pytest.mark.parametrize("kernel", ["rows", "gather"])
def test_a_linear_with_its_bias_and_activation(kernel: str, tmp_path: Path) -> None:
    model = _linear(0.2)
    output, report = cases.optimized(model, tmp_path, kernel=kernel)
    assert len(report.rewritten) == 1
    assert "float16 is computed in float32" in report.notes[0]
    expected = _run(model)
    for given in (_run(output), _run(output, sparsecomp.onnx.library_of(output))):
        assert given.dtype == np.float16
        np.testing.assert_allclose(given, expected, rtol=2e-3, atol=2e-3)


def test_what_gains_nothing_stays_in_float16(tmp_path: Path) -> None:
    output = tmp_path / "m.onnx"
    report = sparsecomp.onnx.optimize(_linear(1.0), output)
    assert not report.rewritten
    written = onnx.load(output)
    assert [node.op_type for node in written.graph.node] == ["MatMul", "Add", "Relu"]
    assert {item.data_type for item in written.graph.initializer} == {HALF}


def test_constants_branches_and_casts_inside(tmp_path: Path) -> None:
    """All places in which a graph can say float16."""
    value = numpy_helper.from_array(np.array(0.5, np.float16))
    branches = {}
    for name, op_type in (("then_branch", "Relu"), ("else_branch", "Neg")):
        nodes = [
            helper.make_node(op_type, ["h"], [op_type]),
            helper.make_node("Mul", [op_type, "inner"], [f"{name}_y"]),
        ]
        inner = numpy_helper.from_array(np.array([2.0], np.float16), "inner")
        outputs = [helper.make_tensor_value_info(f"{name}_y", HALF, ["n", 48])]
        branches[name] = helper.make_graph(nodes, name, [], outputs, [inner])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Constant", [], ["c"], value=value),
        helper.make_node("Mul", ["a", "c"], ["b"]),
        helper.make_node("Cast", ["b"], ["single"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["single"], ["d"], to=HALF),
        helper.make_node("ConstantOfShape", ["one"], ["e"], value=numpy_helper.from_array(np.ones(1, np.float16))),
        helper.make_node("Add", ["d", "e"], ["h"]),
        helper.make_node("If", ["yes"], ["y"], **branches),
    ]
    constants = {"w": cases.sparse_array(32, 48, density=0.2).astype(np.float16), "one": np.array([1]), "yes": True}
    model = _model(nodes, constants)
    output, report = cases.optimized(model, tmp_path)
    assert len(report.rewritten) == 1
    for given in (_run(output), _run(output, sparsecomp.onnx.library_of(output))):
        assert given.dtype == np.float16
        np.testing.assert_allclose(given, _run(model), rtol=4e-3, atol=4e-3)


def test_operations_of_others_keep_a_model_in_float16() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Gelu", ["h"], ["y"], domain="com.microsoft"),
    ]
    model = _model(nodes, {"w": cases.sparse_array(32, 48, density=0.2).astype(np.float16)})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    report = sparsecomp.onnx.inspect(model)
    assert not report.notes
    (choice,) = report.plan.sites
    assert "float16" in choice.reason
