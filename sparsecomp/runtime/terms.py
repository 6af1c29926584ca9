"""What a convolution scales its sums with and adds to them: its bias and the normalisation behind it, in one vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparsecomp.ir import Norm


def fold_terms(norm: Norm | None, bias: str | None, value: Callable[[str], Any]) -> Any:
    """The shifts and the scales, `[2 * O]` in float32.

    Args:
        norm: names what the normalisation reads; None if there is none.
        bias: names the bias `[O]`, or None.
        value: gives the tensor of a name, or the `fx.Proxy` of one, for which the operations are put into its graph.

    Raises:
        ValueError: there is neither.
    """
    if norm is None:
        if bias is None:
            raise ValueError("there are no terms of a convolution without a bias and a normalisation")
        shift = value(bias).float()
        return torch.cat([shift, torch.ones_like(shift)])
    mean, variance = (value(name).float() for name in (norm.mean, norm.variance))
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * value(norm.weight)
    if bias is not None:
        mean = mean - value(bias)
    shift = torch.neg(mean * scale)
    if norm.bias is not None:
        shift = shift + value(norm.bias)
    return torch.cat([shift, scale])
