"""Linears in float16: computed by ARM's vectors of eight lanes under QEMU, only where it was asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import arm_tools
import numpy as np
import onnx
import onnx_cases as cases
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparsecomp

EPSILON = 2.0**-11
"""Half a unit in the last place of float16, relative."""


def run(weight: np.ndarray[Any, Any], tokens: int, folder: Path) -> tuple[str, Any, Any]:
    """The kernel that was chosen, what the package gives, and what it should give."""
    x = np.random.default_rng(1).standard_normal((tokens, weight.shape[0]), np.float32)
    model = cases.linear_model(weight, cases.sparse_array(weight.shape[1], density=1, seed=2))
    report = sparsecomp.export(model, output=folder, shapes={"x": x.shape}, dtype="float16")
    program = arm_tools.build(folder, arm_tools.cross_compiler())
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    found = arm_tools.run(program, [x], expected, arm_tools.emulator())[0]
    # Each product and each sum of a block is rounded once, weights and activations before.
    bound = np.abs(x) @ np.abs(weight) * EPSILON * (3 + 400)
    assert (np.abs(found - expected[0]) <= bound + 1e-5).all()
    return next(iter(report.plan)).chosen.kernel, found, expected[0]


@pytest.mark.arm
@pytest.mark.parametrize(
    ("inputs", "outputs", "tokens", "density"),
    [(64, 96, 40, 0.3), (1003, 45, 17, 0.2), (128, 257, 64, 1.0)],
    ids=["whole", "several-blocks-and-rests", "dense"],
)
def test_results_are_those_of_float16(inputs: int, outputs: int, tokens: int, density: float, tmp_path: Path) -> None:
    kernel, found, expected = run(cases.sparse_array(inputs, outputs, density=density), tokens, tmp_path)
    assert kernel == "rows_half"
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 1e-6 < error < 1e-2  # float32 would be closer


def test_without_the_option_nothing_is_float16(tmp_path: Path) -> None:
    report = sparsecomp.export(cases.linear_model(cases.sparse_array(64, 96, density=0.3)), output=tmp_path)
    assert all(p.candidate.kernel != "rows_half" for choice in report.plan for p in choice.predictions)
    assert "rows_half" not in (tmp_path / "model.c").read_text()


class TestBadInput:
    model = cases.linear_model(cases.sparse_array(64, 96, density=0.3))

    def test_a_cpu_that_cannot(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"cortex-a53 does not compute in float16; .* cortex-a55, cortex-a76"):
            sparsecomp.export(self.model, output=tmp_path, cpu_name="cortex-a53", dtype="float16")

    def test_a_dtype_that_is_not_known(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="unknown dtype 'int4'; the dtypes are float32, float16"):
            sparsecomp.export(self.model, output=tmp_path, dtype="int4")

    def test_the_machine_at_hand(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="export for the target arm"):
            sparsecomp.export(self.model, output=tmp_path, target="host", dtype="float16")

    def test_weights_that_float16_cannot_hold(self, tmp_path: Path) -> None:
        model = cases.linear_model(cases.sparse_array(64, 96, density=0.3) * 1e6)
        with pytest.raises(ValueError, match="more than float16 holds"):
            sparsecomp.export(model, output=tmp_path / "out", shapes={"x": [64, 64]}, dtype="float16")
        assert not (tmp_path / "out").exists()


@pytest.mark.arm
@pytest.mark.parametrize(
    ("channels", "side", "kernel", "given"),
    [
        ((24, 40), (16, 24), 1, {}),
        ((24, 40), (9, 11), 3, {"pads": [1, 1, 1, 1]}),
        ((5, 12), (17, 30), 3, {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ((96, 16), (8, 8), 3, {"group": 4, "pads": [1, 1, 1, 1]}),
        ((600, 24), (8, 16), 1, {}),
    ],
    ids=["in-place-before", "masked", "strided", "grouped", "several-blocks"],
)
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_convolutions(
    channels: tuple[int, int], side: tuple[int, int], kernel: int, given: dict[str, Any], density: float, tmp_path: Path
) -> None:
    inputs, outputs = channels
    weight = cases.sparse_array(outputs, inputs // given.get("group", 1), kernel, kernel, density=density)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], **given),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    shape = [2, inputs, *side]
    model = cases.model_of(nodes, {"x": shape}, {"w": weight, "b": cases.sparse_array(outputs, density=1)})
    x = np.random.default_rng(3).standard_normal(shape, np.float32)
    report = sparsecomp.export(model, output=tmp_path, dtype="float16")
    assert [choice.chosen.kernel for choice in report.plan] == ["conv_half"], report.plan
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    program = arm_tools.build(tmp_path, arm_tools.cross_compiler())
    found = arm_tools.run(program, [x], expected, arm_tools.emulator())[0]
    error = np.abs(found - expected[0]).max() / np.abs(expected[0]).max()
    assert 1e-6 < error < 1e-2


def half_model(tokens: int) -> onnx.ModelProto:
    """A linear with its activation in float16."""
    weight, bias = cases.sparse_array(64, 96, density=0.3), cases.sparse_array(96, density=1, seed=1)
    constants = {"w": weight.astype(np.float16), "b": bias.astype(np.float16)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "half",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [tokens, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [tokens, 96])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.arm
@pytest.mark.parametrize(("cpu_name", "kernel"), [("cortex-a76", "rows_half"), ("cortex-a72", "rows")])
def test_models_in_float16(cpu_name: str, kernel: str, tmp_path: Path) -> None:
    model, x = half_model(40), np.random.default_rng(2).standard_normal((40, 64)).astype(np.float16)
    report = sparsecomp.export(model, output=tmp_path, cpu_name=cpu_name)
    assert [choice.chosen.kernel for choice in report.plan] == [kernel]
    assert any("the model is float16" in note for note in report.notes)
    assert "const uint16_t *in_x, uint16_t *out_y" in (tmp_path / "model.h").read_text()
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    program = arm_tools.build(tmp_path, arm_tools.cross_compiler())
    found = arm_tools.run(program, [x], expected, arm_tools.emulator())[0]
    assert np.abs(found - expected[0]).max() <= 1e-2 * np.abs(expected[0]).max()
    # The package compares them as numbers: values that rounding moved are no error, others are.
    for shift, status in ((0, 0), (0.02, 2)):
        (tmp_path / "expected.bin").write_bytes((expected[0] * np.float16(1 + shift)).tobytes())
        command = [arm_tools.emulator(), program, "weights.bin", "input.bin", "--expect", "expected.bin"]
        assert subprocess.run(command, cwd=tmp_path, check=False, timeout=60).returncode == status
