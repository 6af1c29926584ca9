"""Linears of QDQ models: computed in int8 where the CPU has dot products, as ONNX Runtime computes the model."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import arm_cases
import arm_tools
import numpy as np
import onnx
import onnx_cases as cases
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import sparsecomp
from sparsecomp.frontends.onnx_load import load
from sparsecomp.hls.quantise import quantise
from sparsecomp.patterns import Pattern

needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="builds packages for x86-64")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def mlp(pattern: str) -> onnx.ModelProto:
    """Gemm with ReLU and MatMul with a bias, in float."""

    def weight(outputs: int, inputs: int) -> np.ndarray[Any, Any]:
        full = torch.from_numpy(normal(outputs, inputs)) / inputs**0.5
        pruned = full if pattern == "dense" else Pattern.parse(pattern).project(full)
        return pruned.contiguous().numpy()

    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["g"]),
        helper.make_node("MatMul", ["g", "w2"], ["m"]),
        helper.make_node("Add", ["m", "b2"], ["y"]),
    ]
    constants = {"w1": weight(200, 128), "b1": normal(200), "w2": weight(109, 200).T.copy(), "b2": normal(109)}
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 128])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 109])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def quantised(pattern: str) -> onnx.ModelProto:
    model: onnx.ModelProto = ir.to_proto(quantise(load(mlp(pattern)), "mlp", {"x": normal(64, 128)}))
    return model


def expected(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    return list(onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds))


def kernels(report: sparsecomp.Report) -> set[str]:
    return {choice.chosen.kernel for choice in report.plan}


def as_onnx_runtime(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> None:
    """Nearly all values are the same; sums in another order may move one that lies on a border by a level."""
    difference = np.abs(found - wanted) / np.abs(wanted).max()
    assert (difference > 1e-6).mean() < 0.01
    assert difference.max() < 0.02


@pytest.mark.arm
@pytest.mark.parametrize(
    ("pattern", "kernel"), [("dense", "int8_16_4_1"), ("16:2:4", "int8_16_4_2"), ("1:4", "int8_own_16_4_1")]
)
def test_a_network_runs_in_int8(pattern: str, kernel: str, tmp_path: Path) -> None:
    model, x = quantised(pattern), normal(33, 128)
    report = sparsecomp.export(model, output=tmp_path, shapes={"x": x.shape})
    assert kernels(report) == {"int8"}
    assert f"extern kernel_function {kernel}" in (tmp_path / "model.c").read_text()
    # The kernels quantise what they read: that of the output alone is left.
    assert (tmp_path / "model.c").read_text().count("{ /* fused_quantize") == 1
    program = arm_tools.build(tmp_path, arm_tools.cross_compiler())
    wanted = expected(model, {"x": x})
    as_onnx_runtime(arm_tools.run(program, [x], wanted, arm_tools.emulator())[0], wanted[0])


@needs_x86
def test_of_any_number_of_tokens(tmp_path: Path) -> None:
    model = quantised("16:2:4")
    report = sparsecomp.export(model, output=tmp_path, target="host", shapes={"x": ("1..33", 128)}, threads=2)
    assert "int8" in kernels(report)
    program = arm_tools.build(tmp_path, [arm_tools.host_compiler()], "-fopenmp", "-g", *SANITIZERS)
    for tokens in (1, 5, 33):
        x = normal(tokens, 128)
        wanted = expected(model, {"x": x})
        as_onnx_runtime(arm_tools.run(program, [x], wanted, sizes=(tokens,))[0], wanted[0])


@pytest.mark.arm
@pytest.mark.slow
def test_a_transformer_of_unsigned_activations_runs_in_int8(tmp_path: Path) -> None:
    model, feeds = arm_cases.quantised_paraphrase()
    shapes = {name: value.shape for name, value in feeds.items()}
    report = sparsecomp.export(model, output=tmp_path, shapes=shapes)
    assert kernels(report) == {"int8"}
    program = arm_tools.build(tmp_path, arm_tools.cross_compiler())
    wanted = expected(model, feeds)
    for given, value in zip(
        arm_tools.run(program, list(feeds.values()), wanted, arm_tools.emulator()), wanted, strict=True
    ):
        cases.close(given, value, 1e-4)


class TestWhatStaysInFloat32:
    def reasons(self, model: onnx.ModelProto, folder: Path, **given: Any) -> list[str]:
        report = sparsecomp.export(model, output=folder, shapes={"x": (8, 128)}, **given)
        assert "int8" not in kernels(report)
        return [choice.reason for choice in report.plan]

    def test_on_a_cpu_without_dot_products(self, tmp_path: Path) -> None:
        assert all(
            reason.endswith("not int8: cortex-a72 has no dot products")
            for reason in self.reasons(quantised("dense"), tmp_path, cpu_name="cortex-a72")
        )

    def test_an_input_that_is_not_quantised(self, tmp_path: Path) -> None:
        model = quantised("dense")
        first = next(node for node in model.graph.node if node.op_type == "Gemm")
        first.input[0] = "x"
        del model.graph.node[next(i for i, n in enumerate(model.graph.node) if n.op_type == "Gemm") + 1 :]
        del model.graph.output[:]
        model.graph.output.append(helper.make_tensor_value_info(first.output[0], TensorProto.FLOAT, ["n", 200]))
        (reason,) = self.reasons(model, tmp_path)
        assert reason.endswith("not int8: its input is not quantised")

    def test_few_entries_that_rows_do_not_share(self, tmp_path: Path) -> None:
        assert all(reason.startswith("rows") for reason in self.reasons(quantised("unstructured@0.95"), tmp_path))


@needs_x86
def test_the_plan_of_a_package_can_be_given_back(tmp_path: Path) -> None:
    model = quantised("16:2:4")
    first = sparsecomp.export(model, output=tmp_path, target="host", shapes={"x": (33, 128)})
    plan = {"plan": tmp_path / "plan.json"}
    again = sparsecomp.export(model, output=tmp_path, target="host", shapes={"x": (33, 128)}, options=plan)
    assert [choice.chosen for choice in again.plan] == [choice.chosen for choice in first.plan]
    assert kernels(again) == {"int8"}
    excluded = sparsecomp.export(model, output=tmp_path, target="host", options={"exclude": "."})
    assert kernels(excluded) == {"dense"}
