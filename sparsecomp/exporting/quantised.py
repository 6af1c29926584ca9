"""Linears of QDQ models: what int8 values weight and input have, read off the nodes around them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sparsecomp.frontends.onnx import Overlay
from sparsecomp.frontends.onnx_constants import read_tensor
from sparsecomp.ir import LinearSite
from sparsecomp.kernels.dot import Levels
from sparsecomp.targets.arm.dot import Quantised

_LOWEST = {"int8": -128, "uint8": 0}


@dataclass(frozen=True)
class _Parameters:
    """Of a QuantizeLinear or DequantizeLinear.

    Attributes:
        scales: float32.
        zeros: the zero points.
        kind: their type.
    """

    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.int64]
    kind: str

    @property
    def levels(self) -> Levels | None:
        """How a value becomes int8, None if it does not with one scale and zero point."""
        if self.scales.size != 1 or self.zeros.size != 1 or self.kind not in _LOWEST:
            return None
        scale = float(self.scales.reshape(-1)[0])
        return Levels(scale, _LOWEST[self.kind] - int(self.zeros.reshape(-1)[0])) if 0 < scale < np.inf else None


def is_dequantised(overlay: Overlay, site: LinearSite) -> bool:
    """Whether the weight of a linear is stored in integers."""
    return _dequantize(overlay.origin(site.weight_op)) is not None


def quantised(overlay: Overlay, site: LinearSite) -> tuple[Quantised, ir.Value]:
    """The integers of a linear, and the value that its input is quantised from.

    The input of the site is `DequantizeLinear(QuantizeLinear(value))`. Where it is DequantizeLinear alone the value is
    its result, since quantising that once more gives the same integers.

    Raises:
        ValueError: weight or input has no integers that the int8 kernel takes; the message says why.
    """
    given = overlay.origin(site.x)
    node = _dequantize(given)
    if node is None or not isinstance(given, ir.Value):
        raise ValueError("its input is not quantised")
    parameters = _parameters(node)
    levels = None if parameters is None else parameters.levels
    if parameters is None or levels is None:
        raise ValueError("its input has no single positive scale with an int8 or uint8 zero point, all constant")
    weight, scales = _weight(overlay, site)
    before = None if node.inputs[0] is None else node.inputs[0].producer()
    if before is not None and before.op_type == "QuantizeLinear" and before.inputs[0] is not None:
        same = _parameters(before)
        if same is not None and same.levels == levels and before.inputs[0].dtype == ir.DataType.FLOAT:
            given = before.inputs[0]
    return Quantised(weight, scales, levels), given


def _weight(overlay: Overlay, site: LinearSite) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    node = _dequantize(overlay.origin(site.weight_op))
    parameters = None if node is None else _parameters(node)
    matrix = (site.weight.t() if site.transposed else site.weight).float().numpy()
    if parameters is None or parameters.scales.size not in (1, len(matrix)):
        raise ValueError("its weight has other scales than one for each output")
    scales = np.broadcast_to(parameters.scales.reshape(-1), (len(matrix),))
    with np.errstate(divide="ignore", invalid="ignore"):
        integers = np.rint(matrix / scales[:, None])
    # The scales may lie along the other side of a square weight, and integers of 16 bits or less a zero point be large.
    if not ((integers >= -128) & (integers <= 127) & (integers * scales[:, None] == matrix)).all():
        raise ValueError("its weight is no int8 numbers times a scale for each output")
    return integers.astype(np.int8), scales


def _dequantize(value: object) -> ir.Node | None:
    """The node that a value is dequantised by."""
    node = value.producer() if isinstance(value, ir.Value) else None
    return node if node is not None and node.domain == "" and node.op_type == "DequantizeLinear" else None


def _parameters(node: ir.Node) -> _Parameters | None:
    """What a node quantises with; None if that is not constant.

    Raises:
        ValueError: a constant cannot be read.
    """
    scale, zero = [*node.inputs, None][1:3]
    scales = None if scale is None else ir.convenience.get_const_tensor(scale)
    zeros = None if zero is None else ir.convenience.get_const_tensor(zero)
    if scales is None or (zero is not None and zeros is None):
        return None
    points = np.zeros(1, np.uint8) if zeros is None else read_tensor(zeros)
    return _Parameters(read_tensor(scales).astype(np.float32), points.astype(np.int64), str(points.dtype))
