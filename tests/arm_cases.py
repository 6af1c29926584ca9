"""The models that packages are checked with, pruned, as ONNX with what they are fed; for tests and benchmarks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import onnx_cases as cases
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

import sparsecomp

Case = tuple[onnx.ModelProto, dict[str, np.ndarray[Any, Any]]]


class LastHiddenState(nn.Module):
    """BERT with one tensor as its output."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.bert(ids, mask)[0]  # type: ignore[no-any-return]


def _case(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Case:
    program = torch.onnx.export(model.eval(), inputs, dynamo=True, verbose=False)
    assert program is not None
    proto = program.model_proto
    names = (value.name for value in proto.graph.input)
    return proto, dict(zip(names, (value.numpy() for value in inputs), strict=True))


def minilm(tokens: int = 32) -> Case:
    """MiniLM at 70 % zeros."""
    bert, _ = models.minilm()
    sparsecomp.sparsify_(bert, "unstructured@0.7")
    ids = models.token_ids(1, tokens)
    return _case(LastHiddenState(bert), (ids, torch.ones_like(ids)))


def efficientnet() -> Case:
    """EfficientNet-Lite0 at 70 % zeros."""
    network = models.efficientnet_lite0()
    sparsecomp.sparsify_(network, "unstructured@0.7")
    return _case(network, (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),))


def paraphrase() -> Case:
    """The paraphrase model at 80 % zeros, for 16 tokens."""
    return cases.pruned(cases.paraphrase(), 0.8), cases.token_feeds(1, 16)


class _Reader(CalibrationDataReader):
    """One batch of token numbers."""

    def __init__(self) -> None:
        self.batches: Iterator[dict[str, Any]] = iter([cases.token_feeds(1, 16)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def quantised_paraphrase() -> Case:
    """The paraphrase model without zeros in QDQ form, with uint8 activations and int8 weights."""
    with tempfile.TemporaryDirectory() as folder:
        plain, quantised = Path(folder) / "float.onnx", Path(folder) / "quantised.onnx"
        onnx.save(cases.paraphrase(), plain)
        quantize_static(
            str(plain),
            str(quantised),
            _Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"WeightSymmetric": True},
        )
        return onnx.load(quantised), cases.token_feeds(1, 16)
