"""What of a QDQ model counts as a linear in int8, and why the rest does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsecomp.exporting.quantised import is_dequantised, quantised
from sparsecomp.frontends.onnx import build
from sparsecomp.frontends.onnx_load import load
from sparsecomp.frontends.onnx_shapes import infer
from sparsecomp.ir import LinearSite
from sparsecomp.kernels.dot import Levels
from sparsecomp.onnx_choice import found_sites
from sparsecomp.targets.arm.dot import Quantised

RNG = np.random.default_rng(0)
WEIGHT = RNG.integers(-128, 128, (16, 16)).astype(np.int8)
EACH = (0.01 + RNG.random(16)).astype(np.float32)
X = {"s": np.float32(0.05), "z": np.int8(3)}


def model(x_given: bool = True, axis: int = 1, **changed: Any) -> onnx.ModelProto:
    """A product with a weight `[I, O]`; `x_given`: its input is quantised in the model, else given in integers."""
    constants: dict[str, Any] = {"w": WEIGHT, "ws": EACH, "wz": np.zeros(16, WEIGHT.dtype), **X, **changed}
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"])] if x_given else []
    nodes += [
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=axis),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
    ]
    given = ("x", TensorProto.FLOAT) if x_given else ("xq", TensorProto.INT8)
    inputs = [helper.make_tensor_value_info(*given, [4, 16])]
    inputs += [helper.make_tensor_value_info(k, TensorProto.FLOAT, []) for k, v in constants.items() if v is None]
    graph = helper.make_graph(
        nodes,
        "test",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 16])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if v is not None],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def read(proto: onnx.ModelProto) -> tuple[Quantised, ir.Value]:
    loaded = load(proto)
    ((overlay, site, _),) = found_sites(build(loaded, infer(loaded, {}))[:1])
    assert isinstance(site, LinearSite)
    assert is_dequantised(overlay, site)
    return quantised(overlay, site)


def test_integers_scales_and_levels_are_those_of_the_model() -> None:
    linear, source = read(model())
    assert np.array_equal(linear.weight, WEIGHT.T)
    assert np.array_equal(linear.scales, EACH)
    assert linear.levels == Levels(float(np.float32(0.05)), -131)
    assert source.name == "x"


def test_one_scale_counts_for_all_outputs() -> None:
    linear, _ = read(model(ws=np.float32(0.5), wz=np.int8(0)))
    assert (linear.scales == 0.5).all()
    assert linear.scales.shape == (16,)


def test_unsigned_weights_around_a_zero_point_are_int8() -> None:
    unsigned = (WEIGHT.astype(np.int16) + 128).astype(np.uint8)
    assert np.array_equal(read(model(w=unsigned, wz=np.full(16, 128, np.uint8)))[0].weight, WEIGHT.T)


def test_an_input_in_integers_is_quantised_once_more() -> None:
    linear, source = read(model(x_given=False))
    assert source.name == "xd"
    values = np.arange(-128, 128)
    assert np.array_equal(linear.levels.of((values - 3).astype(np.float32) * np.float32(0.05)), values)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"axis": 0}, "no int8 numbers times a scale for each output"),
        ({"w": WEIGHT.astype(np.int16) * 9, "wz": np.zeros(16, np.int16)}, "no int8 numbers"),
        ({"wz": np.full(16, 100, np.int8)}, "no int8 numbers"),
        ({"s": EACH, "z": np.zeros(16, np.int8)}, "its input has no single positive scale"),
        ({"s": np.float32(0)}, "its input has no single positive scale"),
        ({"z": np.int16(0)}, "its input has no single positive scale"),
        ({"s": None}, "its input has no single positive scale"),
    ],
    ids=["scales-of-inputs", "int16", "beyond-int8", "scales-of-x", "zero-scale", "int16-x", "computed-scale"],
)
def test_what_does_not_count_says_why(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(model(**changed))
