"""The constants of an ONNX model: initializers, Constant nodes, and what a few operations make of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from sparsecomp.log import log

DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
}
"""Element types that PyTorch has too."""

_DEEPEST = 16  # such operations in a row


class Constants:
    """Which values of a model are constant, and what they are; what was folded is kept."""

    def __init__(self, model: ir.Model) -> None:
        # An initializer that is an input as well is a default, which the caller may replace.
        self._replaceable = set(model.graph.inputs)
        self._known: dict[ir.Value, bool] = {}
        self._folded: dict[ir.Value, npt.NDArray[Any]] = {}

    def is_constant(self, value: ir.Value) -> bool:
        """Whether a value is the same for every call and can be computed here."""
        if value not in self._known:
            self._known[value] = self._find(value, 0)
        return self._known[value]

    def _find(self, value: ir.Value, depth: int) -> bool:
        if value in self._replaceable or depth > _DEEPEST:
            return False
        if _stored(value) is not None:
            return True
        node = value.producer()
        if node is None or node.domain != "" or node.op_type not in _FOLDERS or not node.inputs:
            return False
        if not all(operand is None or self._find(operand, depth + 1) for operand in node.inputs):
            return False
        if value not in self._folded:
            try:
                self._folded[value] = self._fold(node)
            except ValueError as error:
                log.info("%s is not folded: %s", value.name, error)
                return False
        return True

    def name(self, value: ir.Value) -> str:
        """The name of a constant, of a folded one that of what it was made of."""
        while _stored(value) is None and (node := value.producer()) is not None and node.inputs[0] is not None:
            value = node.inputs[0]
        return value.name or ""

    def shape_and_type(self, value: ir.Value) -> tuple[tuple[int, ...], torch.dtype | None]:
        """Shape and element type of a constant, None for a type that PyTorch does not have."""
        stored = _stored(value)
        if stored is not None:
            return tuple(stored.shape.numpy()), DTYPES.get(stored.dtype)
        array = self.array(value)
        assert array is not None
        return array.shape, DTYPES.get(ir.DataType.from_numpy(array.dtype))

    def array(self, value: ir.Value) -> npt.NDArray[Any] | None:
        """What a constant is; None if it is none.

        Raises:
            ValueError: its data does not fit its shape, or cannot be read.
        """
        if not self.is_constant(value):
            return None
        return self._value(value)

    def _value(self, value: ir.Value) -> npt.NDArray[Any]:
        stored = _stored(value)
        return self._folded[value] if stored is None else read_tensor(stored)

    def tensor(self, value: ir.Value) -> torch.Tensor | None:
        """A constant for PyTorch, sharing its memory; None for types that no kernel could take."""
        shape, dtype = self.shape_and_type(value)
        if dtype is None or not dtype.is_floating_point or not shape:
            return None
        array = self.array(value)
        return None if array is None else as_torch(array)

    def _fold(self, node: ir.Node) -> npt.NDArray[Any]:
        given = [None if operand is None else self._value(operand) for operand in node.inputs]
        try:
            return _FOLDERS[node.op_type](node, *given)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"node {node.name!r} ({node.op_type}) cannot be evaluated: {error}") from error


def _cast(node: ir.Node, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    to = ir.DataType(node.attributes.get_int("to", 0))
    if DTYPES[to].is_floating_point and DTYPES[ir.DataType.from_numpy(x.dtype)].is_floating_point:
        return x.astype(to.numpy())
    raise ValueError("only floating point types are converted")


def _dequantize(
    node: ir.Node, x: npt.NDArray[Any], scale: npt.NDArray[Any], zero: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size") or 0

    def spread(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if values.size == 1:
            return values.reshape(())
        if block:
            repeated = np.repeat(values, block, axis)
            return np.take(repeated, np.arange(x.shape[axis]), axis)
        shape = [1] * x.ndim
        shape[axis] = values.size
        return values.reshape(shape)

    shift = 0 if zero is None else spread(zero.astype(np.int32))
    return ((x.astype(np.int32) - shift).astype(scale.dtype) * spread(scale)).astype(scale.dtype)


def _reshape(node: ir.Node, x: npt.NDArray[Any], shape: npt.NDArray[Any]) -> npt.NDArray[Any]:
    keeps = not node.attributes.get_int("allowzero")
    return x.reshape([x.shape[i] if size == 0 and keeps else int(size) for i, size in enumerate(shape)])


def _axes(node: ir.Node, axes: npt.NDArray[Any] | None) -> tuple[int, ...] | None:
    found = node.attributes.get_ints("axes") if axes is None else axes.reshape(-1).tolist()
    return None if found is None else tuple(int(axis) for axis in found)


def _squeeze(node: ir.Node, x: npt.NDArray[Any], axes: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    return np.squeeze(x, _axes(node, axes))


def _unsqueeze(node: ir.Node, x: npt.NDArray[Any], axes: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    return np.expand_dims(x, _axes(node, axes) or ())


_FOLDERS: dict[str, Callable[..., npt.NDArray[Any]]] = {
    "Cast": _cast,
    "DequantizeLinear": _dequantize,
    "Identity": lambda _, x: x,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
}
"""Operations that give a constant for constants; none of them makes more elements than it is given."""


def _stored(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or a Constant node."""
    return ir.convenience.get_const_tensor(value)


def read_tensor(tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    """The elements of a tensor, which may lie in another file.

    Raises:
        ValueError: they do not fit the shape, or cannot be read.
    """
    try:
        array = tensor.numpy()
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"constant {tensor.name!r} cannot be read: {error}") from error
    if tuple(array.shape) != tuple(tensor.shape.numpy()):
        raise ValueError(
            f"constant {tensor.name!r} holds {array.shape}, but its shape is {tuple(tensor.shape.numpy())}"
        )
    return array


def as_torch(array: npt.NDArray[Any]) -> torch.Tensor | None:
    """An array as a tensor of the same memory, which is only read; None for a type that PyTorch does not have."""
    dtype = DTYPES.get(ir.DataType.from_numpy(array.dtype))
    if dtype is None:
        return None
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if dtype == torch.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
