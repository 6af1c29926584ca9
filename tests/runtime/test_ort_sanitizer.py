"""The native library under AddressSanitizer and UndefinedBehaviorSanitizer, with damaged models for some seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_cases as cases
import ort_fuzz
import pytest
from onnx import helper

from sparsecomp.runtime import ort_library

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")
SECONDS = 6


def _preloaded() -> str:
    """What has to be in the process first: AddressSanitizer, and the C++ library, whose exceptions it watches."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed, whose -fsanitize=address is used here")
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [compiler, f"-print-file-name={name}"]
        path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        if not path.is_absolute():
            pytest.skip(f"gcc has no {name}, which this test needs")
        paths.append(str(path.resolve()))
    return " ".join(paths)


@pytest.mark.slow
def test_damaged_models_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preloaded = _preloaded()
    flags = tuple(flag for flag in ort_library._FLAGS if flag != "-s")
    monkeypatch.setattr(ort_library, "_FLAGS", (*flags, *SANITIZERS))
    monkeypatch.setenv("CC", "gcc")
    bias = np.ones(41, np.float32)
    linear = cases.linear_model(cases.sparse_array(70, 41), bias)
    attributes = {"pads": [1, 0, 2, 1], "strides": [2, 1], "group": 2}
    conv = cases.model_of(
        [helper.make_node("Conv", ["x", "weight"], ["y"], **attributes)],
        {"x": ["n", 6, "h", "w"]},
        {"weight": cases.sparse_array(8, 3, 3, 2)},
    )
    panel = cases.linear_model(cases.panel_array(70, 40))
    folders = {name: tmp_path / name for name in ("several", "conv", "panel", "mask")}
    for folder in folders.values():
        folder.mkdir()
    paths = [cases.optimized_in_forms(linear, folders["several"])]
    paths += [
        cases.optimized(model, folders[kernel], kernel=None if kernel == "conv" else kernel)[0]
        for model, kernel in ((conv, "conv"), (panel, "panel"), (linear, "mask"))
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": preloaded,
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    }
    command = [sys.executable, ort_fuzz.__file__, str(SECONDS), "0", *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[:6000]
    tried, loaded = (int(word) for word in result.stdout.split() if word.isdigit())
    assert 0 < loaded < tried
