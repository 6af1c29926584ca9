"""Dead hidden units and channels are removed for real, and the numbers stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_cases as cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from typer.testing import CliRunner

import sparsecomp.onnx
from sparsecomp.cli import app

RANDOM = np.random.default_rng(11)


def _check(model: onnx.ModelProto, output: Path, feeds: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The same numbers from standard operations; the shapes of the constants of the result."""
    onnx.checker.check_model(str(output), full_check=True)
    written = onnx.load(output)
    assert {node.domain for node in written.graph.node} == {""}
    assert not written.functions
    for given_, expected in zip(
        cases.session(output).run(None, feeds), cases.session(model).run(None, feeds), strict=True
    ):
        cases.close(given_, expected)
    return {item.name: tuple(item.dims) for item in written.graph.initializer}


def _ffn(w1: Any, b1: Any, w2: Any, activation: str = "Relu", opset: int = 17, **more: int) -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Add", ["a", "b1"], ["b"]),
        helper.make_node(activation, ["b"], ["h"]),
        helper.make_node("MatMul", ["h", "w2"], ["c"]),
        helper.make_node("Add", ["c", "x"], ["y"]),
    ]
    outputs = {"y": 2, **more}
    return cases.model_of(nodes, {"x": ["n", 8]}, {"w1": w1, "b1": b1, "w2": w2}, outputs=outputs, opset=opset)


@settings(max_examples=40, deadline=None)
@given(
    unread=st.sets(st.integers(0, 11)),
    unmade=st.sets(st.integers(0, 11)),
    activation=st.sampled_from(["Relu", "HardSwish"]),
)
def test_units_of_an_ffn(
    tmp_path_factory: pytest.TempPathFactory, unread: set[int], unmade: set[int], activation: str
) -> None:
    w1, b1, w2 = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((8, 12), (12,), (12, 8)))
    w2[sorted(unread)] = 0
    w1[:, sorted(unmade)] = 0
    model = _ffn(w1, b1, w2, activation)
    output = tmp_path_factory.getbasetemp() / "ffn.onnx"
    found = sparsecomp.onnx.shrink(model, output)
    removed = min(len(unread | unmade), 11)
    assert sum(layer.removed for layer in found) == removed
    shapes = _check(model, output, {"x": RANDOM.standard_normal((5, 8)).astype(np.float32)})
    assert sorted(shape for shape in shapes.values() if len(shape) == 2) == sorted(
        [(8, 12 - removed), (12 - removed, 8)]
    )


def test_a_hidden_value_that_is_read_elsewhere_stays(tmp_path: Path) -> None:
    w1, b1, w2 = np.ones((8, 12), np.float32), np.zeros(12, np.float32), np.zeros((12, 8), np.float32)
    model = _ffn(w1, b1, w2, h=2)
    assert sparsecomp.onnx.shrink(model, tmp_path / "m.onnx") == []


@pytest.mark.parametrize("opset", [9, 13, 17])
def test_channels_along_a_chain(opset: int, tmp_path: Path) -> None:
    weights = [RANDOM.standard_normal(shape).astype(np.float32) for shape in ((6, 3, 3, 3), (7, 6, 1, 1), (4, 7, 3, 3))]
    biases = [RANDOM.standard_normal(w.shape[0]).astype(np.float32) for w in weights]
    weights[1][:, [0, 2]] = 0  # nobody reads these two channels of the first
    weights[1][5] = 0  # nothing goes into this one of the second, whose bias ReLU makes zero
    biases[1][5] = -1
    weights[1][6] = 0  # nor into this one, but its constant would be missing at the borders
    biases[1][6] = 1
    nodes, x = [], "x"
    for index in range(3):
        pads = [1, 1, 1, 1] if index != 1 else [0, 0, 0, 0]
        nodes.append(helper.make_node("Conv", [x, f"w{index}", f"b{index}"], [f"c{index}"], pads=pads))
        nodes.append(helper.make_node("Relu", [f"c{index}"], ["y" if index == 2 else f"r{index}"]))
        x = f"r{index}"
    constants = {f"w{i}": w for i, w in enumerate(weights)} | {f"b{i}": b for i, b in enumerate(biases)}
    model = cases.model_of(nodes, {"x": [1, 3, 8, 9]}, constants, opset=opset)
    found = sparsecomp.onnx.shrink(model, tmp_path / "m.onnx")
    assert [(layer.units, layer.removed) for layer in found] == [(6, 2), (7, 1)]
    shapes = _check(model, tmp_path / "m.onnx", {"x": RANDOM.standard_normal((1, 3, 8, 9)).astype(np.float32)})
    assert {(4, 3, 3, 3), (6, 4, 1, 1), (4, 6, 3, 3)} <= set(shapes.values())


def test_the_command(tmp_path: Path) -> None:
    w1, b1 = RANDOM.standard_normal((8, 12)).astype(np.float32), np.zeros(12, np.float32)
    w2 = cases.sparse_array(12, 8, density=0.9)
    w2[3] = 0
    onnx.save(_ffn(w1, b1, w2), tmp_path / "m.onnx")
    runner = CliRunner()
    result = runner.invoke(app, ["optimize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "out.onnx"), "--portable"])
    assert result.exit_code == 0, result.output
    assert "1 of 12 units removed" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "out.onnx"]
    arguments = ["optimize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o.onnx"), "--portable", "--target", "x86"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert "--portable chooses no kernels" in result.stderr
    kept = {item.name: numpy_helper.to_array(item) for item in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert any(array.shape == (11, 8) for array in kept.values())
