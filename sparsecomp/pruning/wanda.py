"""The Wanda criterion: magnitude times the norm of the input (Sun et al. 2023, arXiv:2306.11695, equation 1).

The paper takes the norms of the inputs as they are; the collected statistics divide each row by the square root of its
length before.
"""

from __future__ import annotations

from torch import Tensor

from sparsecomp.pruning.statistics import Statistics


def wanda(weight: Tensor, statistics: Statistics) -> Tensor:
    """Score every entry by the squared error that dropping it alone makes in its output: `(|W_ij| * ||X_j||)^2`.

    The square ranks entries as the paper's score does, and its sum over a block or a panel's column is the error of
    dropping all of that, as long as the inputs do not correlate.

    Args:
        weight: `[O, I]`, floating point.
        statistics: of the inputs.

    Returns:
        The scores, `[O, I]`, float32 (float64 for a float64 weight).
    """
    weight = weight.detach()
    weight = weight if weight.dtype.itemsize == 8 else weight.float()
    # Normed to a largest input of 1, so that squares stay in range whatever the number of rows.
    norms = statistics.norms / statistics.norms.max().clamp_min(1e-300)
    return (weight * norms.to(weight.dtype)).square()
