"""Kernel patterns: the rows of a panel keep the same taps in the kernels of all input channels.

The matrix of a convolution has the taps of one input channel side by side, so tap t of T is every column c with
c mod T = t. With the columns sorted by tap instead, a tap is a block of as many columns as there are channels. Where
columns do not make whole kernels, the last channel lacks the last taps.

Networks whose groups of kernels share the positions that they keep are those of SparseByteNN (Xu et al. 2023,
arXiv:2310.19509) and, with patterns for single kernels, of PatDNN (Niu et al. 2020, arXiv:2001.00138).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.patterns import groups


def by_tap(matrix: Tensor, taps: int) -> Tensor:
    """Columns sorted by tap: `[O, I]` to `[O, taps * channels]`, where zeros fill up the last channel."""
    channels = -(-matrix.shape[1] // taps)
    padded = functional.pad(matrix, (0, channels * taps - matrix.shape[1]))
    return padded.reshape(matrix.shape[0], channels, taps).transpose(1, 2).flatten(1)


def by_channel(matrix: Tensor, taps: int, columns: int) -> Tensor:
    """The way back from `by_tap`, cut to `columns`."""
    channels = matrix.shape[1] // taps
    return matrix.reshape(matrix.shape[0], taps, channels).transpose(1, 2).flatten(1)[:, :columns]


def taps_mask(score: Tensor, v: int, n: int, taps: int) -> Tensor:
    """Mask `[O, I]` of the `n` taps with the highest sums in the `v` rows of a panel; the earlier tap wins a tie."""
    if not score.numel():
        return torch.ones_like(score, dtype=torch.bool)
    ordered = by_tap(score, taps)
    channels = ordered.shape[1] // taps
    chosen = groups.top_of_groups(groups.block_scores(ordered, v, channels), n, taps)
    spread = groups.spread(chosen, v, channels, (ordered.shape[0], ordered.shape[1]))
    return by_channel(spread, taps, score.shape[1]).contiguous()


def used_taps(mask: Tensor, v: int, taps: int) -> Tensor:
    """Taps with an entry anywhere in a panel of `v` rows: bool `[O, I]` to their numbers, `[ceil(O / v)]`."""
    used = by_tap(mask, taps).unflatten(1, (taps, -(-mask.shape[1] // taps))).any(dim=2)
    return groups.union_rows(used, v).sum(dim=1)


def slots(shape: tuple[int, int], n: int, taps: int) -> int:
    """Entries that a weight of `shape` may keep at most."""
    whole, tail = divmod(shape[1], taps)
    return shape[0] * (whole * n + min(n, tail))
