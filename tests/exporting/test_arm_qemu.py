"""Exported packages on ARM, under QEMU: the three models of the tests, and counted instructions."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import arm_cases
import arm_tools
import numpy as np
import onnx
import onnx_cases as cases
import onnxruntime
import pytest
import torch
from onnx import helper

import sparsecomp
from sparsecomp.patterns import Pattern

pytestmark = pytest.mark.arm
TOLERANCE = 1e-4


def check(model: onnx.ModelProto, feeds: dict[str, Any], folder: Path) -> sparsecomp.Report:
    """Export, run under QEMU, compare with ONNX Runtime on the model with its zeros."""
    emulator, compiler = arm_tools.emulator(), arm_tools.cross_compiler()
    shapes = {name: value.shape for name, value in feeds.items()}
    report = sparsecomp.export(model, output=folder, cpu_name="cortex-a76", shapes=shapes)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
    program = arm_tools.build(folder, compiler)
    for given, wanted in zip(arm_tools.run(program, list(feeds.values()), expected, emulator), expected, strict=True):
        cases.close(given, wanted, TOLERANCE)
    return report


def kernels(report: sparsecomp.Report) -> set[str]:
    return {choice.chosen.kernel for choice in report.plan}


def test_paraphrase_model(tmp_path: Path) -> None:
    report = check(*arm_cases.paraphrase(), tmp_path)
    assert "rows" in kernels(report)


def test_paraphrase_model_of_any_batch_and_length(tmp_path: Path) -> None:
    emulator, compiler = arm_tools.emulator(), arm_tools.cross_compiler()
    model = cases.pruned(cases.paraphrase(), 0.8)
    sparsecomp.export(model, output=tmp_path, shapes={"input_ids": ("1..2", "1..40")})
    program = arm_tools.build(tmp_path, compiler)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for sizes in ((1, 1), (2, 7), (1, 33), (2, 40)):
        feeds = cases.token_feeds(*sizes)
        expected = session.run(None, feeds)
        found = arm_tools.run(program, list(feeds.values()), expected, emulator, sizes=sizes)
        for given, wanted in zip(found, expected, strict=True):
            cases.close(given, wanted, TOLERANCE)


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    assert "rows" in kernels(check(*arm_cases.minilm(), tmp_path))


def test_efficientnet_lite0(tmp_path: Path) -> None:
    assert "conv" in kernels(check(*arm_cases.efficientnet(), tmp_path))


def test_threads_of_openmp(tmp_path: Path) -> None:
    emulator, compiler = arm_tools.emulator(), arm_tools.threaded_compiler()
    constants = {
        "w1": cases.sparse_array(16, 3, 3, 3, density=0.5),
        "w2": cases.sparse_array(24, 16, 1, 1, density=0.3, seed=1),
        "w3": cases.sparse_array(64, 40, density=0.2, seed=2),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"]),
        helper.make_node("Reshape", ["c", "sizes"], ["d"]),
        helper.make_node("MatMul", ["d", "w3"], ["y"]),
    ]
    model = cases.model_of(nodes, {"x": [1, 3, 32, 32]}, constants | {"sizes": np.array([96, 64])}, outputs={"y": 2})
    x = np.random.default_rng(0).standard_normal((1, 3, 32, 32), np.float32)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    report = sparsecomp.export(model, output=tmp_path, shapes={"x": x.shape}, threads=3)
    assert kernels(report) >= {"conv", "rows"}
    program = arm_tools.build(tmp_path, compiler)
    cases.close(arm_tools.run(program, [x], expected, emulator)[0], expected[0], TOLERANCE)
    traced = subprocess.run(
        [emulator, "-strace", program, tmp_path / "weights.bin", tmp_path / "input.bin"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert len(re.findall(r"^\d+ clone", traced.stderr, re.MULTILINE)) == 2  # the first thread was there


def instructions(pattern: str, folder: Path) -> int:
    """Instructions of a linear of 384 inputs and 1536 outputs for 64 tokens."""
    weight = torch.randn(1536, 384, generator=torch.Generator().manual_seed(0))
    if pattern != "dense":
        weight = Pattern.parse(pattern).project(weight)
    model = cases.linear_model(weight.t().contiguous().numpy(), np.zeros(1536, np.float32))
    sparsecomp.export(model, output=folder, shapes={"x": [64, 384]})
    program = arm_tools.build(folder, arm_tools.cross_compiler())
    return arm_tools.instructions(program, [np.ones((64, 384), np.float32)])


def test_zeros_save_instructions(tmp_path: Path) -> None:
    arm_tools.emulator()
    dense = instructions("dense", tmp_path)
    bounds = {"unstructured@0.5": 0.60, "unstructured@0.75": 0.33, "unstructured@0.9": 0.17, "8:2:4": 0.56}
    shares = {pattern: instructions(pattern, tmp_path) / dense for pattern in bounds}
    assert all(shares[pattern] <= bound for pattern, bound in bounds.items()), shares
