"""Constants of a QDQ model: tensors that are there, and those that a few operations make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from sparsecomp.hls.network import HIGH, LOW, Integers


@dataclass(frozen=True)
class Quantised:
    """Integers with their scale: real values are `scale * (values - zero)`.

    Attributes:
        values: as stored.
        scale: of all, or one for every place along the axis.
        zero: as the scale.
        axis: that scales lie along.
    """

    values: npt.NDArray[Any]
    scale: npt.NDArray[np.float64]
    zero: Integers
    axis: int

    def spread(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Scales or zero points in a shape that multiplies the values."""
        if array.size == 1:
            return array.reshape(())
        return array.reshape([-1 if at == self.axis % self.values.ndim else 1 for at in range(self.values.ndim)])

    @property
    def real(self) -> npt.NDArray[np.float64]:
        """The values that are meant."""
        centred = self.values.astype(np.float64) - self.spread(self.zero)
        return np.asarray(centred * self.spread(self.scale))

    def int8(self, name: str) -> Integers:
        """The values without their zero point.

        Raises:
            ValueError: some are outside int8.
        """
        centred = self.values.astype(np.int64) - self.spread(self.zero)
        outside = int(np.count_nonzero((centred < LOW) | (centred > HIGH)))
        if outside:
            raise ValueError(
                f"layer {name!r}: {outside} of {centred.size} weights lie outside int8 ({centred.min()} to "
                f"{centred.max()}, stored as {self.values.dtype}): quantise its weight to int8"
            )
        return centred


class Constants:
    """The constants of a graph by name."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._nodes = {node.output[0]: node for node in graph.node if node.output}
        self._known: dict[str, bool] = {}

    def __contains__(self, name: str) -> bool:
        """Whether a value is a constant that can be read: a tensor, or one through (de)quantising and transposing."""
        if name in self._tensors:
            return True
        node = self._nodes.get(name)
        if node is None or node.op_type not in ("Constant", "QuantizeLinear", "DequantizeLinear", "Transpose"):
            return False
        # Marked first, so that a circle of nodes ends here.
        if name not in self._known:
            self._known[name] = False
            self._known[name] = all(source in self for source in node.input if source)
        return self._known[name]

    def array(self, name: str) -> npt.NDArray[Any]:
        """A constant as it is, dequantised if it is quantised."""
        if name in self._tensors:
            return numpy_helper.to_array(self._tensors[name])
        node = self._nodes[name]
        if node.op_type == "Constant":
            return numpy_helper.to_array(attribute(node, "value"))
        if node.op_type == "DequantizeLinear":
            return self.quantised(name).real
        if node.op_type == "QuantizeLinear":
            return self._quantise(node)
        return np.transpose(self.array(node.input[0]), attribute(node, "perm", None))

    def quantised(self, name: str) -> Quantised:
        """A constant that is dequantised, with its scale.

        Raises:
            ValueError: it is not quantised.
        """
        node = self._nodes.get(name)
        if node is not None and node.op_type == "Transpose":
            inner = self.quantised(node.input[0])
            values = np.transpose(inner.values, attribute(node, "perm", None))
            order = attribute(node, "perm", list(reversed(range(values.ndim))))
            return Quantised(values, inner.scale, inner.zero, list(order).index(inner.axis % values.ndim))
        if node is None or node.op_type != "DequantizeLinear":
            raise ValueError(f"weight {name!r} is not quantised: expected DequantizeLinear of int8 values")
        scale, zero = self._parameters(node)
        return Quantised(self.array(node.input[0]), scale, zero, int(attribute(node, "axis", 1)))

    def parameters(self, node: onnx.NodeProto) -> tuple[float, int, int]:
        """Scale, zero point and the least value of the type of an activation's QuantizeLinear or DequantizeLinear.

        Raises:
            ValueError: scales differ between channels, or the type is no 8-bit one.
        """
        scale, zero = self._parameters(node)
        kind = self.array(node.input[2]).dtype if len(node.input) > 2 and node.input[2] else np.dtype(np.uint8)
        if scale.size != 1:
            raise ValueError(f"{node.op_type} {node.name!r}: an activation has one scale, given {scale.size}")
        if kind not in (np.dtype(np.int8), np.dtype(np.uint8)):
            raise ValueError(f"{node.op_type} {node.name!r}: activations are int8 or uint8, given {kind}")
        return float(scale.reshape(())), int(zero.reshape(())), int(np.iinfo(kind).min)

    def _parameters(self, node: onnx.NodeProto) -> tuple[npt.NDArray[np.float64], Integers]:
        for name in node.input[1:]:
            if name and name not in self:
                raise ValueError(f"{node.op_type} {node.name!r}: scale or zero point {name!r} is not a constant")
        scale = self.array(node.input[1]).astype(np.float64)
        zero = np.zeros(scale.shape, np.int64)
        if len(node.input) > 2 and node.input[2]:
            zero = self.array(node.input[2]).astype(np.int64)
        return scale.reshape(-1), zero.reshape(-1)

    def _quantise(self, node: onnx.NodeProto) -> npt.NDArray[Any]:
        scale, zero = self._parameters(node)
        values = self.array(node.input[0]).astype(np.float64)
        kind = self.array(node.input[2]).dtype if len(node.input) > 2 and node.input[2] else np.dtype(np.uint8)
        as_is = Quantised(values, scale, zero, int(attribute(node, "axis", 1)))
        limits = np.iinfo(kind)
        rounded = np.rint(values / as_is.spread(scale)) + as_is.spread(zero)
        return np.clip(rounded, limits.min, limits.max).astype(kind)


_REQUIRED = object()


def attribute(node: onnx.NodeProto, name: str, default: Any = _REQUIRED) -> Any:
    """An attribute of a node.

    Raises:
        ValueError: it is missing and there is no default.
    """
    for given in node.attribute:
        if given.name == name:
            value = onnx.helper.get_attribute_value(given)
            return value.decode() if isinstance(value, bytes) else value
    if default is _REQUIRED:
        raise ValueError(f"{node.op_type} {node.name!r} lacks its attribute {name}")
    return default
