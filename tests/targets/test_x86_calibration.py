"""The calibration file: what is damaged or foreign is reported and left aside; and one small calibration."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import needs_x86

from sparsecomp.runtime.cache import CACHE_VARIABLE
from sparsecomp.targets import get_target
from sparsecomp.targets.base import DENSE, Candidate, Problem, WeightFacts
from sparsecomp.targets.cpu import timing
from sparsecomp.targets.x86 import calibrate, calibration, conv_calibrate, cpu
from sparsecomp.targets.x86.target import X86Target, create

Content = dict[str, Any]
LEVEL = "avx2"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder without a calibration; targets that were made with one are forgotten."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    yield
    create.cache_clear()


def prices(scale: float = 2.0) -> dict[str, dict[str, float]]:
    """The shipped prices, scaled: a calibration with the right names that is none of ours."""
    shipped = calibration.load(LEVEL).coefficients
    return {model: {name: price * scale for name, price in entry.items()} for model, entry in shipped.items()}


def written(**changes: Any) -> Content:
    """Write a sound file, changed on its top level, and give what it holds."""
    path = calibration.save(LEVEL, prices(), "2026-01-02", {"peak_gflops": 1.0})
    content: Content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))
    return content


def refused(caplog: pytest.LogCaptureFixture, reason: str) -> None:
    with caplog.at_level(logging.WARNING, logger="sparsecomp"):
        found = calibration.load(LEVEL)
    assert not found.measured_here
    assert found.coefficients == calibration._shipped(LEVEL, "", cpu.cpu_family()).coefficients
    (record,) = caplog.records
    assert str(calibration.path_of(LEVEL)) in record.getMessage()
    assert reason in record.getMessage()


def test_without_a_file_the_shipped_prices_are_used(caplog: pytest.LogCaptureFixture) -> None:
    found = calibration.load(LEVEL)
    assert not found.measured_here
    assert "shipped" in found.origin
    assert "sparsecomp calibrate" in found.origin
    assert not caplog.records


def test_a_sound_file_is_used(caplog: pytest.LogCaptureFixture) -> None:
    content = written()
    found = calibration.load(LEVEL)
    assert found.measured_here
    assert found.coefficients == content["coefficients"] == prices(1.0)
    assert found.origin == "calibrated 2026-01-02"
    assert not caplog.records
    target = X86Target(LEVEL)
    assert target.calibrated
    assert "calibrated 2026-01-02" in target.description


def test_measured_prices_decide_predictions() -> None:
    facts = WeightFacts.of(torch.eye(64))
    problems = [(DENSE, Problem(facts, 100, 1)), (Candidate("rows", "unstructured"), Problem(facts, 100, 1))]
    before = [X86Target(LEVEL).predict(*problem) for problem in problems]
    written()
    assert [X86Target(LEVEL).predict(*problem) for problem in problems] == pytest.approx([2 * t for t in before])


@pytest.mark.parametrize("level", cpu.LEVELS)
def test_a_file_is_for_one_level(level: str) -> None:
    written()
    assert calibration.load(level).measured_here is (level == LEVEL)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe\xff", "it cannot be read"),
        (b"\x00" * 100, ""),
        (b"[" * 60_000, "it cannot be read"),
        (b"[]", "expected an object of format 1"),
        (b"null", "expected an object of format 1"),
        (b'{"format": 2}', "expected an object of format 1"),
        (b'{"format": 1}', "cpu and when must be texts"),
        (b'{"format": 1, "cpu": 3, "when": "now"}', "cpu and when must be texts"),
        (b" " * (1 << 16) + b"{}", "larger than 65536 bytes"),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else "",
)
def test_a_damaged_file_is_left_aside(content: bytes, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    calibration.path_of(LEVEL).write_bytes(content)
    refused(caplog, reason)


def test_a_folder_in_its_place(caplog: pytest.LogCaptureFixture) -> None:
    calibration.path_of(LEVEL).mkdir()
    refused(caplog, "it cannot be read")


def test_a_cache_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    assert not calibration.load(LEVEL).measured_here


def test_another_cpu(caplog: pytest.LogCaptureFixture) -> None:
    written(cpu="Another CPU")
    refused(caplog, "it is for Another CPU")


@pytest.mark.parametrize("given", [None, [], {}, "prices", {"rows": {}}])
def test_other_models(given: object, caplog: pytest.LogCaptureFixture) -> None:
    written(coefficients=given)
    refused(caplog, "its models are not those of this version")


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.pop("step"),
        lambda entry: entry.update(more=1.0),
    ],
    ids=["one less", "one more"],
)
def test_other_quantities(change: Callable[[dict[str, float]], object], caplog: pytest.LogCaptureFixture) -> None:
    changed = prices()
    change(changed["rows"])
    written(coefficients=changed)
    refused(caplog, "the quantities of rows are not those of this version")


@pytest.mark.parametrize(
    "price", [float("nan"), float("inf"), -float("inf"), -1e-9, True, None, "1.0", [1.0], 10**400, 1e300], ids=repr
)
def test_a_price_that_is_no_time(price: object, caplog: pytest.LogCaptureFixture) -> None:
    changed: Any = prices()
    changed["panel"]["tile"] = price
    written(coefficients=changed)
    refused(caplog, "panel.tile is ")


def test_saving_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    written()
    calibration.save(LEVEL, prices(3.0), "2026-01-03", {})
    assert calibration.load(LEVEL).origin == "calibrated 2026-01-03"
    assert [path.name for path in tmp_path.iterdir()] == [f"x86-{LEVEL}.json"]


@needs_x86
@pytest.mark.slow
def test_a_small_calibration(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    monkeypatch.setattr(calibrate, "SHAPES", ((64, 64), (96, 32), (40, 128)))
    monkeypatch.setattr(calibrate, "MEMORY_SHAPES", ((128, 128), (64, 256)))
    monkeypatch.setattr(calibrate, "MANY_TOKENS", (16, 64))
    monkeypatch.setattr(conv_calibrate, "SHAPES", ((8, 16, 14, 1, 1), (8, 8, 14, 3, 1)))
    monkeypatch.setattr(conv_calibrate, "DEPTHWISE_SHAPES", ((8, 14, 3, 1),))
    monkeypatch.setattr(timing, "_RUNS", (1, 3))
    torch.set_num_threads(2)
    before = get_target(None)
    result = calibrate.calibrate(seconds=0.1)
    assert torch.get_num_threads() == 2
    assert result.level == cpu.best_level()
    assert result.peak > 0
    assert result.path == str(calibration.path_of(result.level))
    # Every model has a few points, and the table shows them.
    assert set(result.points) == set(calibration._shipped(result.level, "", cpu.cpu_family()).coefficients) - {
        "convert",
        "layout",
    }
    assert min(result.points.values()) >= 8
    assert set(result.errors) == set(result.points)
    assert "rows" in str(result)
    assert result.path in str(result)
    # What was written is taken by the next target, not by those that exist.
    assert calibration.load(result.level).measured_here
    assert not before.calibrated
    after = get_target(None)
    assert after.calibrated
    assert "calibrated" in after.description


@needs_x86
def test_the_number_of_threads_is_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    def broken(*arguments: object) -> float:
        raise RuntimeError("surprise")

    monkeypatch.setattr(calibrate, "measure_fma_peak", broken)
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="surprise"):
        calibrate.calibrate(seconds=0.1)
    assert torch.get_num_threads() == 2
    assert not calibration.path_of(cpu.best_level()).exists()
