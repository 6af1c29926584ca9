"""Dead hidden units and channels are removed for real, and the numbers stay."""

from __future__ import annotations

from collections.abc import Sequence
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


def _attention(constant: bool, dead: dict[str, list[int]]) -> onnx.ModelProto:
    """An attention of 4 heads of 6; `dead` says which heads are not read, and of which the values are zero."""
    heads, size, width = 4, 6, 24
    constants: dict[str, Any] = {name: RANDOM.standard_normal((width, width)).astype(np.float32) for name in "qkvo"}
    constants |= {f"b{name}": RANDOM.standard_normal(width).astype(np.float32) for name in "qkvo"}
    for head in dead.get("o", []):
        constants["o"][head * size : (head + 1) * size] = 0
    for head in dead.get("v", []):
        constants["v"][:, head * size : (head + 1) * size] = 0
        constants["bv"][head * size : (head + 1) * size] = 0
    constants |= {
        "scale": np.float32(size**0.5),
        "cut": np.array([0, -1, heads, size]),
        "join": np.array([0, -1, width]),
    }
    nodes = []
    for name in "qkv":
        nodes.append(helper.make_node("MatMul", ["x", name], [f"{name}1"]))
        nodes.append(helper.make_node("Add", [f"{name}1", f"b{name}"], [f"{name}2"]))
        cut = "cut"
        if not constant:
            cut = f"cut{name}"
            nodes.append(helper.make_node("Shape", [f"{name}2"], [f"shape{name}"]))
            nodes.append(helper.make_node("Slice", [f"shape{name}", "zero", "two"], [f"front{name}"]))
            nodes.append(helper.make_node("Concat", [f"front{name}", "heads", "size"], [cut], axis=0))
        nodes.append(helper.make_node("Reshape", [f"{name}2", cut], [f"{name}3"]))
        perm = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        nodes.append(helper.make_node("Transpose", [f"{name}3"], [f"{name}4"], perm=perm))
    nodes += [
        helper.make_node("MatMul", ["q4", "k4"], ["s1"]),
        helper.make_node("Div", ["s1", "scale"], ["s2"]),
        helper.make_node("Add", ["s2", "mask"], ["s3"]),
        helper.make_node("Softmax", ["s3"], ["s4"], axis=-1),
        helper.make_node("MatMul", ["s4", "v4"], ["m1"]),
        helper.make_node("Transpose", ["m1"], ["m2"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["m2", "join"], ["m3"]),
        helper.make_node("MatMul", ["m3", "o"], ["o1"]),
        helper.make_node("Add", ["o1", "bo"], ["o2"]),
        helper.make_node("Add", ["o2", "x"], ["y"]),
    ]
    if not constant:
        constants |= {
            name: np.array([number]) for name, number in (("zero", 0), ("two", 2), ("heads", heads), ("size", size))
        }
    return cases.model_of(nodes, {"x": ["n", "t", width], "mask": ["n", 1, 1, "t"]}, constants)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(
    ("dead", "removed"), [({"o": [1]}, 1), ({"v": [0, 3]}, 2), ({"o": [1, 2], "v": [0, 3]}, 3), ({}, 0)]
)
def test_heads_of_attention(constant: bool, dead: dict[str, list[int]], removed: int, tmp_path: Path) -> None:
    model = _attention(constant, dead)
    found = sparsecomp.onnx.shrink(model, tmp_path / "m.onnx")
    assert [str(layer) for layer in found] == ([f"o: {removed} of 4 heads removed"] if removed else [])
    x = RANDOM.standard_normal((2, 5, 24)).astype(np.float32)
    mask = np.where(RANDOM.random((2, 1, 1, 5)) < 0.3, np.float32(-1e9), np.float32(0))
    shapes = _check(model, tmp_path / "m.onnx", {"x": x, "mask": mask})
    left = 24 - 6 * removed
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    assert sorted(matrices) == sorted([*[(24, left)] * 3, (left, 24)])


def test_heads_that_something_mixes_stay(tmp_path: Path) -> None:
    model = _attention(True, {"o": [1]})
    model.graph.input[1].CopyFrom(helper.make_tensor_value_info("mask", onnx.TensorProto.FLOAT, ["n", 4, 1, "t"]))
    assert sparsecomp.onnx.shrink(model, tmp_path / "m.onnx") == []


def test_heads_of_a_real_model(tmp_path: Path) -> None:
    model = cases.paraphrase()
    weights = [item for item in model.graph.initializer if list(item.dims) == [384, 384]]
    used = {n.input[1]: n.name for n in model.graph.node if n.op_type == "MatMul"}
    for item in weights:
        if "attention/output" in used.get(item.name, ""):
            array = numpy_helper.to_array(item).copy()
            array[64:128] = 0  # two of its twelve heads of 32
            item.CopyFrom(numpy_helper.from_array(array, item.name))
    found = sparsecomp.onnx.shrink(model, tmp_path / "m.onnx")
    assert [(layer.units, layer.removed) for layer in found if layer.kind == "heads"] == [(12, 2)] * 3
    for feeds in (cases.token_feeds(1, 20), cases.token_feeds(3, 7)):
        for value, wanted in zip(
            cases.session(tmp_path / "m.onnx").run(None, feeds), cases.session(model).run(None, feeds), strict=True
        ):
            cases.close(value, wanted, 1e-4)


class _Decoder:
    """Blocks of a decoder's form, without attention's product: `x + down(gate * up)` behind an RMS normalisation."""

    def __init__(self, width: int, dead: Sequence[int], opset: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Any] = {}
        self.width, self.dead, self.opset = width, list(dead), opset

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(self, array: Any) -> str:
        self.constants[f"c{len(self.constants)}"] = np.asarray(array)
        return f"c{len(self.constants) - 1}"

    def weight(self, inputs: int, outputs: int, *, writes: bool = False) -> str:
        """A weight whose outputs leave the dead directions of the stream alone, if it writes to that."""
        array = (RANDOM.standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(np.float32)
        if writes:
            array[:, self.dead] = 0
        return self.constant(array)

    def norm(self, x: str) -> str:
        scale = self.constant(RANDOM.uniform(0.5, 1.5, self.width).astype(np.float32))
        if self.opset >= 23:
            return self.op("RMSNormalization", x, scale, epsilon=1e-3)
        square = self.op("Pow", x, self.constant(np.float32(2)))
        axes = {"axes": [-1]} if self.opset < 18 else {}
        last = [self.constant(np.array([-1]))] if self.opset >= 18 else []
        mean = self.op("ReduceMean", square, *last, keepdims=1, **axes)
        root = self.op("Sqrt", self.op("Add", mean, self.constant(np.float32(1e-3))))
        return self.op("Mul", self.op("Div", x, root), scale)

    def block(self, x: str) -> str:
        h = self.norm(x)
        gate = self.op("MatMul", h, self.weight(self.width, 20))
        gated = self.op(
            "Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), self.op("MatMul", h, self.weight(self.width, 20))
        )
        return self.op("Add", self.op("MatMul", gated, self.weight(20, self.width, writes=True)), x)


def _stream(width: int, dead: Sequence[int], opset: int, *, rotated: bool = False) -> onnx.ModelProto:
    """A model of token numbers with two blocks; rotated, other directions are dead behind the first."""
    decoder = _Decoder(width, dead, opset)
    table = RANDOM.standard_normal((11, width)).astype(np.float32)
    table[:, list(dead)] = 0
    x = decoder.block(decoder.op("Gather", decoder.constant(table), "ids"))
    if rotated:
        decoder.dead = [channel for channel in range(width) if channel not in dead][: len(dead)]
        x = decoder.op("MatMul", x, decoder.weight(width, width, writes=True))
    x = decoder.norm(decoder.block(x))
    decoder.nodes.append(helper.make_node("MatMul", [x, decoder.weight(width, 11)], ["y"]))
    model = cases.model_of(decoder.nodes, {"ids": ["n", "t"]}, decoder.constants, opset=opset, ir_version=10)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None] * 3))
    return model


