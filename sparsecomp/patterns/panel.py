"""The packed form of a weight whose rows share their inputs: panels of V outputs, every kept input one vector.

The outputs lie in the vector lanes, so a kernel reads one vector of V values and one broadcast activation per kept
column. Any weight packs exactly; it packs well where the rows of a panel keep the same columns (V:N:M, blocks of V
rows), and with V of 1 it is the ordinary compressed row form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class PanelWeight:
    """A weight `[O, I]` as panels of `v` rows.

    Attributes:
        v: rows of a panel.
        shape: (O, I) of the weight.
        ptr: int32 `[P + 1]` with `P = ceil(O / v)`; panel p keeps columns `ptr[p]` to `ptr[p + 1]`.
        cols: int32 `[ptr[-1]]`, the kept columns, ascending in each panel.
        values: float32 `[ptr[-1], v]`; lane l of panel p is row `p * v + l`, lanes past O are zero.
        dtype: type of the weight, which `unpack` restores (float32, bfloat16 or float16).

    Raises:
        ValueError: the arrays do not fit each other.
    """

    v: int
    shape: tuple[int, int]
    ptr: Tensor
    cols: Tensor
    values: Tensor
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        panels = -(-self.shape[0] // self.v)
        expected = ((panels + 1,), (self.cols.numel(),), (self.cols.numel(), self.v))
        given = (tuple(self.ptr.shape), tuple(self.cols.shape), tuple(self.values.shape))
        types = (self.ptr.dtype, self.cols.dtype, self.values.dtype)
        if given != expected or types != (torch.int32, torch.int32, torch.float32):
            raise ValueError(
                f"ptr, cols and values of a {self.shape} weight in panels of {self.v} must be int32, int32 and float32 "
                f"of shapes {expected}; given {types} of shapes {given}"
            )

    @classmethod
    def pack(cls, weight: Tensor, v: int, *, signed_zeros: bool = True) -> PanelWeight:
        """Pack a weight; a column is kept in a panel if any of its `v` entries is.

        Args:
            weight: `[O, I]`, float32, bfloat16 or float16, on any device, where the arrays will lie too.
            v: rows of a panel, at least 1.
            signed_zeros: count an entry as kept when any of its bits is set, so that `unpack` gives back negative
                zeros. Without it they become plain zeros, which no sum of finite products shows: the form that a
                kernel should read, since `weight * mask` leaves a negative zero for every negative weight it drops.

        Raises:
            ValueError: the weight is not a matrix of one of these types, or `v` is below 1.
        """
        if weight.dim() != 2 or weight.dtype not in _BITS:
            raise ValueError(
                f"only a float32, bfloat16 or float16 matrix [outputs, inputs] can be packed; given {weight.dtype} "
                f"of shape {tuple(weight.shape)}"
            )
        if v < 1:
            raise ValueError(f"a panel has at least one row, given {v}")
        weight = weight.detach()
        outputs, inputs = weight.shape
        panels = -(-outputs // v)
        bits = weight.view(_BITS[weight.dtype])
        if not signed_zeros:
            # Negative zero is the lowest integer; compared as integers, subnormals are safe also where they flush.
            bits = bits.masked_fill(bits == torch.iinfo(bits.dtype).min, 0)
        bits = functional.pad(bits, (0, 0, 0, panels * v - outputs)).reshape(panels, v, inputs)
        kept = (bits != 0).any(dim=1)
        counts = torch.count_nonzero(kept, dim=1)
        total = int(counts.sum())
        if total > _INT32_MAX:
            raise ValueError(f"the weight keeps {total} columns over its panels; at most {_INT32_MAX} can be addressed")
        ptr = functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        panel, column = torch.nonzero(kept, as_tuple=True)
        lanes = bits.transpose(1, 2)[panel, column].contiguous()
        return cls(
            v=v,
            shape=(outputs, inputs),
            ptr=ptr,
            cols=column.to(torch.int32),
            values=_widen(lanes.view(weight.dtype)),
            dtype=weight.dtype,
        )

    @classmethod
    def full(cls, weight: Tensor, v: int) -> PanelWeight:
        """A float32 weight `[O, I]` with all of its columns kept in every panel of `v` rows: a dense product."""
        outputs, inputs = weight.shape
        panels = -(-outputs // v)
        padded = functional.pad(weight, (0, 0, 0, panels * v - outputs))
        values = padded.reshape(panels, v, inputs).transpose(1, 2).reshape(-1, v).contiguous()
        columns = torch.arange(inputs, dtype=torch.int32).repeat(panels)
        return cls(v, (outputs, inputs), torch.arange(panels + 1, dtype=torch.int32) * inputs, columns, values)

    def unpack(self) -> Tensor:
        """Return the weight `[O, I]` in its own type, bit for bit as it was packed."""
        panels = self.ptr.numel() - 1
        lanes = _narrow(self.values, self.dtype)
        bits = torch.zeros(panels, self.shape[1], self.v, dtype=_BITS[self.dtype], device=self.values.device)
        panel = torch.repeat_interleave(torch.arange(panels, device=self.ptr.device), self.ptr.diff().long())
        bits[panel, self.cols.long()] = lanes.view(_BITS[self.dtype])
        rows = bits.transpose(1, 2).reshape(panels * self.v, self.shape[1])[: self.shape[0]]
        return rows.contiguous().view(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return sum(array.numel() * array.element_size() for array in (self.ptr, self.cols, self.values))


def _widen(values: Tensor) -> Tensor:
    """Float32 of the same value; a NaN keeps its payload, which a conversion may change."""
    if values.dtype == torch.float32:
        return values
    bits = values.view(torch.int16).to(torch.int32)
    if values.dtype == torch.bfloat16:
        return (bits << 16).view(torch.float32)
    nan = ((bits & 0x8000) << 16) | 0x7F800000 | ((bits & 0x3FF) << 13)
    return torch.where(torch.isnan(values), nan.view(torch.float32), values.float())


def _narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `_widen`."""
    if dtype == torch.float32:
        return values
    bits = values.view(torch.int32)
    if dtype == torch.bfloat16:
        return (bits >> 16).to(torch.int16).view(torch.bfloat16)
    nan = ((bits >> 16) & 0x8000) | 0x7C00 | ((bits >> 13) & 0x3FF)
    nan_bits = torch.where(nan >= 0x8000, nan - 0x10000, nan).to(torch.int16)
    return torch.where(torch.isnan(values), nan_bits.view(torch.float16), values.to(torch.float16))
