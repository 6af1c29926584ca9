"""The RIA criterion: importance relative to row and column, times the norm of the input.

Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024.
"""

from __future__ import annotations

from torch import Tensor

from sparsecomp.pruning.statistics import Statistics

POWER = 0.5
"""Of the norm of the input, the value that the paper settles on."""


def ria(weight: Tensor, statistics: Statistics) -> Tensor:
    """Score entries by the square of `(|W_ij| / sum of row i + |W_ij| / sum of column j) * ||X_j||^a`, a = 1/2.

    Shares of the row and of the column keep a criterion from emptying whole channels, which dropping by size does. The
    square changes no ranking of single entries; summed over blocks and panels it keeps more quality than the plain
    score (MiniLM to 16:2:4: 0.377 against 0.350).

    Args:
        weight: `[O, I]`, floating point.
        statistics: of the inputs.

    Returns:
        The scores, `[O, I]`, float32 (float64 for a float64 weight).
    """
    size = weight.detach().abs()
    size = size if size.dtype.itemsize == 8 else size.float()
    tiny = 1e-30
    relative = size / size.sum(dim=1, keepdim=True).clamp_min(tiny) + size / size.sum(dim=0).clamp_min(tiny)
    norms = statistics.norms / statistics.norms.max().clamp_min(1e-300)
    return (relative * norms.pow(POWER).to(size.dtype)).square()
