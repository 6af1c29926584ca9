"""The magnitude criterion: an entry matters as much as its absolute value (Han et al. 2015, arXiv:1506.02626)."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """Score every entry of a weight by its absolute value.

    Args:
        weight: any shape, floating point.

    Returns:
        The scores in the weight's shape, float32 (float64 for a float64 weight), without autograd history.
    """
    score = weight.detach().abs()
    return score if score.dtype == torch.float64 else score.to(torch.float32)