@pytest.mark.parametrize("opset", [11, 18, 23])
@pytest.mark.parametrize("rotated", [False, True])
def test_dead_directions_of_a_residual_stream(opset: int, rotated: bool, tmp_path: Path) -> None:
    """As SliceGPT leaves them: zero in the embedding and in every weight that writes to the stream."""
    model = _stream(24, [2, 3, 7, 20, 23], opset, rotated=rotated)
    found = sparsecomp.onnx.shrink(model, tmp_path / "m.onnx")
    assert [(layer.units, layer.removed, layer.kind) for layer in found] == [(24, 5, "channels")] * (1 + rotated)
    shapes = _check(model, tmp_path / "m.onnx", {"ids": RANDOM.integers(0, 11, (2, 7))})
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    assert sorted(matrices) == sorted([(11, 19), *[(19, 20)] * 4, *[(20, 19)] * 2, (19, 11), *[(19, 19)] * rotated])


def test_a_stream_with_layer_normalisation_keeps_its_directions(tmp_path: Path) -> None:
    """The mean makes something of zeros."""
    decoder = _Decoder(16, [1, 5], 17)
    table = RANDOM.standard_normal((11, 16)).astype(np.float32)
    table[:, [1, 5]] = 0
    x = decoder.op("Gather", decoder.constant(table), "ids")
    scale, shift = decoder.constant(np.ones(16, np.float32)), decoder.constant(np.zeros(16, np.float32))
    h = decoder.op("LayerNormalization", x, scale, shift)
    x = decoder.op("Add", decoder.op("MatMul", h, decoder.weight(16, 16, writes=True)), x)
    decoder.nodes.append(helper.make_node("MatMul", [x, decoder.weight(16, 4)], ["y"]))
    model = cases.model_of(decoder.nodes, {"ids": ["n"]}, decoder.constants)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None] * 2))
    assert sparsecomp.onnx.shrink(model, tmp_path / "m.onnx") == []


