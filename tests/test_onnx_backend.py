"""The onnx package's own backend tests, optimised and run: all that ONNX Runtime itself passes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnx_backend as backend
import onnx_cases as cases
import onnxruntime
import pytest

import sparsecomp.onnx


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    onnxruntime.set_default_logger_severity(4)
    yield
    onnxruntime.set_default_logger_severity(2)


def _run(session: Any, inputs: list[Any]) -> list[Any]:
    given: list[Any] = session.run(
        None, {i.name: value for i, value in zip(session.get_inputs(), inputs, strict=False)}
    )
    return given


def _passes(session: Any, case: backend.Case) -> bool:
    return all(
        backend.agree(given, expected, case.rtol, case.atol)
        for inputs, outputs in case.data
        for given, expected in zip(_run(session, inputs), outputs, strict=True)
    )


def _passes_in_ort(case: backend.Case) -> bool:
    try:
        return _passes(cases.session(case.model), case)
    except Exception:  # noqa: BLE001 -- what ONNX Runtime does not take is not our matter
        return False


def _check(found: Iterator[backend.Case], folder: Path, least: int) -> None:
    passed, failures = 0, []
    for case in found:
        if not _passes_in_ort(case):
            continue
        try:
            sparsecomp.onnx.optimize(case.model, folder / "m.onnx")
            ok = _passes(cases.session(folder / "m.onnx"), case)
        except Exception as error:  # noqa: BLE001 -- collected
            failures.append(f"{case.name}: {type(error).__name__} {error}")
            continue
        passed += ok
        failures += [] if ok else [case.name]
    assert not failures
    assert passed >= least


@pytest.mark.parametrize(("kind", "least"), [("simple", 15), ("pytorch-converted", 50), ("pytorch-operator", 20)])
def test_stored_models(kind: str, least: int, tmp_path: Path) -> None:
    _check(backend.stored_cases(kind), tmp_path, least)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_model_for_every_operator(tmp_path: Path) -> None:
    _check(backend.node_cases(), tmp_path, 1400)


@pytest.mark.slow
def test_networks(tmp_path: Path) -> None:
    for case in backend.light_cases():
        generator = np.random.default_rng(0)
        session = cases.session(case.model)
        inputs = [generator.random(i.shape).astype(np.float32) for i in session.get_inputs()]
        case.data.append((inputs, _run(session, inputs)))
        _check(iter([case]), tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [9, 11, 17])
def test_pruned_models_with_every_site_sparse(opset: int, tmp_path: Path) -> None:
    """The models are of opset 6: their weights are pruned and they are brought to opsets in which sites are found."""
    replaced = 0
    for case in backend.stored_cases("pytorch-converted"):
        try:
            model = cases.pruned(onnx.version_converter.convert_version(case.model, opset), 0.5)
            session = cases.session(model)
            case.data = [(inputs, _run(session, inputs)) for inputs, _ in case.data]
        except Exception:  # noqa: BLE001 -- neither converter nor ONNX Runtime take everything
            continue
        case.atol = 1e-4
        output = tmp_path / "m.onnx"
        report = sparsecomp.onnx.optimize(model, output, options=cases.forced(model))
        replaced += len(report.rewritten)
        assert _passes(cases.session(output), case), case.name
        if report.rewritten:
            assert _passes(cases.session(output, sparsecomp.onnx.library_of(output)), case), case.name
    assert replaced >= 10
