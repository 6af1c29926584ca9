"""The test cases of the onnx package itself, as `(name, model, [(inputs, outputs), ...])`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data"
KINDS = ("simple", "pytorch-converted", "pytorch-operator")


@dataclass
class Case:
    """A model with inputs and the outputs that are expected for them, by order."""

    name: str
    model: onnx.ModelProto
    data: list[tuple[list[Any], list[Any]]]
    rtol: float = 1e-3
    atol: float = 1e-7


def stored_cases(kind: str) -> Iterator[Case]:
    """The cases of a kind that lie in the package's folder."""
    for folder in sorted((FOLDER / kind).iterdir()):
        if (folder / "model.onnx").exists():
            model = onnx.load(folder / "model.onnx")
            sets = sorted(folder.glob("test_data_set_*"))
            inputs = [_values(path, "input", model.graph.input) for path in sets]
            outputs = [_values(path, "output", model.graph.output) for path in sets]
            yield Case(folder.name, model, list(zip(inputs, outputs, strict=True)))


def light_cases() -> Iterator[Case]:
    """Well-known networks whose weights are computed by the model; inputs are random."""
    for path in sorted((FOLDER / "light").glob("*.onnx")):
        yield Case(path.stem, onnx.load(path), [])


def node_cases() -> Iterator[Case]:
    """A model for every operator and its corner cases."""
    from onnx.backend.test.case.node import collect_testcases

    for case in collect_testcases(None):
        if case.model is not None and case.data_sets is not None:
            data = [(list(inputs), list(outputs)) for inputs, outputs in case.data_sets]
            yield Case(case.name, case.model, data, case.rtol, case.atol)


def _values(folder: Path, what: str, declared: Any) -> list[Any]:
    values = []
    for index in range(len(list(folder.glob(f"{what}_*.pb")))):
        content = (folder / f"{what}_{index}.pb").read_bytes()
        kind = declared[index].type.WhichOneof("value") if index < len(declared) else "tensor_type"
        if kind == "sequence_type":
            values.append(numpy_helper.to_list(onnx.SequenceProto.FromString(content)))
        elif kind == "optional_type":
            values.append(numpy_helper.to_optional(onnx.OptionalProto.FromString(content)))
        else:
            values.append(numpy_helper.to_array(onnx.TensorProto.FromString(content)))
    return values


def agree(given: Any, expected: Any, rtol: float, atol: float) -> bool:
    """Whether two values of a model are equal within a tolerance."""
    if isinstance(expected, (list, tuple)):
        return len(given) == len(expected) and all(map(agree, given, expected, [rtol] * 9999, [atol] * 9999))
    if expected is None or given is None:
        return given is expected
    given, expected = np.asarray(given), np.asarray(expected)
    if given.shape != expected.shape:
        return False
    if expected.dtype.kind in "OUS":
        return bool((given.astype(str) == expected.astype(str)).all())
    return bool(np.allclose(given.astype(np.complex128), expected.astype(np.complex128), rtol, atol, equal_nan=True))
