"""Packed forms for one token: rows as index lists, or as bit masks where more than a third is kept.

With one token a linear is bound by the bytes of its weight, so these hold little beside the values: a 16-bit index per
kept entry, or one bit per entry of the weight. A kernel vectorises over the kept columns of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MASK_BITS = 16
"""Columns that one mask word covers."""


@dataclass(frozen=True, eq=False)
class GatherWeight:
    """A weight `[O, I]` as rows of (column, value), each row padded with zero values to a multiple of `group`.

    Attributes:
        shape: (O, I), I at most 65536.
        group: entries that a kernel takes at once.
        values: float32 `[groups * group]`.
        columns: uint16 `[groups * group]`; padding repeats the row's last column, or 0.
        ptr: int32 `[O + 1]`, groups of row o are `ptr[o]` to `ptr[o + 1]`.
    """

    shape: tuple[int, int]
    group: int
    values: npt.NDArray[np.float32]
    columns: npt.NDArray[np.uint16]
    ptr: npt.NDArray[np.int32]

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.values.nbytes + self.columns.nbytes + self.ptr.nbytes

    @classmethod
    def pack(cls, weight: Tensor, *, group: int) -> GatherWeight:
        """Pack a weight `[O, I]`; negative zeros are dropped as zeros.

        Raises:
            ValueError: not a matrix, or more inputs than a 16-bit index reaches.
        """
        dense = _matrix(weight)
        outputs, inputs = dense.shape
        if inputs > 65536:
            raise ValueError(f"16-bit indices reach 65536 inputs; given {inputs}")
        row, column = np.nonzero(dense)
        counts = np.bincount(row, minlength=outputs)
        groups = -(-counts // group)
        ptr = np.concatenate([[0], np.cumsum(groups)])
        if ptr[-1] * group > 2**31 - 1:
            raise ValueError(f"the weight keeps more than {2**31 - 1} entries, which int32 cannot address")
        values = np.zeros(ptr[-1] * group, np.float32)
        columns = np.zeros(ptr[-1] * group, np.uint16)
        at = np.arange(len(row)) - (np.cumsum(counts) - counts)[row] + ptr[row] * group
        values[at], columns[at] = dense[row, column], column
        return cls((outputs, inputs), group, values, columns, ptr.astype(np.int32))

    def unpack(self) -> Tensor:
        """Return the weight `[O, I]` in float32."""
        dense = np.zeros(self.shape, np.float32)
        row = np.repeat(np.arange(self.shape[0]), np.diff(self.ptr) * self.group)
        kept = self.values != 0
        dense[row[kept], self.columns[kept]] = self.values[kept]
        return torch.from_numpy(dense)


@dataclass(frozen=True, eq=False)
class MaskWeight:
    """A weight `[O, I]` as one bit per entry and the kept values in order.

    Attributes:
        shape: (O, I).
        masks: uint16 `[O, ceil(I / 16)]`, bit b of word w is column 16 w + b.
        values: float32 `[nonzeros + 16]`; the tail is padding that a kernel may read and never uses.
        ptr: int32 `[O]`, where the values of a row start.
    """

    shape: tuple[int, int]
    masks: npt.NDArray[np.uint16]
    values: npt.NDArray[np.float32]
    ptr: npt.NDArray[np.int32]

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.masks.nbytes + self.values.nbytes + self.ptr.nbytes

    @classmethod
    def pack(cls, weight: Tensor) -> MaskWeight:
        """Pack a weight `[O, I]`; negative zeros are dropped as zeros.

        Raises:
            ValueError: not a matrix.
        """
        dense = _matrix(weight)
        outputs, inputs = dense.shape
        words = -(-inputs // MASK_BITS)
        kept = np.zeros((outputs, words * MASK_BITS), bool)
        kept[:, :inputs] = dense != 0
        masks = np.packbits(kept, axis=1, bitorder="little").view("<u2")
        counts = kept.sum(axis=1)
        values = np.concatenate([dense[dense != 0], np.zeros(MASK_BITS, np.float32)])
        ptr = np.cumsum(counts) - counts
        return cls((outputs, inputs), np.ascontiguousarray(masks), values, ptr.astype(np.int32))

    def unpack(self) -> Tensor:
        """Return the weight `[O, I]` in float32."""
        bits = np.unpackbits(self.masks.view(np.uint8), axis=1, bitorder="little")[:, : self.shape[1]].astype(bool)
        dense = np.zeros(self.shape, np.float32)
        dense[bits] = self.values[: int(bits.sum())]
        return torch.from_numpy(dense)


def _matrix(weight: Tensor) -> npt.NDArray[np.float32]:
    if weight.dim() != 2:
        raise ValueError(f"a weight is a matrix [outputs, inputs]; given shape {tuple(weight.shape)}")
    return weight.detach().to("cpu", torch.float32).contiguous().numpy()
