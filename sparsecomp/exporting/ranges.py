"""Sizes of inputs that are given as ranges, such as `1..128`: those that each run of a package gives."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from sparsecomp.exporting.program import Size

_MOST = 1 << 20
_RANGE = re.compile(r"(?:([A-Za-z]\w*):)?(\d{1,7})\.\.(\d{1,7})")

_MADE_UP = re.compile(r"s\d+")

Given = Mapping[str, Sequence[int | str]]


def parse_shapes(model: ir.Model, given: Given) -> tuple[dict[str, list[int]], dict[tuple[str, int], Size]]:
    """Read the sizes that are given for inputs.

    Args:
        model: whose dimensions of one name have one size.
        given: by the name of an input its sizes: numbers, or texts such as `1..128`, or `length:1..128`, which gives
            the size a name: what has one name is one size, also where the model does not say so.

    Returns:
        The sizes with the largest of each range, and by input and place the sizes that each run gives, also of inputs
        that nothing was given for.

    Raises:
        ValueError: a text has another form, a dimension is always the same in the model, or has two ranges.
    """
    inputs = {value.name or "": value for value in model.graph.inputs}
    sizes: dict[str, Size] = {}
    for name, shape in given.items():
        for place, size in enumerate(shape):
            found = _range(name, size)
            if found is None or name not in inputs:
                continue
            symbol = _symbol(inputs[name], place)
            if symbol is None:
                dims = [str(dim) for dim in inputs[name].shape or ()]
                raise ValueError(
                    f"size {place} of input {name!r} cannot be the range {size}: the model has [{', '.join(dims)}], "
                    "and only a size that it leaves open can change from run to run"
                )
            label, *bounds = found
            # PyTorch makes up names such as s12.
            made_up = f"{name}_{place}" if _MADE_UP.fullmatch(symbol) else symbol
            known = sizes.get(symbol, Size(label or made_up, *bounds))
            known = next((other for other in sizes.values() if other.name == known.name), known)
            if [known.least, known.most] != bounds:
                raise ValueError(f"size {known.name!r} was given as {known.least}..{known.most} and as {size}")
            sizes[symbol] = known
    ranges = {
        (name, place): sizes[symbol]
        for name, value in inputs.items()
        for place in range(len(value.shape or ()))
        if (symbol := _symbol(value, place)) in sizes
    }
    largest = {
        name: [size if isinstance(size, int) else _most(name, size) for size in shape] for name, shape in given.items()
    }
    return largest, ranges


def _symbol(value: ir.Value, place: int) -> str | None:
    """The name of a dimension that the model leaves open; None for one that it has a number for."""
    if value.shape is None or place >= len(value.shape):
        return None
    dim = value.shape[place]
    return (dim.value or f"{value.name}.{place}") if isinstance(dim, ir.SymbolicDim) else None


def _most(name: str, size: str) -> int:
    found = _range(name, size)
    assert found is not None
    return found[2]


def _range(name: str, size: int | str) -> tuple[str | None, int, int] | None:
    """The name of a range, if it has one, with its least and most; None for a number."""
    if isinstance(size, int):
        return None
    found = _RANGE.fullmatch(size)
    least, most = (int(found[2]), int(found[3])) if found else (0, 0)
    if found is None or not 1 <= least <= most <= _MOST:
        raise ValueError(f"size {size!r} of input {name!r}: expected a number, or a range such as 1..128 up to {_MOST}")
    return found[1], least, most


def dynamic_shapes(module: nn.Module, count: int, given: Given) -> Any:
    """Ranges as `torch.export` takes them, for the first parameters of `forward`; None where there are none.

    Raises:
        ValueError: sizes are given for a parameter that there is not.
    """
    names = list(inspect.signature(module.forward).parameters)[:count]
    for name in given:
        if name not in names:
            raise ValueError(f"the module has no input {name!r}; its inputs are {', '.join(map(repr, names))}")
    changing = [
        {place: torch.export.Dim.DYNAMIC for place, size in enumerate(given.get(name, ())) if isinstance(size, str)}
        for name in names
    ]
    return tuple(entry or None for entry in changing) if any(changing) else None
