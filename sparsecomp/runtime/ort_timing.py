"""Models in ONNX Runtime beside each other: how long each takes, and how far their outputs are apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

_TYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}


@dataclass(frozen=True)
class Timing:
    """One model in comparison to the first.

    Attributes:
        name: of the model.
        ms: median milliseconds of a call.
        speedup: over the first: the median of the ratios within rounds.
        difference: largest difference of a float output from the first's, relative to its largest value.
        load_ms: milliseconds to make the session.
    """

    name: str
    ms: float
    speedup: float
    difference: float
    load_ms: float


def random_inputs(session: Any, sizes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Random inputs for a session: normal numbers, and for integers ones that indices into any table may be.

    Args:
        session: says which inputs there are.
        sizes: of every input by name.

    Raises:
        ValueError: an input has a type for which there is no obvious random value.
    """
    generator = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        shape = tuple(sizes[value.name])
        if value.type in _TYPES:
            feeds[value.name] = generator.standard_normal(shape).astype(_TYPES[value.type])
        elif value.type in _INTEGERS:
            feeds[value.name] = generator.integers(0, 2, shape).astype(_INTEGERS[value.type])
        elif value.type == "tensor(bool)":
            feeds[value.name] = np.ones(shape, np.bool_)
        else:
            raise ValueError(
                f"input {value.name!r} is a {value.type}; random values are made for floats, integers, bool"
            )
    return feeds


def make_session(model: Path | bytes, library: Path | None, threads: int) -> Any:
    """A session with so many intra-op threads, and with a library if one is given, for a file or its content."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(model) if isinstance(model, Path) else model, options)


def product_call(weight: npt.NDArray[np.float32], x: npt.NDArray[np.float32], threads: int) -> Callable[[], Any]:
    """A call of a session with one product, of x `[tokens, I]` with a constant weight `[O, I]`."""
    constants = {"w": np.ascontiguousarray(weight.T)}
    return _call([helper.make_node("MatMul", ["x", "w"], ["y"])], x, constants, threads)


def conv_chain_call(channels: int, kernel: int, size: int, length: int) -> Callable[[], Any]:
    """A call of a session, with one thread, with a chain of equal convolutions that keep the size of their maps."""
    weight = np.random.default_rng(0).standard_normal((channels, channels, kernel, kernel)).astype(np.float32)
    nodes = [
        helper.make_node(
            "Conv",
            ["x" if at == 0 else f"h{at}", "w"],
            ["y" if at == length - 1 else f"h{at + 1}"],
            pads=[kernel // 2] * 4,
        )
        for at in range(length)
    ]
    x = np.ones((1, channels, size, size), np.float32)
    return _call(nodes, x, {"w": weight / np.float32(channels * kernel * kernel)}, 1)


def _call(
    nodes: Sequence[onnx.NodeProto], x: npt.NDArray[np.float32], constants: Mapping[str, Any], threads: int
) -> Callable[[], Any]:
    """A call of a session with nodes that make y of x."""
    graph = helper.make_graph(
        list(nodes),
        "nodes",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * x.ndim)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = make_session(model.SerializeToString(), None, threads)
    return lambda: session.run(None, {"x": x})


def compare(
    models: Mapping[str, tuple[Path, Path | None]], sizes: Mapping[str, Sequence[int]], threads: int, rounds: int
) -> list[Timing]:
    """Time models in turn on the same random inputs.

    Args:
        models: path and library by name; all have the inputs of the first.
        sizes: of every input by name.
        threads: of each session.
        rounds: calls of each that are timed.
    """
    sessions, loads = {}, {}
    for name, (path, library) in models.items():
        start = time.perf_counter()
        sessions[name] = make_session(path, library, threads)
        loads[name] = 1e3 * (time.perf_counter() - start)
    names = list(models)
    feeds = random_inputs(sessions[names[0]], sizes)
    outputs = {name: session.run(None, feeds) for name, session in sessions.items()}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            sessions[name].run(None, feeds)
            taken[name].append(1e3 * (time.perf_counter() - start))
    return [
        Timing(
            name,
            statistics.median(taken[name]),
            statistics.median(a / b for a, b in zip(taken[names[0]], taken[name], strict=True)),
            _difference(outputs[name], outputs[names[0]]),
            loads[name],
        )
        for name in names
    ]


def _difference(given: Sequence[Any], expected: Sequence[Any]) -> float:
    largest = 0.0
    for a, b in zip(given, expected, strict=True):
        if getattr(b, "size", 0) and b.dtype.kind == "f":
            scale = float(np.abs(b).max()) or 1.0
            largest = max(largest, float(np.abs(a - b).max()) / scale)
    return largest
