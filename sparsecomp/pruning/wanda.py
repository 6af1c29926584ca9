"""The Wanda criterion: magnitude times the norm of the input (Sun et al. 2023, arXiv:2306.11695, equation 1).

The paper takes the Euclidean norms of the inputs as they are. Here each row is divided by the square root of its length
before; where entries are ranked one by one, by its length, and the norm is that of `Statistics.tail_norms`.
"""

from __future__ import annotations

from torch import Tensor

from sparsecomp.pruning.statistics import Statistics


def wanda(weight: Tensor, statistics: Statistics, *, alone: bool = False) -> Tensor:
    """Score every entry by the squared error that dropping it alone makes in its output: `(|W_ij| * ||X_j||)^2`.

    The square ranks entries as the paper's score does, and its sum over a block or a panel's column is the error of
    dropping all of that, as long as the inputs do not correlate.

    Args:
        weight: `[O, I]`, floating point.
        statistics: of the inputs.
        alone: whether entries are ranked one by one, and no sums of scores.

    Returns:
        The scores, `[O, I]`, float32 (float64 for a float64 weight).
    """
    weight = weight.detach()
    weight = weight if weight.dtype.itemsize == 8 else weight.float()
    # Normed to a largest input of 1, so that squares stay in range whatever the number of rows.
    norms = statistics.tail_norms if alone else statistics.norms
    norms = norms / norms.max().clamp_min(1e-300)
    return (weight * norms.to(weight.dtype)).square()
