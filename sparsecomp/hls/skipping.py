"""Which linears of a network leave out hidden units, and how many stay in a sample."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsecomp.hls.network import Layer, Linear, Lookup, Network, Skip


def with_skips(network: Network, skip: str, samples: npt.NDArray[Any]) -> Network:
    """The network with a queue before every linear of vectors that reads hidden units: of a linear or of a function.

    Args:
        network: that has no queue.
        skip: "relu" leaves out units that ReLU made zero, and changes no number; "threshold:P" the share P of units
            nearest to zero, by the values of the samples, as TEAL (Liu et al. 2024, arXiv:2408.14690) sets thresholds.
        samples: int8 `[calls, vectors, width]`; what stays of their units is what the cost is estimated on.

    Raises:
        ValueError: skip is neither, or no linear reads such units.
    """
    found = re.fullmatch(r"relu|threshold:(0?\.\d{1,9})", skip)
    if found is None:
        raise ValueError(
            f"skip must be 'relu' or 'threshold:P' with P between 0 and 1, such as threshold:0.9, given {skip!r}"
        )
    share = float(found[1]) if found[1] else None
    values = [np.asarray(call).astype(np.int64) for call in samples]
    layers: list[Layer] = []
    for layer, shape in zip(network.layers, network.shapes(), strict=False):
        zero = _zero(layers[-1], share is not None) if layers else None
        if isinstance(layer, Linear) and layer.patches is None and layer.order is None and zero is not None:
            read = np.concatenate(values)
            distance = np.abs(read - zero)
            most = 0 if share is None else max(0, int(np.quantile(distance, share)))
            layer = replace(layer, skip=Skip(zero, most, distance > most))
        layers.append(layer)
        values = [layer.run(call, shape) for call in values]
    if not any(isinstance(layer, Linear) and layer.skip is not None for layer in layers):
        units = "units after a ReLU (after another function, use threshold:P)" if share is None else "hidden units"
        raise ValueError(f"skip={skip!r}: no linear of vectors reads {units}")
    return replace(network, layers=tuple(layers))


def _zero(layer: Layer, any_function: bool) -> int | None:
    """The zero point of a layer of hidden units: of one that gives nothing below it, or of any linear or function."""
    if isinstance(layer, Linear):
        return layer.requantise.zero if any_function or layer.requantise.low == layer.requantise.zero else None
    if isinstance(layer, Lookup):
        return layer.zero if any_function or int(layer.table.min()) == layer.zero else None
    return None
