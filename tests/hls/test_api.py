"""The export of whole models."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import hls_designs as d
import numpy as np
import onnx
import pytest
import torch
from models import minilm
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from sparsecomp.cli import app
from sparsecomp.hls.api import export_hls
from sparsecomp.patterns import Pattern

pytestmark = pytest.mark.fpga


def block(first: np.ndarray, second: np.ndarray, biases: tuple[np.ndarray, np.ndarray], rows: int) -> onnx.ModelProto:
    """Two linears with GELU between them."""
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], transB=1, name="up"),
        helper.make_node("Gelu", ["h"], ["g"]),
        helper.make_node("Gemm", ["g", "w2", "b2"], ["y"], transB=1, name="down"),
    ]
    tensors = {"w1": first, "b1": biases[0], "w2": second, "b2": biases[1]}
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, first.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, len(second)])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def small(rows: int = 2) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    first, second = (d.pruned(rng, "2:4", *shape).astype(np.float32) / 500 for shape in ((32, 16), (8, 32)))
    zeros = np.zeros(32, np.float32), np.zeros(8, np.float32)
    return block(first, second, zeros, rows), {"x": rng.standard_normal((32, 16)).astype(np.float32)}


def csim(folder: Path) -> str:
    d.compiler()
    result = subprocess.run(["make", "-C", str(folder), "csim"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_feed_forward_block_of_minilm_is_exported_and_simulated(tmp_path: Path) -> None:
    model, _ = minilm()
    layer = model.encoder.layer[0]
    up, down = layer.intermediate.dense, layer.output.dense
    weights = [Pattern.parse("2:4").project(linear.weight).numpy() for linear in (up, down)]
    biases = up.bias.detach().numpy(), down.bias.detach().numpy()
    samples = torch.nn.functional.layer_norm(torch.randn(64, 384), (384,)).numpy()
    made = export_hls(block(*weights, biases, 16), output=tmp_path, calibration={"x": samples}, max_dsp=400)
    assert "0 of 24576 values differ" in csim(tmp_path)
    assert made.dsp <= 400
    rows = json.loads((tmp_path / "design.json").read_text())["layers"]
    assert [row.get("m") for row in rows] == [4, None, 4]
    assert min(row["kept_per_multiplier_and_trip"] for row in rows if "m" in row) > 0.9


def test_the_command_writes_a_project_that_simulates(tmp_path: Path) -> None:
    model, samples = small()
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "samples.npz", **samples)
    given = ["export", str(tmp_path / "model.onnx"), "--target", "hls", "--part", "xc7z020", "--max-dsp", "40"]
    given += ["-o", str(tmp_path / "out"), "--calibration", str(tmp_path / "samples.npz")]
    given += ["--pareto", str(tmp_path / "front.png")]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert "DSP slices" in result.output
    assert "values differ" in csim(tmp_path / "out")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "xc7z020clg400-1" in (tmp_path / "out" / "run_hls.tcl").read_text()


def test_a_float_model_without_calibration_says_what_to_give(tmp_path: Path) -> None:
    model, _ = small()
    with pytest.raises(ValueError, match=r"is a float model: give calibration data.*samples of input 'x'"):
        export_hls(model, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "xc9"}, "unknown part 'xc9'"),
        ({"clock": "fast"}, "clock must be a time such as '5ns'"),
        ({"max_latency": "-1ms"}, "max_latency must be a time"),
        ({"max_interval": "soon"}, "max_interval must be a time"),
        ({"max_dsp": 0}, "max_dsp must be at least 1"),
        ({"max_dsp": 1}, "needs 2 DSP slices at least, 1 more than the 1 given"),
        ({"max_latency": "100ns"}, "a call takes .* cycles"),
        ({"pareto": "front.txt"}, "pareto must end in .png, .svg, .pdf, given 'front.txt'"),
        ({"pareto": "nowhere/front.png"}, "pareto: there is no folder 'nowhere'"),
        ({"calibration": {"z": np.zeros((4, 16))}}, "the calibration data has z; expected samples of 'x'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path: Path, options: dict, message: str) -> None:
    model, samples = small()
    with pytest.raises(ValueError, match=message):
        export_hls(model, output=tmp_path / "out", **({"calibration": samples} | options))
    assert not (tmp_path / "out").exists()


def test_registers_are_written_where_asked_for_and_hold_every_layer(tmp_path: Path) -> None:
    d.needs("xls")
    model, samples = small()
    export_hls(model, output=tmp_path, calibration=samples, max_dsp=40, rtl=True)
    files = {path.name for path in (tmp_path / "rtl").iterdir()}
    assert {"top.v", "memories.v", "simulate.cpp", "layer0_multiply.x", "layer0_multiply.v"} <= files
    assert {"layer1_look_up.v", "layer2_requantise.v", "layer2_rows.hex"} <= files
