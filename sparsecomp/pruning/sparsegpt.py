"""SparseGPT: prune column by column, and let the columns that follow make up for it.

Frantar and Alistarh 2023, arXiv:2301.00774 (algorithm 1), which makes the optimal brain surgeon's step affordable for
all rows of a weight at once. With `U` the upper Cholesky factor of the inverse of `H = X^T X + damping`, dropping `w_j`
costs `w_j^2 / U_jj^2`, and the columns k > j of the row take `-w_j / U_jj * U_jk`.

What is pruned late has few columns left to make up for it, so the columns are not taken as they stand but those first
that cost most to drop. The same authors' code for quantisation sorts columns by the size of their inputs (`--act-order`
of github.com/IST-DASLab/gptq); here slices of columns that are chosen together move as one, by their summed costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecomp.patterns import Pattern, groups
from sparsecomp.pruning.statistics import Statistics

DAMPING = 0.01
"""Share of the mean of the Gram matrix's diagonal that is added to it."""

# Columns whose masks are chosen together where positions are free. What is chosen late in a slice goes by costs from
# before the updates inside of it, so single entries do better with few columns (MiniLM at 80 %: 0.608 with 16, 0.592
# with the paper's 128); blocks, of which few columns hold few, want the freedom of many (16x1: 0.672 with 32).
_CHOICE_ENTRIES = 16
_CHOICE_BLOCKS = 128
# Columns after which the update reaches those behind them.
_WINDOW = 128
_ATTEMPTS = 6


def sparsegpt(
    weight: Tensor, pattern: Pattern, statistics: Statistics, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Prune a weight and update what is kept.

    Masks are chosen while the update goes on, so that they see it: at every group of M columns for N:M, V:N:M and
    V:N:K:M, at every 16 columns for single entries, and at every 128 for blocks; taps are chosen before. Of these
    slices those that cost most are pruned first. What stands or falls together is ranked by the sum of its costs.

    Args:
        weight: `[O, I]`, floating point.
        pattern: what may be kept.
        statistics: with the Gram matrix of the inputs.
        mask: bool `[O, I]`, entries to keep; chosen by their costs if None.

    Returns:
        The mask, bool `[O, I]`, and the weight in its own type, zero where the mask is False.

    Raises:
        ValueError: the weight holds NaN or infinity, or the Gram matrix cannot be factorised.
    """
    assert statistics.gram is not None, "collected for this criterion"
    left = weight.detach().to(statistics.gram.dtype, copy=True)
    if not bool(torch.isfinite(left).all()):
        raise ValueError("the weight holds NaN or infinity")
    step = _choice_columns(pattern)
    order, factor = _inverse_factor(statistics.gram, left, step)
    back = order.argsort()
    if mask is None and pattern.kind == "taps":
        # A tap has columns all over the weight, so that taps cannot be chosen while the update goes on.
        mask = pattern.mask((left / factor.diagonal()[back]).square())
    chooser = _Chooser(pattern) if mask is None else None
    left = left[:, order]
    keep = torch.zeros_like(left, dtype=torch.bool) if mask is None else mask[:, order]
    width = -(-_WINDOW // step) * step
    for start in range(0, left.shape[1], width):
        end = min(start + width, left.shape[1])
        errors = _prune_window(left[:, start:end], keep[:, start:end], factor[start:end, start:end], chooser, step)
        left[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return keep[:, back], left[:, back].to(weight.dtype)


def _choice_columns(pattern: Pattern) -> int:
    """Columns whose masks are chosen together."""
    if pattern.kind in ("nm", "vnm", "venom"):
        return pattern.m
    if pattern.kind == "block":
        return -(-_CHOICE_BLOCKS // pattern.cols) * pattern.cols
    return _CHOICE_ENTRIES


def _prune_window(window: Tensor, keep: Tensor, factor: Tensor, chooser: _Chooser | None, step: int) -> Tensor:
    """Prune the columns of a window in place, fill in the mask and return the scaled errors `[O, width]`."""
    errors = torch.zeros_like(window)
    diagonal = factor.diagonal()
    for start in range(0, window.shape[1], step):
        end = min(start + step, window.shape[1])
        if chooser is not None:
            keep[:, start:end] = chooser.choose((window[:, start:end] / diagonal[start:end]).square())
        for column in range(start, end):
            error = window[:, column].masked_fill(keep[:, column], 0) / diagonal[column]
            window[:, column].masked_fill_(~keep[:, column], 0)
            window[:, column + 1 :].addr_(error, factor[column, column + 1 :], alpha=-1)
            errors[:, column] = error
    return errors


class _Chooser:
    """Chooses masks for one slice of columns after the other, such that together they satisfy the pattern."""

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self._kept = self._seen = 0

    def choose(self, cost: Tensor) -> Tensor:
        """Mask of the next columns from the cost `[O, columns]` of dropping each entry."""
        pattern = self._pattern
        if pattern.sparsity is None:
            return pattern.mask(cost)
        units = groups.block_scores(groups.prepare_score(cost), pattern.rows, pattern.cols)
        # Rounded over all columns so far: shares of slices, each rounded, would not add up to the share of the whole.
        self._seen += units.numel()
        count = groups.keep_count(pattern.sparsity, self._seen) - self._kept
        self._kept += count
        chosen = groups.top_of_all(units, count)
        return groups.spread(chosen, pattern.rows, pattern.cols, (cost.shape[0], cost.shape[1]))


def _inverse_factor(gram: Tensor, weight: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """The order of the columns, and the upper Cholesky factor of the inverse of the damped Gram matrix in that order.

    There is more damping where the Gram matrix is close to singular.
    """
    scale = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    hessian = gram / scale
    damping = DAMPING
    for _ in range(_ATTEMPTS):
        hessian.diagonal().copy_(gram.diagonal() / scale + damping)
        lower, info = torch.linalg.cholesky_ex(hessian)
        if not int(info):
            inverse = torch.cholesky_inverse(lower)
            order = _costly_first(weight, inverse.diagonal(), step)
            factor, info = torch.linalg.cholesky_ex(inverse[order][:, order], upper=True)
            if not int(info) and bool(torch.isfinite(factor).all()):
                return order, factor
        damping *= 10
    raise ValueError(
        "the Gram matrix of its inputs cannot be factorised, even with much damping: look for huge activations"
    )


def _costly_first(weight: Tensor, variances: Tensor, step: int) -> Tensor:
    """The columns, slices of `step` of them together: by falling cost of dropping all of a slice, a shorter one last.

    Against the columns as they stand this lowers the error of SmolLM2's outputs at 2:4 by 4 %, on text that the
    calibration did not see; single columns by their costs raise it where entries are free.
    """
    columns = weight.shape[1]
    whole = columns // step * step
    costs = weight.square().sum(dim=0) / variances
    slices = costs[:whole].reshape(-1, step).sum(dim=1).argsort(descending=True, stable=True)
    natural = torch.arange(columns, device=weight.device)
    return torch.cat([natural[:whole].reshape(-1, step)[slices].flatten(), natural[whole:]])
