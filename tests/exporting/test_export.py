"""Exported packages built for this machine: the same C and the same schedules, with its compilers and sanitizers."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import arm_tools
import numpy as np
import onnx
import onnx_cases as cases
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import nn

import sparsecomp
from sparsecomp.planner import Plan

needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="builds packages for x86-64")


def inputs_of(model: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    return {
        value.name: generator.standard_normal([d.dim_value for d in value.type.tensor_type.shape.dim], np.float32)
        for value in model.graph.input
    }


def check(model: onnx.ModelProto, folder: Path, *flags: str, **options: Any) -> sparsecomp.Report:
    """Export for this machine, run, and compare with ONNX Runtime."""
    report = sparsecomp.export(model, output=folder, target="host", **options)
    feeds = inputs_of(model)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
    program = arm_tools.build(folder, [arm_tools.host_compiler()], *flags)
    for given, wanted in zip(arm_tools.run(program, list(feeds.values()), expected), expected, strict=True):
        cases.close(given, wanted)
    return report


def mlp(tokens: int = 24) -> onnx.ModelProto:
    """Two linears with GELU between, a residual and a softmax."""
    constants = {
        "w1": cases.sparse_array(40, 96, density=0.2),
        "b1": cases.sparse_array(96, density=1, seed=1),
        "w2": cases.sparse_array(96, 40, density=0.2, seed=2),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Add", ["a", "b1"], ["b"]),
        helper.make_node("Gelu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "w2"], ["d"]),
        helper.make_node("Add", ["d", "x"], ["e"]),
        helper.make_node("Softmax", ["e"], ["y"], axis=-1),
    ]
    return cases.model_of(nodes, {"x": [tokens, 40]}, constants, opset=20)


def convolutions() -> onnx.ModelProto:
    """A strided convolution, a depthwise one, a pointwise one with a residual, and a pooling."""
    constants = {
        "w1": cases.sparse_array(16, 3, 3, 3, density=0.5),
        "w2": cases.sparse_array(16, 1, 3, 3, density=1, seed=1),
        "w3": cases.sparse_array(16, 16, 1, 1, density=0.3, seed=2),
        "b3": cases.sparse_array(16, density=1, seed=3),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"], group=16, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c", "w3", "b3"], ["d"]),
        helper.make_node("Add", ["d", "b"], ["e"]),
        helper.make_node("GlobalAveragePool", ["e"], ["y"]),
    ]
    return cases.model_of(nodes, {"x": [2, 3, 13, 18]}, constants)


@needs_x86
@pytest.mark.parametrize("model", [mlp(), mlp(1), convolutions()], ids=["mlp", "mlp-1-token", "convolutions"])
def test_packages_are_clean_under_sanitizers(model: onnx.ModelProto, tmp_path: Path) -> None:
    check(model, tmp_path, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@needs_x86
def test_threads_share_the_work(tmp_path: Path) -> None:
    check(mlp(100), tmp_path, "-fopenmp", threads=2)


@needs_x86
def test_attention_in_tiles(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["k"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "t"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "k"], ["y"]),
    ]
    shapes = {"q": [3, 14, 20], "k": [3, 36, 20]}
    check(cases.model_of(nodes, shapes, {}), tmp_path)


@needs_x86
def test_outputs_that_are_inputs_or_twice_the_same(tmp_path: Path) -> None:
    weight = cases.sparse_array(8, 8)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Identity", ["x"], ["same"])]
    nodes.append(helper.make_node("Relu", ["y"], ["z"]))
    nodes.append(helper.make_node("Identity", ["y"], ["again"]))
    outputs = {"y": 2, "same": 2, "z": 2, "again": 2}
    check(cases.model_of(nodes, {"x": [5, 8]}, {"w": weight}, outputs=outputs), tmp_path)


@needs_x86
def test_a_module_and_its_exported_program_become_packages(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    sparsecomp.sparsify_(model, "unstructured@0.8")
    x = torch.randn(6, 16)
    program = torch.export.export(model, (x,))
    torch.export.save(program, tmp_path / "model.pt2")
    with torch.no_grad():
        expected = model(x).numpy()
    for name, source, inputs in (("a", model, [x]), ("b", program, None), ("c", tmp_path / "model.pt2", None)):
        sparsecomp.export(source, inputs, output=tmp_path / name, target="host")
        built = arm_tools.build(tmp_path / name, [arm_tools.host_compiler()])
        cases.close(arm_tools.run(built, [x.numpy()], [expected])[0], expected)


def test_a_damaged_program_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match=r"model\.pt2 is no program of torch\.export"):
        sparsecomp.export(path, output=tmp_path / "out")


@needs_x86
def test_the_plan_lies_in_the_package_and_can_be_given_back(tmp_path: Path) -> None:
    first = sparsecomp.export(mlp(), output=tmp_path, target="host")
    plan = Plan.load(tmp_path / "plan.json")
    assert [choice.chosen for choice in plan] == [choice.chosen for choice in first.plan]
    assert {choice.chosen.kernel for choice in plan} == {"rows"}
    edited = json.loads((tmp_path / "plan.json").read_text())
    edited["sites"][0]["chosen"] = {"kernel": "dense", "pattern": "dense"}
    (tmp_path / "edited.json").write_text(json.dumps(edited))
    given = check(mlp(), tmp_path, options={"plan": tmp_path / "edited.json"})
    assert [choice.chosen.kernel for choice in given.plan] == ["dense", "rows"]
    dense = check(mlp(), tmp_path, options={"exclude": "w2"})
    assert [choice.chosen.kernel for choice in dense.plan] == ["rows", "dense"]


@needs_x86
def test_weights_are_described_where_they_lie(tmp_path: Path) -> None:
    sparsecomp.export(mlp(), output=tmp_path, target="host")
    content = (tmp_path / "weights.bin").read_bytes()
    document = json.loads((tmp_path / "weights.json").read_text())
    assert document["bytes"] == len(content)
    bias = next(entry for entry in document["arrays"] if entry["shape"] == [96])
    found = np.frombuffer(content, bias["dtype"], 96, bias["offset"])
    assert (found == cases.sparse_array(96, density=1, seed=1)).all()
    assert all(entry["offset"] % 64 == 0 for entry in document["arrays"])


@needs_x86
def test_weights_of_another_package_are_refused(tmp_path: Path) -> None:
    sparsecomp.export(mlp(), output=tmp_path, target="host")
    program = arm_tools.build(tmp_path, [arm_tools.host_compiler()])
    path = arm_tools.write_inputs(tmp_path, [np.zeros((24, 40), np.float32)])
    weights = tmp_path / "weights.bin"
    damaged = bytearray(weights.read_bytes())
    damaged[8] ^= 1
    weights.write_bytes(damaged)
    result = subprocess.run([program, weights, path], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    assert "not the weights.bin of this package" in result.stderr
    weights.write_bytes(damaged[:-1])
    result = subprocess.run([program, weights, path], capture_output=True, text=True, check=False, timeout=60)
    assert "fewer than" in result.stderr


@needs_x86
def test_outputs_are_checked_against_a_file(tmp_path: Path) -> None:
    model = mlp()
    sparsecomp.export(model, output=tmp_path, target="host")
    program = arm_tools.build(tmp_path, [arm_tools.host_compiler()])
    feeds = inputs_of(model)
    path = arm_tools.write_inputs(tmp_path, list(feeds.values()))
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
    worse, unknown = expected.copy(), expected.copy()
    worse.flat[7] += 1e-3 * np.abs(expected).max()
    unknown.flat[7] = np.nan
    for wanted, status in ((expected, 0), (worse, 2), (unknown, 2)):
        (tmp_path / "expected.bin").write_bytes(wanted.tobytes())
        command = [program, tmp_path / "weights.bin", path, "--expect", tmp_path / "expected.bin"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == status
        assert "5 runs: best" in result.stdout


@needs_x86
def test_results_of_a_run_are_what_calibration_reads(tmp_path: Path) -> None:
    sparsecomp.export(mlp(), output=tmp_path, target="host")
    program = arm_tools.build(tmp_path, [arm_tools.host_compiler()])
    path = arm_tools.write_inputs(tmp_path, [np.zeros((24, 40), np.float32)])
    results = tmp_path / "results.json"
    subprocess.run([program, tmp_path / "weights.bin", path, "--results", results], check=True, timeout=60)
    document = json.loads(results.read_text())
    rows = [step for step in document["steps"] if step["kernel"] == "rows"]
    assert len(rows) == 2
    assert all(step["us"] > 0 and step["predicted_us"] > 0 for step in rows)


@pytest.mark.arm
def test_model_c_builds_without_a_warning_in_clang(tmp_path: Path) -> None:
    sparsecomp.export(mlp(), output=tmp_path)
    arm_tools.build(tmp_path, arm_tools.cross_compiler())


class TestBadInput:
    def test_an_unknown_cpu(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"unknown ARM CPU 'cortex-m0'.*cortex-a53"):
            sparsecomp.export(mlp(), output=tmp_path, cpu_name="cortex-m0")

    def test_an_operation_that_is_not_known_names_node_and_file(self, tmp_path: Path) -> None:
        nodes = [helper.make_node("Det", ["x"], ["y"], name="the_determinant")]
        path = tmp_path / "model.onnx"
        onnx.save(cases.model_of(nodes, {"x": [4, 4]}, {}, outputs={"y": 0}), path)
        with pytest.raises(ValueError, match=r"model\.onnx: node 'the_determinant' is of the type Det"):
            sparsecomp.export(path, output=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_an_operation_that_needs_a_run_time_names_node_and_file(self, tmp_path: Path) -> None:
        nodes = [helper.make_node("NonZero", ["x"], ["i"], name="finder"), helper.make_node("Cast", ["i"], ["y"], to=1)]
        path = tmp_path / "model.onnx"
        onnx.save(cases.model_of(nodes, {"x": [4, 4]}, {}), path)
        with pytest.raises(ValueError, match=r"model\.onnx cannot be exported: node 'finder'.*needs a run time"):
            sparsecomp.export(path, output=tmp_path / "out")

    def test_what_does_not_fit_says_by_how_much(self, tmp_path: Path) -> None:
        report = sparsecomp.export(mlp(), output=tmp_path / "fits", ram="1M", flash="1MB")
        ram, flash = (int(word) for word in report.notes[-1].split() if word.isdigit())
        match = rf"{ram} bytes of RAM, {ram - 1024} more than the 1024 given; it takes {flash} bytes of flash"
        with pytest.raises(ValueError, match=match):
            sparsecomp.export(mlp(), output=tmp_path / "out", ram="1K", flash=100)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("size", ["", "many", "-3", "1.5M", 0])
    def test_a_size_that_is_none(self, tmp_path: Path, size: str | int) -> None:
        with pytest.raises(ValueError, match="ram must be a number of bytes"):
            sparsecomp.export(mlp(), output=tmp_path, ram=size)

    def test_a_module_without_inputs(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="example inputs"):
            sparsecomp.export(nn.Linear(2, 2), output=tmp_path)

    def test_the_command_says_it_in_one_line(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "sparsecomp.cli", "export", str(tmp_path / "none.onnx"), "-o", str(tmp_path)]
        entry = "import sys; from sparsecomp.cli import app; sys.argv[0] = 'sparsecomp'; app()"
        command = [sys.executable, "-c", entry, *command[3:]]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert result.returncode == 1
        assert result.stderr.strip().splitlines()[-1].startswith("error: ")
        assert "none.onnx is not a file" in result.stderr
