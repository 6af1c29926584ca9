"""Kernels in SVE of 256 bits, for the CPUs that have it: under QEMU, and the same package built for this machine."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import arm_tools
import numpy as np
import onnx_cases as cases
import onnxruntime
import pytest

import sparsecomp


def check(target: str, folder: Path, compiler: list[str], *before: str) -> None:
    model = cases.linear_model(cases.sparse_array(213, 101, density=0.15), cases.sparse_array(101, density=1, seed=2))
    x = np.random.default_rng(1).standard_normal((45, 213), np.float32)
    report = sparsecomp.export(model, output=folder, target=target, cpu_name="neoverse-v1", shapes={"x": x.shape})
    assert next(iter(report.plan)).chosen.kernel == "rows_sve"
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    program = arm_tools.build(folder, compiler)
    cases.close(arm_tools.run(program, [x], expected, *before)[0], expected[0])


@pytest.mark.arm
@pytest.mark.parametrize("cpu", ["max,sve256=on,sve512=off", "max,sve512=on"])
def test_sparse_linears_of_neoverse_v1_run_in_sve(cpu: str, tmp_path: Path) -> None:
    check("arm", tmp_path, arm_tools.cross_compiler(), arm_tools.emulator(), "-cpu", cpu)
    assembly = next((tmp_path / "kernels").glob("rows_sve*.s")).read_text()
    assert re.search(r"fmla\s+z\d+\.s", assembly)
    assert not re.search(r"fmla\s+v\d+\.4s", assembly)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="builds packages for x86-64")
def test_the_same_package_can_be_tested_on_this_machine(tmp_path: Path) -> None:
    check("host", tmp_path, [arm_tools.host_compiler()])
