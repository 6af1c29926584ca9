"""The ONNX front end: what it finds in a model and what the optimised model computes, for every form of a linear."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_cases as cases
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparsecomp.onnx
from sparsecomp.planner import SiteChoice

W = cases.sparse_array(40, 24)
V = cases.sparse_array(24, 24, seed=1)
B = np.arange(24, dtype=np.float32) / 10
X = np.random.default_rng(5).standard_normal((6, 40)).astype(np.float32)


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attributes)


def inspected(model: onnx.ModelProto) -> list[SiteChoice]:
    return list(sparsecomp.onnx.inspect(model))


def check(
    model: onnx.ModelProto, folder: Path, sites: int, feeds: Mapping[str, Any] | None = None, kernel: str = "gather"
) -> Path:
    """Every site sparse, the numbers as before; the gather kernel is the quickest to build."""
    output, report = cases.optimized(model, folder, kernel=kernel)
    assert len(report.rewritten) == sites, str(report)
    cases.check_everywhere(model, output, feeds or {"x": X})
    return output


def operations(path: Path) -> list[str]:
    return [item.op_type for item in onnx.load(path).graph.node]


# -- products -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["rows", "gather", "mask", "panel"])
@pytest.mark.parametrize("opset", [9, 13, 17])
def test_kernels_and_opsets(kernel: str, opset: int, tmp_path: Path) -> None:
    weight = cases.panel_array(70, 40) if kernel == "panel" else cases.sparse_array(70, 41)
    model = cases.linear_model(weight, np.arange(weight.shape[1], dtype=np.float32), opset=opset, rank=3)
    output, report = cases.optimized(model, tmp_path, kernel=kernel)
    assert [choice.chosen.kernel for choice in report] == [kernel]
    assert operations(output) == [operations(output)[0]]
    for shape in ((1, 1, 70), (2, 5, 70), (1, 40, 70), (0, 3, 70)):
        cases.check_everywhere(model, output, {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)})


@pytest.mark.parametrize("opset", range(9, onnx.defs.onnx_opset_version() - 1))
def test_every_opset_from_9_on(opset: int, tmp_path: Path) -> None:
    check(cases.linear_model(W, B, opset=opset), tmp_path, 1)


@pytest.mark.parametrize("attributes", [{}, {"transA": 1}, {"transB": 1}, {"transA": 1, "transB": 1}])
@pytest.mark.parametrize(
    ("bias", "scales"),
    [
        (None, {"alpha": 0.5}),
        (B, {}),
        (B, {"alpha": 2.0, "beta": 0.25}),
        (B, {"beta": 0.0}),
        (B.reshape(1, 24), {}),
        (np.float32(3), {"beta": 2.0}),
        (np.arange(6, dtype=np.float32).reshape(6, 1) * np.ones((6, 24), np.float32), {}),
    ],
)
def test_gemm(attributes: dict[str, int], bias: Any, scales: dict[str, float], tmp_path: Path) -> None:
    constants = {"w": W.T.copy() if "transB" in attributes else W} | ({} if bias is None else {"c": bias})
    x = X.T.copy() if "transA" in attributes else X
    product = helper.make_node("Gemm", ["x", *constants], ["y"], **attributes, **scales)
    model = cases.model_of([product], {"x": list(x.shape)}, constants)
    output, report = cases.optimized(model, tmp_path, kernel="gather")
    assert len(report.rewritten) == 1, str(report)
    cases.check_everywhere(model, output, {"x": x})


def test_gemm_with_a_bias_for_every_token_that_is_scaled_stays_dense() -> None:
    constants = {"w": W, "c": np.ones((6, 24), np.float32)}
    model = cases.model_of([helper.make_node("Gemm", ["x", "w", "c"], ["y"], beta=2.0)], {"x": [6, 40]}, constants)
    assert inspected(model) == []


@pytest.mark.parametrize("form", ["constant", "transpose", "identity", "cast", "dequantize", "chain"])
def test_weights_behind_other_operations(form: str, tmp_path: Path) -> None:
    nodes = {
        "constant": [node("Constant", "", "w", value=numpy_helper.from_array(W))],
        "transpose": [node("Transpose", "wt", "w", perm=[1, 0])],
        "identity": [node("Identity", "w0", "w")],
        "cast": [node("Cast", "w16", "w", to=TensorProto.FLOAT)],
        "dequantize": [node("DequantizeLinear", "w8 scale zero", "w", axis=1)],
        "chain": [
            node("Cast", "w16", "a", to=TensorProto.FLOAT),
            node("Transpose", "a", "b"),
            node("Transpose", "b", "w"),
        ],
    }[form]
    half = W.astype(np.float16)
    quantized = np.where(W == 0, 3, np.clip(np.round(W * 20) + 3, 4, 127)).astype(np.int8)
    constants = {
        "transpose": {"wt": W.T.copy()},
        "identity": {"w0": W},
        "cast": {"w16": half},
        "dequantize": {"w8": quantized, "scale": np.full(24, 0.05, np.float32), "zero": np.full(24, 3, np.int8)},
        "chain": {"w16": half},
    }.get(form, {})
    # The evaluator has DequantizeLinear from opset 19 on.
    model = cases.model_of([*nodes, node("MatMul", "x w", "y")], {"x": ["n", 40]}, constants, opset=21)
    output, _ = cases.optimized(model, tmp_path, kernel="gather")
    assert operations(output) == ["LinearGather16"]
    cases.check_everywhere(model, output, {"x": X}, exact=form == "dequantize")
    assert not set(constants) & {item.name for item in onnx.load(output).graph.initializer}


def test_a_shared_weight_is_packed_once(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x v", "a"), node("Relu", "a", "b"), node("MatMul", "b v", "y")]
    model = cases.model_of(nodes, {"x": ["n", 24]}, {"v": V})
    output = check(model, tmp_path, 2, {"x": X[:, :24]})
    names = [item.name for item in onnx.load(output).graph.initializer]
    assert len(names) == 3
    assert [choice.name for choice in inspected(model)] == ["v", "v#2"]


def test_a_weight_that_something_else_reads_stays(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x v", "a"), node("Add", "a v", "y")]
    output = check(cases.model_of(nodes, {"x": [24, 24]}, {"v": V}), tmp_path, 1, {"x": X[:1, :24].repeat(24, 0)})
    assert "v" in {item.name for item in onnx.load(output).graph.initializer}


# -- what follows a product ---------------------------------------------------------------------------------------

SQRT2 = np.float32(np.sqrt(2))
FOLLOWERS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
    "relu": ([node("Relu", "h", "y")], {}),
    "gelu op": ([node("Gelu", "h", "y")], {}),
    "gelu tanh op": ([node("Gelu", "h", "y", approximate="tanh")], {}),
    "gelu": (
        [
            node("Div", "h s", "a"),
            node("Erf", "a", "b"),
            node("Add", "b one", "c"),
            node("Mul", "h c", "d"),
            node("Mul", "d half", "y"),
        ],
        {"s": SQRT2, "one": np.float32(1), "half": np.float32(0.5)},
    ),
    "gelu, half of x first": (
        [
            node("Mul", "half h", "a"),
            node("Mul", "h s", "b"),
            node("Erf", "b", "c"),
            node("Add", "one c", "d"),
            node("Mul", "a d", "y"),
        ],
        {"s": 1 / SQRT2, "one": np.float32([1]), "half": np.float32([[0.5]])},
    ),
    "gelu tanh": (
        [
            node("Pow", "h three", "a"),
            node("Mul", "a k", "b"),
            node("Add", "h b", "c"),
            node("Mul", "c s", "d"),
            node("Tanh", "d", "e"),
            node("Add", "e one", "f"),
            node("Mul", "h half", "g"),
            node("Mul", "g f", "y"),
        ],
        {
            "three": np.float32(3),
            "k": np.float32(0.044715),
            "s": np.float32(np.sqrt(2 / np.pi)),
            "one": np.float32(1),
            "half": np.float32(0.5),
        },
    ),
    "silu": ([node("Sigmoid", "h", "a"), node("Mul", "a h", "y")], {}),
    "hardswish op": ([node("HardSwish", "h", "y")], {}),
    "hardswish": ([node("HardSigmoid", "h", "a", alpha=1 / 6, beta=0.5), node("Mul", "h a", "y")], {}),
    "relu6": ([node("Clip", "h low high", "y")], {"low": np.float32(0), "high": np.float32(6)}),
}


@pytest.mark.parametrize("name", FOLLOWERS)
def test_activations_become_part_of_the_product(name: str, tmp_path: Path) -> None:
    nodes, constants = FOLLOWERS[name]
    model = cases.model_of([node("MatMul", "x w", "h"), *nodes], {"x": ["n", 40]}, {"w": W, **constants}, opset=20)
    output = check(model, tmp_path, 1)
    assert len(operations(output)) == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gelu", {"half": np.float32(0.4)}),
        ("gelu", {"s": np.float32(1.5)}),
        ("gelu tanh", {"three": np.float32(2)}),
        ("gelu tanh", {"k": np.float32(0.05)}),
        ("relu6", {"high": np.float32(5)}),
    ],
)
def test_what_only_looks_like_an_activation_is_left_alone(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    nodes, constants = FOLLOWERS[name]
    given = {"w": W, **constants, **change}
    model = cases.model_of([node("MatMul", "x w", "h"), *nodes], {"x": ["n", 40]}, given, opset=20)
    output = check(model, tmp_path, 1)
    assert len(operations(output)) == 1 + len(nodes)


def test_a_value_inside_of_an_activation_that_is_an_output_keeps_it_apart(tmp_path: Path) -> None:
    nodes, constants = FOLLOWERS["gelu"]
    model = cases.model_of(
        [node("MatMul", "x w", "h"), *nodes], {"x": ["n", 40]}, {"w": W, **constants}, outputs={"y": 2, "c": 2}
    )
    output = check(model, tmp_path, 1)
    assert len(operations(output)) == 6


@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24), (1,), ()])
@pytest.mark.parametrize("first", [True, False])
def test_biases_of_every_shape(shape: tuple[int, ...], first: bool, tmp_path: Path) -> None:
    bias = np.resize(B + 1, shape).astype(np.float32)
    nodes = [node("MatMul", "x w", "h"), node("Add", "h b" if first else "b h", "y")]
    model = cases.model_of(nodes, {"x": [2, "n", 40]}, {"w": W, "b": bias})
    output = check(model, tmp_path, 1, {"x": X.reshape(2, 3, 40)})
    assert operations(output) == ["LinearGather16Bias"]


def test_residuals_come_last(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x v", "h"), node("Relu", "h", "r"), node("Add", "x r", "y")]
    model = cases.model_of(nodes, {"x": ["n", 24]}, {"v": V})
    output = check(model, tmp_path, 1, {"x": X[:, :24]})
    assert operations(output) == ["LinearGather16ReluAdd"]


def test_of_two_products_that_are_added_one_takes_the_other(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x v", "a"), node("MatMul", "x u", "b"), node("Add", "a b", "y")]
    model = cases.model_of(nodes, {"x": ["n", 24]}, {"v": V, "u": cases.sparse_array(24, 24, seed=9)})
    output = check(model, tmp_path, 2, {"x": X[:, :24]})
    assert operations(output) == ["LinearGather16", "LinearGather16Add"]


# -- graphs inside of graphs --------------------------------------------------------------------------------------


def branch(name: str, nodes: list[onnx.NodeProto], constants: Mapping[str, Any] = {}) -> onnx.GraphProto:
    output = helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 24])
    return helper.make_graph(nodes, name, [], [output], [numpy_helper.from_array(a, n) for n, a in constants.items()])


def test_branches_of_an_if(tmp_path: Path) -> None:
    then = branch("t", [node("MatMul", "h v", "t")])
    other = branch(
        "e", [node("MatMul", "h u", "e0"), node("Relu", "e0", "e")], {"u": cases.sparse_array(24, 24, seed=2)}
    )
    nodes = [
        node("MatMul", "x w", "h"),
        node("ReduceSum", "h", "sum", keepdims=0),
        node("Greater", "sum zero", "positive"),
        node("If", "positive", "y", then_branch=then, else_branch=other),
    ]
    model = cases.model_of(nodes, {"x": ["n", 40]}, {"w": W, "v": V, "zero": np.float32(0)})
    output = check(model, tmp_path, 3)
    cases.check_everywhere(model, output, {"x": -X})


def test_the_body_of_a_loop(tmp_path: Path) -> None:
    state = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 24]) for name in ("s", "s2")]
    flags = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go", "go2")]
    count = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    nodes = [
        node("MatMul", "s v", "p"),
        node("Add", "p b", "q"),
        node("Relu", "q", "s2"),
        node("Identity", "go", "go2"),
    ]
    body = helper.make_graph(nodes, "body", [count, flags[0], state[0]], [flags[1], state[1]])
    loop = node("Loop", "times yes x", "y", body=body)
    constants = {"v": V, "b": B, "times": np.int64(3), "yes": np.bool_(True)}
    model = cases.model_of([loop], {"x": ["n", 24]}, constants)
    check(model, tmp_path, 1, {"x": X[:, :24]})


def test_functions_of_the_model(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    body = [node("MatMul", "a k", "h"), node("Relu", "h", "r")]
    function = helper.make_function("mine", "Layer", ["a", "k"], ["r"], body, opsets[:1])
    nodes = [helper.make_node("Layer", ["x", "v"], ["h1"], domain="mine")]
    nodes.append(helper.make_node("Layer", ["h1", "v"], ["y"], domain="mine"))
    model = cases.model_of(nodes, {"x": ["n", 24]}, {"v": V})
    model.functions.append(function)
    model.opset_import.append(opsets[1])
    check(model, tmp_path, 2, {"x": X[:, :24]})


# -- convolutions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [9, 13])
def test_zeros_that_a_node_puts_around_maps(opset: int, tmp_path: Path) -> None:
    pads = [0, 0, 1, 0, 0, 0, 2, 1]
    if opset < 11:
        pad, constants = node("Pad", "x", "p", pads=pads), {}
    else:
        pad, constants = node("Pad", "x pads", "p"), {"pads": np.array(pads, np.int64)}
    nodes = [pad, node("Conv", "p w", "y", pads=[0, 1, 0, 1])]
    model = cases.model_of(
        nodes, {"x": ["n", 6, 9, 10]}, {**constants, "w": cases.sparse_array(8, 6, 3, 3)}, opset=opset
    )
    output = check(
        model, tmp_path, 1, {"x": np.random.default_rng(2).standard_normal((2, 6, 9, 10)).astype(np.float32)}
    )
    assert len(operations(output)) == 1


@pytest.mark.parametrize("attributes", [{"pads": [1, 1, 0, 0]}, {"auto_pad": "SAME_LOWER"}])
def test_more_zeros_before_than_behind_stay_dense(attributes: dict[str, Any]) -> None:
    model = cases.model_of(
        [node("Conv", "x w", "y", **attributes)], {"x": [2, 6, 9, 10]}, {"w": cases.sparse_array(8, 6, 2, 2)}
    )
    assert not sparsecomp.onnx.inspect(model).rewritten


def test_a_constant_on_the_left(tmp_path: Path) -> None:
    weight = cases.sparse_array(24, 40, density=0.1)
    feeds = {"x": np.random.default_rng(3).standard_normal((2, 40, 50)).astype(np.float32)}
    nodes = [node("MatMul", "w x", "h"), node("Relu", "h", "y")]
    output = check(cases.model_of(nodes, {"x": ["n", 40, 50]}, {"w": weight}), tmp_path, 1, feeds)
    assert operations(output) == ["Conv1d1Relu"]
    # What is added to the last dimension is no bias of its outputs.
    nodes = [node("MatMul", "w x", "h"), node("Add", "h b", "y")]
    constants = {"w": weight, "b": np.arange(50, dtype=np.float32)}
    check(cases.model_of(nodes, {"x": ["n", 40, 50]}, constants), tmp_path, 1, feeds)


@pytest.mark.parametrize(
    ("weight", "x", "attributes"),
    [
        ((9, 6, 3, 3), (2, 6, 9, 10), {"pads": [1, 1, 1, 1]}),
        ((8, 6, 3, 3), (1, 6, 9, 11), {"pads": [1, 0, 1, 0], "strides": [2, 3], "dilations": [2, 1]}),
        ((8, 6, 1, 1), (3, 6, 5, 5), {}),
        ((8, 3, 2, 3), (2, 6, 7, 7), {"group": 2, "pads": [2, 2, 2, 2]}),
        ((8, 6, 3), (2, 6, 17), {"pads": [1, 1], "strides": [2]}),
        ((8, 6, 3), (2, 6, 17), {"auto_pad": "VALID"}),
        ((8, 6, 3, 2), (2, 6, 9, 10), {"pads": [0, 0, 1, 2], "strides": [1, 2]}),
        ((8, 6, 4, 4), (2, 6, 9, 10), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
        ((8, 6, 2), (2, 6, 17), {"auto_pad": "SAME_UPPER"}),
    ],
)
@pytest.mark.parametrize("opset", [10, 11, 17])
def test_convolutions(
    weight: tuple[int, ...], x: tuple[int, ...], attributes: dict[str, Any], opset: int, tmp_path: Path
) -> None:
    constants = {"w": cases.sparse_array(*weight), "b": np.arange(weight[0], dtype=np.float32)}
    model = cases.model_of(
        [node("Conv", "x w b", "h", **attributes), node("Relu", "h", "y")], {"x": x}, constants, opset=opset
    )
    output, report = cases.optimized(model, tmp_path)
    assert [choice.chosen.kernel for choice in report] == ["conv"]
    assert len(operations(output)) == 1
    feeds = {"x": np.random.default_rng(0).standard_normal(x).astype(np.float32)}
    cases.check_everywhere(model, output, feeds)


@pytest.mark.parametrize("first", [True, False])
def test_convolutions_take_normalisation_residual_and_activation(first: bool, tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    norm = {name: generator.random(6).astype(np.float32) + 0.5 for name in ("scale", "shift", "mean", "variance")}
    after = ["Add", "Relu"] if first else ["Relu", "Add"]
    nodes = [
        node("Conv", "x w", "a", pads=[1, 1, 1, 1]),
        node("BatchNormalization", "a scale shift mean variance", "b"),
        node(after[0], "b x" if first else "b", "c"),
        node(after[1], "c" if first else "c x", "y"),
    ]
    model = cases.model_of(nodes, {"x": ["n", 6, "h", "l"]}, {"w": cases.sparse_array(6, 6, 3, 3), **norm})
    output, _ = cases.optimized(model, tmp_path)
    assert operations(output) == ["Conv2d3x3P1x1BiasAddRelu" if first else "Conv2d3x3P1x1BiasReluAdd"]
    for shape in ((1, 6, 8, 8), (3, 6, 20, 7)):
        cases.check_everywhere(model, output, {"x": generator.standard_normal(shape).astype(np.float32)})


@pytest.mark.parametrize("shape", [(40, "n"), (2, 3, 40, "n"), ("b", 3, 40, 5), ("b", "c", 40, 5)])
def test_a_constant_on_the_left_of_any_rank(shape: tuple[int | str, ...], tmp_path: Path) -> None:
    """Behind it an activation; some sizes may be open, as long as a reshape can find them out."""
    model = cases.model_of([node("MatMul", "w x", "h"), node("Relu", "h", "y")], {"x": shape}, {"w": W.T.copy()})
    found = int(sum(isinstance(size, str) for size in shape) == 1)
    output, report = cases.optimized(model, tmp_path)
    assert len(report.rewritten) == found
    library = sparsecomp.onnx.library_of(output) if found else None
    x = (
        np.random.default_rng(6)
        .standard_normal([4 if isinstance(size, str) else size for size in shape])
        .astype(np.float32)
    )
    for session in (cases.session(output), cases.session(output, library)):
        cases.close(session.run(None, {"x": x})[0], cases.session(model).run(None, {"x": x})[0])


def test_a_product_that_stays_dense_is_written_as_it_was(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x v", "h"), node("Transpose", "h", "t", perm=[1, 0]), node("MatMul", "w t", "y")]
    model = cases.model_of(nodes, {"x": ["n", 40]}, {"v": W, "w": np.ones((7, 24), np.float32)})
    output, report = cases.optimized(model, tmp_path)
    assert len(report.rewritten) == 1
    assert [item.op_type for item in onnx.load(output).graph.node][1:] == ["Transpose", "MatMul"]


def test_a_matrix_in_a_batch_of_one(tmp_path: Path) -> None:
    model = cases.model_of([node("MatMul", "x w", "y")], {"x": ["b", "n", 40]}, {"w": W[None]})
    output, report = cases.optimized(model, tmp_path)
    assert len(report.rewritten) == 1
    x = np.random.default_rng(6).standard_normal((2, 3, 40)).astype(np.float32)
    cases.close(cases.session(output).run(None, {"x": x})[0], x @ W)


def test_several_matrices_stay_dense() -> None:
    weights = np.stack([W, W])
    (choice,) = inspected(cases.model_of([node("MatMul", "x w", "y")], {"x": [2, "n", 40]}, {"w": weights}))
    assert "a matrix is expected" in choice.reason


# -- what stays dense ---------------------------------------------------------------------------------------------


def test_reasons() -> None:
    short = W.astype(ml_dtypes.bfloat16)
    models = {
        "computed": cases.model_of([node("Mul", "w w", "w2"), node("MatMul", "x w2", "y")], {"x": ["n", 40]}, {"w": W}),
        "no zeros": cases.linear_model(np.ones((4, 4), np.float32)),
        "bfloat16": cases.model_of(
            [node("Cast", "x", "x16", to=16), node("MatMul", "x16 w", "h"), node("Cast", "h", "y", to=1)],
            {"x": ["n", 40]},
            {"w": short},
        ),
        "on the left": cases.model_of([node("MatMul", "w x", "y")], {"x": ["b", 2, 24, "n"]}, {"w": W}),
    }
    for expected, model in models.items():
        (choice,) = inspected(model)
        assert choice.chosen.is_dense
        assert expected in choice.reason


def test_an_initializer_that_the_caller_may_replace_is_no_constant() -> None:
    model = cases.linear_model(W)
    model.graph.input.append(helper.make_tensor_value_info("layer.weight", TensorProto.FLOAT, W.shape))
    assert inspected(model) == []


def test_in_old_models_initializers_are_inputs_by_rule(tmp_path: Path) -> None:
    model = cases.linear_model(W, opset=9)
    model.graph.input.append(helper.make_tensor_value_info("layer.weight", TensorProto.FLOAT, W.shape))
    model.ir_version = 3
    check(model, tmp_path, 1)


def test_very_old_opsets_are_left_as_they_are(tmp_path: Path) -> None:
    model = cases.linear_model(W, opset=8)
    report = sparsecomp.onnx.optimize(model, tmp_path / "m.onnx")
    assert len(report) == 0
    assert "opset 8" in str(report)
    cases.close(cases.session(tmp_path / "m.onnx").run(None, {"x": X})[0], cases.session(model).run(None, {"x": X})[0])


def test_names_are_those_of_the_modules() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["a"], name="/encoder/layer.0/query/MatMul"),
        helper.make_node("Gemm", ["a", "head.weight"], ["y"], name="/head/Gemm", transB=1),
    ]
    model = cases.model_of(nodes, {"x": ["n", 40]}, {"onnx::MatMul_7": W, "head.weight": V})
    assert [choice.name for choice in inspected(model)] == ["encoder.layer.0.query", "head"]
