"""Weights whose rows are read on their own: compressed rows, 2:4 streamed for few tokens, and the weights of an FFN."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TYPES = (*FLOATS, torch.int8)
TWO_FOUR = (torch.float16, torch.bfloat16, torch.int8)
"""Types of the kernel that streams 2:4."""
MAX_INPUTS = 2**16 - 9
"""Columns are 16 bits where few tokens are multiplied, and the one after the last is a zero."""


def pack_rows(weight: Tensor) -> dict[str, Tensor]:
    """Pack any weight ``[outputs, inputs]`` as compressed rows, for ``kernels/rows.cu``.

    Returns:
        ``values``: as the weight, ``[kept]``. ``columns``: int32 ``[kept]``. ``starts``: int32 ``[outputs + 1]``.

    Raises:
        ValueError: The weight is empty, or no matrix of float32, float16, bfloat16 or int8.
    """
    _check(weight, TYPES)
    row, column = (weight != 0).nonzero(as_tuple=True)
    starts = functional.pad((weight != 0).sum(dim=1).cumsum(0), (1, 0))
    return {"values": weight[row, column], "columns": column.to(torch.int32), "starts": starts.to(torch.int32)}


def pack_token_rows(weight: Tensor) -> dict[str, Tensor]:
    """Pack any weight ``[outputs, inputs]`` as rows that are filled up to 4 slots, for ``kernels/rows_token.cu``.

    Returns:
        ``values``: as the weight, ``[slots]``. ``columns``: int16 ``[slots]``, unsigned by their bits, ``inputs`` in
        filled slots. ``starts``: int32 ``[outputs + 1]``, multiples of 4.

    Raises:
        ValueError: The weight is empty, no matrix of float32, float16, bfloat16 or int8, or has more than `MAX_INPUTS`
            columns.
    """
    _check(weight, TYPES)
    inputs = weight.shape[1]
    if inputs > MAX_INPUTS:
        raise ValueError(f"got {inputs} inputs; the kernel that streams rows takes at most {MAX_INPUTS}")
    kept = weight != 0
    counts = kept.sum(dim=1)
    starts = functional.pad(((counts + 3) // 4 * 4).cumsum(0), (1, 0))
    row, column = kept.nonzero(as_tuple=True)
    slot = starts[row] + torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    values = weight.new_zeros(int(starts[-1]))
    columns = torch.full((int(starts[-1]),), inputs)
    values[slot], columns[slot] = weight[row, column], column
    return {"values": values, "columns": _int16(columns), "starts": starts.to(torch.int32)}


def pack_two_four(weight: Tensor) -> dict[str, Tensor]:
    """Pack a weight ``[outputs, inputs]`` that keeps 2 of each 4 columns, for ``kernels/two_four_token.cu``.

    Returns:
        ``values``: as the weight, ``[outputs, padded / 2]``, with inputs padded to a multiple of 16. ``places``: int16
        ``[outputs, padded / 16]``, two bits for each of 8 values, the first in the lowest.

    Raises:
        ValueError: The weight is empty, no matrix of float16, bfloat16 or int8, or has more than two values in four
            columns.
    """
    _check(weight, TWO_FOUR)
    fours = functional.pad(weight, (0, -weight.shape[1] % 16)).reshape(len(weight), -1, 4)
    if bool(((fours != 0).sum(dim=2) > 2).any()):
        raise ValueError("the weight has more than two values in four columns; prune it to 2:4 first")
    order = (fours == 0).to(torch.int8).argsort(dim=2, stable=True)[..., :2].sort(dim=2).values
    bits = (order.reshape(len(weight), -1, 8) << (2 * torch.arange(8))).sum(dim=2)
    return {"values": fours.gather(2, order).reshape(len(weight), -1), "places": _int16(bits)}


def pack_ffn(gate: Tensor, up: Tensor | None, down: Tensor) -> dict[str, Tensor]:
    """Lay out the weights of an FFN for ``kernels/ffn_threshold.cu``.

    Args:
        gate: ``[hidden, inputs]``, the weight whose activations decide which units survive.
        up: ``[hidden, inputs]``, or None where the FFN has two weights.
        down: ``[outputs, hidden]``.

    Returns:
        ``gate``, ``up`` (if any): ``[hidden, stride]`` with inputs padded to a multiple of 128. ``down``:
        ``[hidden, outputs]``. What lies like that already is not copied.

    Raises:
        ValueError: The weights do not fit each other, or are no matrices of float32, float16 or bfloat16.
    """
    _check(gate, FLOATS)
    given = [tuple(weight.shape) for weight in (gate, up, down) if weight is not None]
    if (
        any(weight.dtype != gate.dtype for weight in (up, down) if weight is not None)
        or (up is not None and up.shape != gate.shape)
        or down.ndim != 2
        or down.shape[1] != gate.shape[0]
        or not len(down)
    ):
        raise ValueError(f"the weights of an FFN must fit each other and be of one type; got shapes {given}")
    packed = {"gate": _padded(gate), "down": down.t().contiguous()}
    if up is not None:
        packed["up"] = _padded(up)
    return packed


def _padded(weight: Tensor) -> Tensor:
    """With the columns that bring it to a multiple of 128; a weight that has these is used as it is.

    The kernels read four values at once, so what begins elsewhere than at a multiple of 16 bytes is copied.
    """
    missing = -weight.shape[1] % 128
    if missing:
        return functional.pad(weight, (0, missing))
    return weight.clone(memory_format=torch.contiguous_format) if weight.data_ptr() % 16 else weight.contiguous()


def _check(weight: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if weight.ndim != 2 or not weight.numel() or weight.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"got {weight.dtype} of shape {tuple(weight.shape)}; pass a non-empty {names} matrix")


def _int16(words: Tensor) -> Tensor:
    """int16 of the same 16 bits."""
    return torch.where(words >= 2**15, words - 2**16, words).to(torch.int16)
