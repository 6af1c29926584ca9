"""Arithmetic on the groups of a matrix: unions over panels of rows, counts and selections per group of columns.

A matrix is cut into panels of consecutive rows and groups of consecutive columns. Sizes need not divide: the last panel
holds the rows that are left, the last group the columns that are left, and a group of `length < m` columns may keep
`ceil(n * length / m)` of them, the same share rounded up.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Comparing all pairs in a group beats sorting it as long as groups are small.
_PAIRWISE_UP_TO = 32


def as_matrix(tensor: Tensor, what: str = "weight") -> Tensor:
    """Return the tensor without its autograd history.

    Raises:
        ValueError: the tensor is not a matrix.
    """
    if tensor.dim() != 2:
        raise ValueError(
            f"the {what} has shape {tuple(tensor.shape)}; a pattern describes a matrix [outputs, inputs]: "
            f"reshape it to two dimensions first"
        )
    return tensor.detach()


def nonzero_mask(matrix: Tensor) -> Tensor:
    """Entries that count: all but zeros. A NaN counts; a negative zero, as `weight * mask` leaves it, does not."""
    return matrix != 0


def group_limit(n: int, m: int, length: int) -> int:
    """Entries that a group of `length <= m` columns may keep under n of every m."""
    return -(-n * length // m)


def least_n(count: int, m: int, length: int) -> int:
    """Least `n >= 1` under which a group of `length <= m` columns may keep `count` entries."""
    return max(1, (count - 1) * m // length + 1)


def keep_count(sparsity: float, total: int) -> int:
    """Units (entries or blocks) that are kept of `total` when a share of `sparsity` of them becomes zero."""
    return round((1.0 - sparsity) * total)


def shortest_share(kept: int, total: int) -> float:
    """Return the decimal below 1 with the fewest digits whose `keep_count` of `total` is `kept`."""
    exact = (total - kept) / total
    for digits in range(1, 17):
        share = round(exact, digits)
        if share >= 1.0:
            share = round(1.0 - 10.0**-digits, digits)
        if keep_count(share, total) == kept:
            return share
    return exact


def _pad(matrix: Tensor, rows: int, cols: int) -> Tensor:
    """Append zeros until the rows are a multiple of `rows` and the columns of `cols`."""
    missing_rows, missing_cols = -matrix.shape[0] % rows, -matrix.shape[1] % cols
    if not missing_rows and not missing_cols:
        return matrix
    return functional.pad(matrix, (0, missing_cols, 0, missing_rows))


def union_rows(mask: Tensor, v: int) -> Tensor:
    """Union of every `v` consecutive rows: bool `[O, I]` to bool `[ceil(O / v), I]`."""
    if v == 1:
        return mask
    panels = _pad(mask, v, 1).reshape(-(-mask.shape[0] // v), v, mask.shape[1])
    union = panels[:, 0].clone()
    for row in range(1, v):
        union |= panels[:, row]
    return union


def fold_columns(counts: Tensor, m: int) -> Tensor:
    """Sum of every `m` consecutive columns in the tensor's own type: `[R, I]` to `[R, ceil(I / m)]`."""
    if m == 1:
        return counts
    padded = _pad(counts, 1, m)
    total = padded[:, 0::m].clone()
    for column in range(1, m):
        total += padded[:, column::m]
    return total


def spread(mask: Tensor, rows: int, cols: int, shape: tuple[int, int]) -> Tensor:
    """Repeat every entry over `rows` rows and `cols` columns and cut the result to `shape`."""
    if cols > 1:
        mask = mask.repeat_interleave(cols, dim=1)[:, : shape[1]]
    if rows > 1:
        mask = mask.repeat_interleave(rows, dim=0)[: shape[0]]
    return mask.contiguous()


def occupied_slots(occupied: Tensor, rows: int, cols: int, shape: tuple[int, int]) -> int:
    """Entries of a matrix of `shape` that lie in the occupied ones of its `rows` x `cols` blocks (bool `[P, G]`)."""
    if not occupied.numel():
        return 0
    short_rows, short_cols = -shape[0] % rows, -shape[1] % cols
    blocks = int(torch.count_nonzero(occupied))
    bottom = int(torch.count_nonzero(occupied[-1]))
    right = int(torch.count_nonzero(occupied[:, -1]))
    corner = int(occupied[-1, -1])
    return (
        blocks * rows * cols - bottom * short_rows * cols - right * rows * short_cols + corner * short_rows * short_cols
    )


def prepare_score(score: Tensor) -> Tensor:
    """Return the score as float32, or as float64 where float32 cannot hold it.

    Raises:
        ValueError: the score holds NaN, which has no place in an order.
    """
    score = as_matrix(score, "score")
    if score.dtype != torch.float64:
        score = score.to(torch.float32 if score.dtype.is_floating_point or score.dtype == torch.bool else torch.float64)
    if bool(torch.isnan(score).any()):
        raise ValueError(
            "the score holds NaN, so its entries cannot be ranked: replace them (torch.nan_to_num) or score another way"
        )
    return score


def block_scores(score: Tensor, rows: int, cols: int) -> Tensor:
    """Sum of the score over every `rows` x `cols` block: `[O, I]` to `[ceil(O / rows), ceil(I / cols)]`."""
    if rows > 1:
        score = _pad(score, rows, 1).reshape(-(-score.shape[0] // rows), rows, score.shape[1]).sum(dim=1)
    if cols > 1:
        score = _pad(score, 1, cols).reshape(score.shape[0], -(-score.shape[1] // cols), cols).sum(dim=2)
    if bool(torch.isnan(score).any()):
        raise ValueError(
            "the score holds infinities of both signs in one group, so the group has no sum: clamp the score"
        )
    return score


def top_of_groups(score: Tensor, n: int, m: int) -> Tensor:
    """Mask of the `n` highest of every `m` consecutive columns of each row; the earlier column wins a tie."""
    whole = score.shape[1] - score.shape[1] % m
    tail = score.shape[1] - whole
    parts = [top_of_last(score[:, :whole].reshape(score.shape[0], whole // m, m), n).reshape(score.shape[0], whole)]
    if tail:
        parts.append(top_of_last(score[:, whole:], group_limit(n, m, tail)))
    return torch.cat(parts, dim=1)


def top_of_last(score: Tensor, n: int) -> Tensor:
    """Mask of the `n` highest entries along the last dimension; the earlier entry wins a tie."""
    length = score.shape[-1]
    if n >= length:
        return torch.ones_like(score, dtype=torch.bool)
    if length > _PAIRWISE_UP_TO:
        order = torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :n]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)
    columns = [column.contiguous() for column in score.unbind(-1)]
    ranks = [torch.zeros_like(column, dtype=torch.uint8) for column in columns]
    for late in range(1, length):
        for early in range(late):
            early_wins = columns[early] >= columns[late]
            ranks[late] += early_wins
            ranks[early] += early_wins.logical_not_()
    return torch.stack([rank < n for rank in ranks], dim=-1)


def top_of_all(score: Tensor, count: int) -> Tensor:
    """Mask of exactly `count` highest entries; among equal ones those that come first in row-major order."""
    if count >= score.numel():
        return torch.ones_like(score, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    flat = score.reshape(-1)
    threshold = torch.kthvalue(flat, flat.numel() - count + 1).values
    mask = flat > threshold
    ties = torch.nonzero(flat == threshold).squeeze(1)
    mask[ties[: count - int(torch.count_nonzero(mask))]] = True
    return mask.reshape(score.shape)
