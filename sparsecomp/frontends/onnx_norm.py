"""A batch normalisation behind a convolution becomes part of its weight and its bias."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsecomp.frontends.onnx import Overlay
from sparsecomp.ir import ConvSite


def folds(overlay: Overlay, site: ConvSite) -> bool:
    """Whether everything that the normalisation of a site reads, and the bias before it, is constant."""
    values = (*(site.norm.values if site.norm is not None else ()), *((site.bias,) if site.bias is not None else ()))
    return all("value" in overlay.graph.operation(name).attrs for name in values)


def fold_norm(overlay: Overlay, site: ConvSite) -> tuple[Tensor, npt.NDArray[np.float32] | None]:
    """The weight of a convolution with its normalisation, and the bias that comes of it (None without one)."""
    norm = site.norm
    if norm is None:
        return site.weight, None

    def read(name: str | None, default: float) -> Tensor:
        if name is None:
            return torch.full((site.out_features,), default, dtype=torch.float64)
        value: Tensor = overlay.graph.operation(name).attrs["value"]
        return value.double()

    scale = read(norm.weight, 1.0) / torch.sqrt(read(norm.variance, 1.0) + norm.eps)
    bias = (read(site.bias, 0.0) - read(norm.mean, 0.0)) * scale + read(norm.bias, 0.0)
    weight = site.weight.double() * scale.reshape(-1, *[1] * (site.weight.ndim - 1))
    return weight.float(), bias.float().numpy()
