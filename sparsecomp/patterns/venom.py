"""VENOM's two levels: a panel of rows chooses K of every M columns, and each of its rows keeps N of these K.

The form is that of Castro et al., "VENOM: A Vectorized N:M Format for Unleashing the Power of Sparse Tensor Cores", SC
2023, arXiv:2310.02065 (section 3): with N:K of 2:4 the chosen columns of a panel, side by side, are a 2:4 matrix, which
is what sparse tensor cores multiply. The paper writes V:N:M, since its K is always 4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.patterns import groups

_ENTRIES = 1 << 21
"""Entries of a score that are looked at together, so that float64 copies of large weights are not needed at once."""
_LARGEST = 1e290
"""Infinities are taken for this, so that sums and differences of them have an order."""


def venom_mask(score: Tensor, v: int, n: int, k: int, m: int) -> Tensor:
    """Mask of the entries to keep, the columns of a panel chosen one after the other.

    The column is chosen next that adds most to what the rows of the panel can keep, given the columns before it: a row
    gains by it only where it beats the least of the row's n best so far. What a set of columns lets the rows keep is
    submodular in the set, so that for scores that are not negative this reaches 1 - 1 / e of the best set at least
    (Nemhauser, Wolsey and Fisher, Mathematical Programming 14, 1978). Ties go to the first column.

    Args:
        score: `[O, I]`, without NaN.
        v: rows of a panel.
        n: entries that a row keeps of the chosen columns.
        k: columns that a panel chooses of every m.
        m: columns of a group; the last one of `length < m` has `ceil(k * length / m)` and `ceil(n * length / m)`.

    Returns:
        bool `[O, I]`.
    """
    rows, columns = score.shape
    whole = columns - columns % m
    masks = []
    for part in score.split(max(1, _ENTRIES // max(1, v * columns)) * v):
        part = functional.pad(part.double().clamp(-_LARGEST, _LARGEST), (0, 0, 0, -part.shape[0] % v))
        panels = part.unflatten(0, (part.shape[0] // v, v))
        sides = [_of_groups(panels[..., :whole], n, k, m)]
        if tail := columns - whole:
            few, chosen = groups.group_limit(n, m, tail), groups.group_limit(k, m, tail)
            sides.append(_of_groups(panels[..., whole:], few, chosen, tail))
        masks.append(torch.cat(sides, dim=2).flatten(0, 1))
    return torch.cat(masks)[:rows]


def _of_groups(panels: Tensor, n: int, k: int, m: int) -> Tensor:
    """Mask of `[P, v, G * m]`, whole groups only."""
    score = panels.unflatten(2, (panels.shape[2] // m, m))
    chosen = torch.zeros(score.shape[0], score.shape[2], m, dtype=torch.bool, device=score.device)
    best = score.new_zeros(*score.shape[:3], 0)
    for _ in range(k):
        gain = score if best.shape[3] < n else (score - best[..., -1:]).clamp_min(0)
        column = gain.sum(dim=1).masked_fill(chosen, -torch.inf).argmax(dim=2, keepdim=True)
        chosen.scatter_(2, column, True)
        taken = score.gather(3, column[:, None].expand(*score.shape[:3], 1))
        best = torch.cat([best, taken], dim=3).sort(dim=3, descending=True).values[..., :n]
    return groups.top_of_last(score.masked_fill(~chosen[:, None], -torch.inf), n).flatten(2)


def closed_entries(mask: Tensor, v: int) -> Tensor:
    """Entries of a mask `[O, I]` in columns that their panel did not choose: bool `[O, I]`."""
    return ~groups.spread(groups.union_rows(mask, v), v, 1, (mask.shape[0], mask.shape[1]))