def test_units_of_a_gated_ffn(tmp_path: Path) -> None:
    """A unit goes through two linears; it is dead where one of them or the next is zero."""
    gate, up, down = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((8, 12), (8, 12), (12, 8)))
    gate[:, 1], up[:, 4], down[9] = 0, 0, 0
    nodes = [
        helper.make_node("MatMul", ["x", "gate"], ["g"]),
        helper.make_node("Sigmoid", ["g"], ["s"]),
        helper.make_node("Mul", ["g", "s"], ["a"]),
        helper.make_node("MatMul", ["x", "up"], ["u"]),
        helper.make_node("Mul", ["a", "u"], ["h"]),
        helper.make_node("MatMul", ["h", "down"], ["y"]),
    ]
    model = cases.model_of(nodes, {"x": ["n", 8]}, {"gate": gate, "up": up, "down": down})
    assert [layer.removed for layer in sparsecomp.onnx.shrink(model, tmp_path / "m.onnx")] == [3]
    shapes = _check(model, tmp_path / "m.onnx", {"x": RANDOM.standard_normal((5, 8)).astype(np.float32)})
    assert sorted(shapes.values()) == [(8, 9), (8, 9), (9, 8)]


def test_channels_of_a_residual_network(tmp_path: Path) -> None:
    """Convolutions that add to the same maps, with normalisations, a depthwise one, pooling and a classifier behind."""

    def weight(*shape: int, dead: Sequence[int] = (1, 4)) -> Any:
        array = RANDOM.standard_normal(shape).astype(np.float32)
        array[list(dead)] = 0
        return array

    constants: dict[str, Any] = {"w0": weight(6, 3, 3, 3), "w1": weight(6, 6, 3, 3), "w2": weight(6, 1, 3, 3, dead=())}
    constants |= {name: RANDOM.uniform(0.5, 2, 6).astype(np.float32) for name in ("scale", "shift", "mean", "variance")}
    constants["shift"][[1, 4]] = constants["mean"][[1, 4]] = 0
    constants |= {"w3": RANDOM.standard_normal((5, 6)).astype(np.float32), "b3": np.ones(5, np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c0", "scale", "shift", "mean", "variance"], ["n0"]),
        helper.make_node("Relu", ["n0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c1", "r0"], ["a"]),
        helper.make_node("Conv", ["a", "w2"], ["c2"], group=6),
        helper.make_node("GlobalAveragePool", ["c2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], transB=1),
    ]
    model = cases.model_of(nodes, {"x": ["n", 3, 8, 9]}, constants, outputs={"y": 2})
    found = sparsecomp.onnx.shrink(model, tmp_path / "m.onnx")
    assert [(layer.units, layer.removed) for layer in found] == [(6, 2)]
    shapes = _check(model, tmp_path / "m.onnx", {"x": RANDOM.standard_normal((2, 3, 8, 9)).astype(np.float32)})
    assert {(4, 3, 3, 3), (4, 4, 3, 3), (4, 1, 3, 3), (5, 4), (4,)} <= set(shapes.values())


def test_channels_of_a_real_network(tmp_path: Path) -> None:
    model = cases.opennsfw()
    for item in model.graph.initializer:
        if len(item.dims) == 4:
            array = numpy_helper.to_array(item).copy()
            array[RANDOM.random(array.shape[0]) < 0.3] = 0
            array[:, RANDOM.random(array.shape[1]) < 0.3] = 0
            item.CopyFrom(numpy_helper.from_array(array, item.name))
    found = sparsecomp.onnx.shrink(model, tmp_path / "m.onnx")
    assert len(found) > 30
    feeds = {"input:0": (RANDOM.random((1, 224, 224, 3)) * 255 - 110).astype(np.float32)}
    for value, wanted in zip(
        cases.session(tmp_path / "m.onnx").run(None, feeds), cases.session(model).run(None, feeds), strict=True
    ):
        cases.close(value, wanted)


@pytest.mark.parametrize(("entries", "removed"), [([0, 1], 2), ([1, 2], 0)])
def test_who_sees_the_size_of_a_stream_keeps_it(entries: list[int], removed: int, tmp_path: Path) -> None:
    w1, b1 = RANDOM.standard_normal((8, 12)).astype(np.float32), np.zeros(12, np.float32)
    w2 = RANDOM.standard_normal((12, 8)).astype(np.float32)
    w2[[3, 5]] = 0
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Add", ["a", "b1"], ["h"]),
        helper.make_node("Shape", ["h"], ["shape"]),
        helper.make_node("Gather", ["shape", "entries"], ["sizes"]),
        helper.make_node("Cast", ["sizes"], ["z"], to=onnx.TensorProto.FLOAT),
        helper.make_node("MatMul", ["h", "w2"], ["y"]),
    ]
    constants = {"w1": w1, "b1": b1, "w2": w2, "entries": np.array(entries)}
    model = cases.model_of(nodes, {"x": ["n", "t", 8]}, constants, outputs={"y": 3, "z": 1})
    found = sparsecomp.onnx.shrink(model, tmp_path / "m.onnx")
    assert sum(layer.removed for layer in found) == removed
    _check(model, tmp_path / "m.onnx", {"x": RANDOM.standard_normal((2, 3, 8)).astype(np.float32)})


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
