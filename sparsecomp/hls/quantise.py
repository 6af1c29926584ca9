"""A float ONNX model becomes one in QDQ form: static quantisation by ONNX Runtime, on calibration data."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

_QUANTISED = (
    *("Gemm", "MatMul", "Conv", "Relu", "Clip"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "Reshape", "Flatten"),
)
MOST_SAMPLES = 256
"""Calibration samples that are used."""


def is_quantised(model: ir.Model) -> bool:
    """Whether a model is in QDQ form."""
    return any(node.op_type == "DequantizeLinear" for node in model.graph)


class _Samples(CalibrationDataReader):
    def __init__(self, feeds: Mapping[str, npt.NDArray[Any]], batch: int) -> None:
        (self.name,) = feeds
        values = feeds[self.name]
        self.batches = iter([values[at : at + batch] for at in range(0, len(values) - len(values) % batch, batch)])

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        values = next(self.batches, None)
        return None if values is None else {self.name: values}


def quantise(model: ir.Model, title: str, calibration: Mapping[str, npt.NDArray[Any]] | None) -> ir.Model:
    """Quantise a float model to int8: activations with one scale, weights symmetric with one for each output.

    Constants are folded and batch norms merged first, by ONNX Runtime.

    Args:
        model: float, with one input.
        title: what errors call it.
        calibration: the input's name, and samples along the first axis.

    Raises:
        ValueError: there is no calibration data, it does not fit the input, or ONNX Runtime cannot quantise the model.
    """
    (name, batch) = _input_of(model, title)
    if calibration is None:
        raise ValueError(
            f"{title} is a float model: give calibration data, an .npz file with samples of input {name!r}, or a model "
            f"in QDQ form"
        )
    if set(calibration) != {name}:
        raise ValueError(f"the calibration data has {', '.join(sorted(calibration))}; expected samples of {name!r}")
    samples = np.asarray(calibration[name], np.float32)[:MOST_SAMPLES]
    if len(samples) < batch or not np.all(np.isfinite(samples)):
        raise ValueError(f"the calibration data of {name!r} must be finite and at least {batch} samples")
    with tempfile.TemporaryDirectory() as folder:
        plain, folded, done = (str(Path(folder) / part) for part in ("plain.onnx", "folded.onnx", "done.onnx"))
        onnx.save(ir.to_proto(model), plain)
        level = logging.getLogger().level
        try:
            _fold(plain, folded)
            logging.getLogger().setLevel(logging.ERROR)  # its advice to preprocess was followed by other means
            quantize_static(
                folded,
                done,
                _Samples({name: samples}, batch),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_QUANTISED),
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
            )
            return ir.from_proto(onnx.load(done))
        except Exception as error:  # whatever ONNX Runtime raises for a model that it does not take
            raise ValueError(f"ONNX Runtime cannot quantise {title}: {error}") from error
        finally:
            logging.getLogger().setLevel(level)


def _input_of(model: ir.Model, title: str) -> tuple[str, int]:
    """Name of the input, and the samples that a call takes."""
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    if len(inputs) != 1 or inputs[0].name is None or inputs[0].shape is None:
        raise ValueError(f"{title} has {len(inputs)} inputs; a design has one: export the part behind it")
    first = inputs[0].shape[0] if len(inputs[0].shape) else 1
    return inputs[0].name, first if isinstance(first, int) else 1


def _fold(source: str, target: str) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = target
    options.log_severity_level = 3
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
