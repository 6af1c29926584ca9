"""The zeros around the maps of a convolution, as `Conv` and `Pad` say them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from sparsecomp.frontends.onnx_constants import Constants
from sparsecomp.frontends.onnx_groups import constant_number
from sparsecomp.ir import Size

Sizes = tuple[int, ...]


def zeros_around(node: ir.Node, sizes: Sequence[Size], window: tuple[Sizes, Sizes, Sizes]) -> Sizes | None:
    """Zeros before and behind each dimension of the maps of a `Conv`, those before first.

    Args:
        node: the convolution.
        sizes: of the maps, text for those that change.
        window: kernel, strides and dilations.

    Returns:
        None where they change from call to call, or more are before than behind.
    """
    dims = len(window[0])
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto == "NOTSET":
        pads: Sizes = tuple(int(size) for size in node.attributes.get_ints("pads", [0] * (2 * dims)) or ())
    elif auto == "VALID":
        pads = (0,) * (2 * dims)
    else:
        total = _same(sizes, window)
        if total is None:
            return None
        less, more = tuple(size // 2 for size in total), tuple(size - size // 2 for size in total)
        pads = (*less, *more) if auto == "SAME_UPPER" else (*more, *less)
    if len(pads) != 2 * dims:
        return None
    fits = all(0 <= before <= behind for before, behind in zip(pads[:dims], pads[dims:], strict=True))
    return pads if fits else None


def _same(sizes: Sequence[Size], window: tuple[Sizes, Sizes, Sizes]) -> Sizes | None:
    """All zeros of each dimension with which an output has one value for every step of its input."""
    if len(sizes) != len(window[0]):
        return None
    total = []
    for size, taps, step, apart in zip(sizes, *window, strict=True):
        reach = apart * (taps - 1) + 1
        if step == 1:
            total.append(reach - 1)
        elif isinstance(size, int):
            total.append(max((-(-size // step) - 1) * step + reach - size, 0))
        else:
            return None
    return tuple(total)


def zeros_of(node: ir.Node, opset: int, constants: Constants) -> Sizes | None:
    """Zeros before and behind each dimension that a `Pad` adds; None where they are computed, or are no zeros."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return None
    if opset < 11:
        pads = node.attributes.get_ints("pads", None)
        return None if pads is None or node.attributes.get_float("value", 0.0) != 0.0 else tuple(map(int, pads))
    value = node.inputs[2] if len(node.inputs) > 2 else None
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    given = node.inputs[1]
    if given is None or axes is not None or (value is not None and constant_number(value) != 0.0):
        return None
    array = constants.array(given)
    return None if array is None else tuple(int(size) for size in array.reshape(-1))
