"""Weights for the sparse tensor cores: columns chosen per panel of 16 rows, then 2 of each 4 (VENOM's form)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 16
STEP = 32


@dataclass(frozen=True)
class SparsePanels:
    """A weight ``[rows, columns]`` as ``kernels/panel_sparse.cu`` reads it.

    Attributes:
        values: ``[steps, 16, 16]`` float16 or bfloat16, two of each four columns.
        places: ``[steps, 8, 2]`` int32, the metadata of ``mma.sp.m16n8k32``: row ``g`` in the low half, ``g + 8`` in
            the high one.
        columns: ``[steps, 32]`` int32, -1 where a step is padded.
        starts: ``[panels + 1]`` int32, the first step of each panel.
    """

    values: Tensor
    places: Tensor
    columns: Tensor
    starts: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> SparsePanels:
        """Pack any weight: columns are put in order into groups of four, a group is closed before a row has three.

        The form is that of VENOM (Castro et al., SC 2023, section 4): columns selected per panel, 2:4 among them.

        Raises:
            ValueError: The weight is empty, or not a float16 or bfloat16 matrix.
        """
        if weight.ndim != 2 or not weight.numel() or weight.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"got {weight.dtype} of shape {tuple(weight.shape)}; pass a non-empty float16 or bfloat16 matrix"
            )
        rows, _ = weight.shape
        values, places, columns, starts = [], [], [], [0]
        for first in range(0, rows, PANEL):
            tile = weight.new_zeros(PANEL, weight.shape[1] + 1)  # the last column is the padding's
            part = weight[first : first + PANEL]
            tile[: len(part), :-1] = part
            slots = _slots(tile != 0)
            steps = len(slots) // STEP
            chosen = torch.tensor(slots, dtype=torch.int64).reshape(steps, STEP)
            fours = tile[:, chosen].permute(1, 0, 2).reshape(steps, PANEL, STEP // 4, 4)
            order = (fours == 0).to(torch.int8).argsort(dim=3, stable=True)[..., :2].sort(dim=3).values
            values.append(fours.gather(3, order).reshape(steps, PANEL, STEP // 2))
            bits = (order.reshape(steps, PANEL, 2, 8) << (2 * torch.arange(8))).sum(dim=3)
            places.append((bits[:, :8] | bits[:, 8:] << 16).to(torch.int32))
            columns.append(chosen.to(torch.int32))
            starts.append(starts[-1] + steps)
        return cls(torch.cat(values), torch.cat(places), torch.cat(columns), torch.tensor(starts, dtype=torch.int32))


def _slots(kept: Tensor) -> list[int]:
    slots: list[int] = []
    group = torch.zeros(len(kept), dtype=torch.int64)
    for column in kept.any(dim=0).nonzero().flatten().tolist():
        if len(slots) % 4 and int((group + kept[:, column]).max()) > 2:
            slots += [-1] * (-len(slots) % 4)
        if len(slots) % 4 == 0:
            group = torch.zeros_like(group)
        group = group + kept[:, column]
        slots.append(column)
    return slots + [-1] * (-len(slots) % STEP)
