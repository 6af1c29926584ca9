"""Measuring ONNX Runtime's dense products for the cost model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsecomp.targets import get_target
from sparsecomp.targets.base import DENSE, Problem, WeightFacts
from sparsecomp.targets.x86 import calibration, cpu, ort_calibrate
from sparsecomp.targets.x86.ort_target import FULL, LibraryTarget

LEVEL = cpu.best_level()


def test_prices_are_written_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECOMP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ort_calibrate, "SHAPES", ((64, 64), (96, 32), (40, 128)))
    monkeypatch.setattr(ort_calibrate, "MEMORY_SHAPES", ((128, 128), (64, 256)))
    monkeypatch.setattr(ort_calibrate, "CHANNELS", (8, 16))
    monkeypatch.setattr(ort_calibrate, "MAPS", (7, 14))
    monkeypatch.setattr(ort_calibrate, "_LEAST", 6)
    result = ort_calibrate.calibrate(0.01)
    assert result.path == str(calibration.path_of(LEVEL, "ort"))
    assert set(result.points) == {"dense_one", "dense_few", "dense", "dense_conv", "full"}
    found = calibration.load(LEVEL, "ort")
    assert found.measured_here
    # The prices of PyTorch are a matter of their own.
    assert not calibration.load(LEVEL).measured_here
    target = LibraryTarget(get_target("x86"))
    problem = Problem(WeightFacts(64, 64, 100, {}, ()), 1, 1)
    # No larger than the L2 cache: what is left are products, weights, activations and the call.
    prices = found.coefficients["dense_one"]
    entries, moved = 64 * 64, 64 + 64
    expected = (prices["multiply"] + prices["weight"]) * entries + prices["activation"] * moved + prices["call"]
    assert target.predict(DENSE, problem) == pytest.approx(expected / 1e3)
    assert target.predict(FULL, problem) > 0


def test_the_dense_form_computes_the_product() -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((41, 70)).astype(np.float32)
    for tokens in (1, 3, 8, 17):
        x = generator.standard_normal((tokens, 70)).astype(np.float32)
        call, out = ort_calibrate.full_call(LEVEL, weight, x)
        call()
        np.testing.assert_allclose(out.numpy(), x @ weight.T, rtol=1e-4, atol=1e-4)
