"""QDQ models against ONNX Runtime, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsecomp.frontends.onnx_load import load
from sparsecomp.hls.importing import network_of
from sparsecomp.hls.network import Linear, Lookup, Network, Pool
from sparsecomp.hls.quantise import quantise

RNG = np.random.default_rng(0)


def model_of(nodes: list[onnx.NodeProto], shape: list[int | str], rank: int, **constants: Any) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def imported(model: onnx.ModelProto, samples: np.ndarray) -> tuple[ir.Model, Network]:
    done = quantise(load(model), "test", {"x": samples})
    return done, network_of(done, "test")


def furthest(done: ir.Model, network: Network, x: np.ndarray) -> tuple[float, float]:
    """The largest distance to ONNX Runtime in steps of the output, and the share of values that differ."""
    session = onnxruntime.InferenceSession(ir.to_proto(done).SerializeToString(), providers=["CPUExecutionProvider"])
    distances = []
    for row in x:
        (expected,) = session.run(None, {"x": row[None]})
        given = network.quantise(row)
        given = given.reshape(len(given), -1).T if row.ndim == 3 else given[None]
        got = network.real(network.run(given))
        if expected.ndim == 4:
            expected = expected[0].reshape(expected.shape[1], -1).T
        distances.append(np.rint(np.abs(got - expected) / network.scales[1]))
    every = np.concatenate([distance.reshape(-1) for distance in distances])
    return float(every.max()), float((every > 0).mean())


def test_a_feed_forward_block_is_what_onnx_runtime_computes() -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], transB=1),
        helper.make_node("Gelu", ["h"], ["g"]),
        helper.make_node("MatMul", ["g", "w2"], ["m"]),
        helper.make_node("Add", ["m", "b2"], ["y"]),
    ]
    model = model_of(nodes, ["n", 24], 2, w1=normal(48, 24), b1=normal(48), w2=normal(48, 8), b2=normal(8))
    done, network = imported(model, normal(64, 24))
    assert [type(layer) for layer in network.layers] == [Linear, Lookup, Linear]
    worst, share = furthest(done, network, normal(32, 24))
    assert worst <= 1
    assert share < 0.02


def test_a_convolutional_network_is_within_a_step_of_onnx_runtime() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], pads=[1, 1, 0, 1], strides=[1, 2]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MaxPool", ["b"], ["c"], kernel_shape=[2, 2], strides=[2, 1]),
        helper.make_node("Conv", ["c", "w2"], ["d"], group=2, auto_pad="SAME_UPPER"),
        helper.make_node("Clip", ["d", "zero", "six"], ["e"]),
        helper.make_node("GlobalAveragePool", ["e"], ["f"]),
        helper.make_node("Flatten", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "w3", "b3"], ["y"], transB=1),
    ]
    constants = {
        "w1": normal(8, 2, 3, 3),
        "b1": normal(8),
        "w2": normal(12, 4, 3, 3),
        "w3": normal(5, 12),
        "b3": normal(5),
    }
    constants |= {"zero": np.float32(0), "six": np.float32(6)}
    done, network = imported(model_of(nodes, [1, 2, 10, 8], 2, **constants), normal(32, 2, 10, 8))
    assert [type(layer) for layer in network.layers] == [Linear, Pool, Linear, Pool, Linear]
    worst, share = furthest(done, network, normal(32, 2, 10, 8))
    assert worst <= 1
    assert share < 0.25


def depthwise(at: int, channels: int, outputs: int, taps: tuple[int, ...]) -> tuple[list[onnx.NodeProto], dict]:
    """A depthwise and a pointwise convolution, from h{at} to h{at + 1}."""
    pads = [size // 2 for size in taps]
    nodes = [
        helper.make_node("Conv", [f"h{at}", f"d{at}"], [f"e{at}"], group=channels, pads=[*pads, *pads], name=f"dw{at}"),
        helper.make_node("Relu", [f"e{at}"], [f"f{at}"]),
        helper.make_node("Conv", [f"f{at}", f"p{at}"], [f"g{at}"], name=f"pw{at}"),
        helper.make_node("Relu", [f"g{at}"], [f"h{at + 1}"]),
    ]
    ones = (1,) * len(taps)
    return nodes, {f"d{at}": normal(channels, 1, *taps), f"p{at}": normal(outputs, channels, *ones)}


@pytest.mark.parametrize("sizes", [(1, 25, 10), (10, 25)])
def test_a_keyword_spotter_of_separable_convolutions_is_within_a_step(sizes: tuple[int, ...]) -> None:
    two = len(sizes) == 3
    taps, first = ((3, 3), normal(8, 1, 10, 4)) if two else ((9,), normal(8, 10, 3))
    pads = [5, 1, 5, 1] if two else [1, 1]
    nodes = [helper.make_node("Conv", ["x", "w"], ["h"], strides=[2] * len(taps), pads=pads)]
    nodes.append(helper.make_node("Relu", ["h"], ["h0"]))
    parts = [depthwise(0, 8, 8, taps), depthwise(1, 8, 12, taps)]
    axes = np.array([-1, -2] if two else [-1])
    nodes += [node for part, _ in parts for node in part] + [
        helper.make_node("ReduceMean", ["h2", "axes"], ["m"], keepdims=0),
        helper.make_node("Gemm", ["m", "v"], ["y"], transB=1),
    ]
    constants = {"w": first, "axes": axes, "v": normal(6, 12)} | parts[0][1] | parts[1][1]
    done, network = imported(model_of(nodes, [1, *sizes], 2, **constants), normal(32, *sizes))
    kinds = [(type(layer), getattr(layer, "patches", None) is not None) for layer in network.layers]
    # A convolution of single pixels is a linear, which needs no windows.
    pair = [(Linear, True), (Linear, False)]
    assert kinds == [(Linear, True), *pair, *pair, (Pool, True), (Linear, False)]
    session = onnxruntime.InferenceSession(ir.to_proto(done).SerializeToString(), providers=["CPUExecutionProvider"])
    for x in normal(16, *sizes):
        (expected,) = session.run(None, {"x": x[None]})
        got = network.real(network.run(network.quantise(x).reshape(sizes[0], -1).T))
        assert np.abs(got - expected).max() < 1.5 * network.scales[1]


def test_lenet_is_near_what_onnx_runtime_computes() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], pads=[2, 2, 2, 2]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("AveragePool", ["b"], ["c"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["c", "w2"], ["d"]),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("MaxPool", ["e"], ["f"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "w3"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["i"]),
        helper.make_node("Gemm", ["i", "w4"], ["y"], transB=1),
    ]
    constants = {"w1": normal(6, 1, 5, 5), "b1": normal(6), "w2": normal(16, 6, 5, 5)}
    constants |= {"w3": normal(30, 400), "w4": normal(10, 30)}
    done, network = imported(model_of(nodes, [1, 1, 28, 28], 2, **constants), normal(16, 1, 28, 28))
    # Halves are frequent in a mean of four, and round to even in ONNX Runtime; random weights spread what that changes.
    assert furthest(done, network, normal(8, 1, 28, 28))[0] <= 4


def test_a_product_of_a_picture_and_a_mean_of_some_axes_are_refused() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["a"])
    mean = [conv, helper.make_node("ReduceMean", ["a", "axes"], ["y"], name="mean")]
    constants = {"w": normal(4, 4, 3, 3), "axes": np.array([2])}
    tail = helper.make_node("Conv", ["y", "v"], ["z"])
    with pytest.raises(ValueError, match=r"node 'mean' \(ReduceMean\) takes the mean over axes \[2\]"):
        imported(model_of([*mean, tail], [1, 4, 6, 6], 4, **constants, v=normal(4, 4, 1, 1)), normal(8, 4, 6, 6))
    product = [conv, helper.make_node("MatMul", ["a", "v"], ["y"], name="product")]
    with pytest.raises(ValueError, match=r"'product' \(MatMul\) reads a picture; expected Flatten"):
        imported(model_of(product, [1, 4, 6, 6], 4, w=normal(4, 4, 3, 3), v=normal(4, 5)), normal(8, 4, 6, 6))


def test_a_picture_is_flattened_as_onnx_does() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"]),
        helper.make_node("Flatten", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "w2"], ["y"], transB=1),
    ]
    model = model_of(nodes, [1, 1, 5, 6], 2, w1=normal(3, 1, 2, 2), w2=normal(4, 60))
    done, network = imported(model, normal(32, 1, 5, 6))
    assert furthest(done, network, normal(32, 1, 5, 6))[0] <= 1


def qdq(weight: np.ndarray, **changed: Any) -> onnx.ModelProto:
    """A linear in QDQ form with uint8 activations."""
    zero, scale = numpy_helper.from_array(np.uint8(120), "z"), numpy_helper.from_array(np.float32(0.05), "s")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["w"], axis=1),
        helper.make_node("MatMul", ["xd", "w"], ["m"], name="product"),
        *changed.get("between", []),
        helper.make_node("QuantizeLinear", [changed.get("last", "m"), "s", "z"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, len(weight)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, None])],
        [
            scale,
            zero,
            numpy_helper.from_array(weight, "wq"),
            numpy_helper.from_array(np.full(weight.shape[1], 0.01, np.float32), "ws"),
            numpy_helper.from_array(np.zeros(weight.shape[1], weight.dtype), "wz"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_a_model_with_uint8_activations_is_taken_as_it_is() -> None:
    model = load(qdq(RNG.integers(-127, 128, (16, 6)).astype(np.int8)))
    network = network_of(model, "test")
    assert furthest(model, network, normal(32, 16))[0] <= 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (qdq(np.full((16, 6), 200, np.uint8)), "'product': 96 of 96 weights lie outside int8 .200 to 200"),
        (qdq(np.full((16, 6), 300, np.int16)), "stored as int16"),
        (
            qdq(np.ones((16, 6), np.int8), between=[helper.make_node("Softmax", ["m"], ["t"], name="soft")], last="t"),
            r"node 'soft' \(Softmax\) follows 'product'",
        ),
    ],
)
def test_what_cannot_be_built_names_the_layer(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network_of(load(model), "test")


def test_branches_and_unsupported_operations_are_named() -> None:
    nodes = [helper.make_node("Gemm", ["x", "w"], ["a"], name="first"), helper.make_node("Add", ["a", "x"], ["y"])]
    with pytest.raises(ValueError, match="is read by 2 nodes"):
        imported(model_of(nodes, [1, 8], 2, w=normal(8, 8)), normal(16, 8))
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["a"]),
        helper.make_node("LpNormalization", ["a"], ["b"], name="norm"),
    ]
    nodes.append(helper.make_node("Gemm", ["b", "w"], ["y"]))
    with pytest.raises(ValueError, match=r"node 'norm' \(LpNormalization\) cannot be exported"):
        imported(model_of(nodes, [1, 8], 2, w=normal(8, 8)), normal(16, 8))
