"""DSnoT: exchange kept for dropped entries of a mask, without training, to lower the expected output error.

Zhang et al. 2023, arXiv:2310.08915 ("Dynamic Sparse No Training"). An output loses on average the sum of the dropped
weights times the means of their inputs. Entries are taken back that lower it most, by the variance of their inputs, and
in exchange those are dropped that matter least to Wanda's score and do not raise it again.

The paper swaps single entries; here a swap may be of whole units (a column of a panel, a block), whose rows add up
their squared errors, which for one row is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecomp.patterns import Pattern, groups
from sparsecomp.patterns.taps import by_channel, by_tap
from sparsecomp.patterns.venom import closed_entries
from sparsecomp.pruning.statistics import Statistics
from sparsecomp.pruning.wanda import wanda

CYCLES = 50
"""Most swaps of a row or panel, as in the paper."""


def dsnot(weight: Tensor, mask: Tensor, pattern: Pattern, statistics: Statistics) -> Tensor:
    """Refine a mask; each row or panel keeps as many entries as before, and so does each group of N:M.

    The columns that a panel of V:N:K:M chose stay the same; its rows exchange entries among them.

    Args:
        weight: `[O, I]`, the dense weight.
        mask: bool `[O, I]`, satisfies the pattern.
        pattern: of the mask.
        statistics: of the inputs.

    Returns:
        The new mask, bool `[O, I]`.
    """
    if pattern.kind == "dense":
        return mask
    if pattern.kind == "taps":
        return _exchange_taps(weight, mask, pattern, statistics)
    span = pattern.m if pattern.kind in ("nm", "vnm", "venom") else None
    closed = closed_entries(mask, pattern.v) if pattern.kind == "venom" else None
    return _exchange(weight, mask, (pattern.shared_rows, pattern.cols), span, statistics, closed)


def _exchange_taps(weight: Tensor, mask: Tensor, pattern: Pattern, statistics: Statistics) -> Tensor:
    """Sorted by tap, a tap is a block of columns."""
    taps, columns = pattern.m, weight.shape[1]
    sums, squares = (by_tap(value[None], taps)[0] for value in (statistics.sums, statistics.squares))
    ordered = Statistics(statistics.rows, sums, squares)
    shape = (pattern.v, sums.shape[0] // taps)
    return by_channel(_exchange(by_tap(weight, taps), by_tap(mask, taps), shape, None, ordered), taps, columns)


def _exchange(
    weight: Tensor,
    mask: Tensor,
    unit: tuple[int, int],
    span: int | None,
    statistics: Statistics,
    closed: Tensor | None = None,
) -> Tensor:
    """Exchange units of so many rows and columns, within groups of `span` units of a panel, or all of them.

    closed: bool, the shape of the units; units that are not taken back.
    """
    rows, cols = unit
    weight = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    saliency = groups.block_scores(wanda(weight, statistics), rows, cols)
    lost = _per_unit(weight * statistics.means.to(weight.dtype), rows, cols)
    spread = groups.block_scores(statistics.variances.to(weight.dtype).unsqueeze(0), 1, cols).clamp_min(1e-12)
    keep = groups.union_rows(mask, rows)[:, ::cols].clone()
    group = torch.arange(keep.shape[1], device=keep.device) // (span or keep.shape[1])
    error = (lost * ~keep.unsqueeze(1)).sum(dim=2)
    closed = torch.zeros_like(keep) if closed is None else closed
    active = torch.arange(keep.shape[0], device=keep.device)
    for _ in range(CYCLES):
        if not len(active):
            break
        active = active[_swap(active, keep, closed, error, lost, saliency, spread, group)]
    return groups.spread(keep, rows, cols, (weight.shape[0], weight.shape[1]))


def _per_unit(values: Tensor, rows: int, cols: int) -> Tensor:
    """Sum over the columns of every unit: `[O, I]` to `[panels, rows, units]`."""
    values = groups.block_scores(values, 1, cols)
    missing = -values.shape[0] % rows
    values = torch.nn.functional.pad(values, (0, 0, 0, missing))
    return values.reshape(-1, rows, values.shape[1])


def _swap(
    active: Tensor,
    keep: Tensor,
    closed: Tensor,
    error: Tensor,
    lost: Tensor,
    saliency: Tensor,
    spread: Tensor,
    group: Tensor,
) -> Tensor:
    """One swap in each of the active panels, in place; returns which of them swapped."""
    panel = torch.arange(len(active), device=active.device)
    kept, before, parts = keep[active], error[active], lost[active]
    power = parts.square().sum(dim=1)
    # How much taking a unit back lowers the squared error: |e|^2 - |e - u|^2.
    gain = (2 * torch.einsum("pvg,pv->pg", parts, before) - power).masked_fill(closed[active], 0)
    back = (gain / spread).masked_fill(kept | (gain <= 0), -torch.inf).argmax(dim=1)
    found = ~kept[panel, back] & (gain[panel, back] > 0)
    between = before - parts[panel, :, back]
    # How much dropping a unit lowers it: |e|^2 - |e + u|^2; only units of the same group keep the pattern.
    drop_gain = -2 * torch.einsum("pvg,pv->pg", parts, between) - power
    allowed = kept & (group == group[back].unsqueeze(1)) & (drop_gain > 0)
    out = saliency[active].masked_fill(~allowed, torch.inf).argmin(dim=1)
    found &= allowed[panel, out]
    rows, back, out = active[found], back[found], out[found]
    keep[rows, back] = True
    keep[rows, out] = False
    error[rows] = between[found] + lost[rows, :, out]
    return found
