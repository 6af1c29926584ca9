"""Units that need no hardware: outputs of a linear that nothing reads, or that are the same for every input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sparsecomp.hls.network import Integers, Layer, Linear, Network, Requantise, Shape


def without_dead_units(network: Network) -> Network:
    """The same function with fewer units: bit for bit what the network computes.

    An output (or channel) of a linear whose weights are all zero is a constant, and goes into the bias of the linear
    that reads it, if the padding of that one does not differ from it. One that the next linear has only zeros for is
    not read. Units vanish with their weights, their requantisation and their share of every stream between the two.
    Where all units between two linears are dead, none is taken out.
    """
    layers = list(network.layers)
    changed = True
    while changed:
        changed = False
        shapes = replace(network, layers=tuple(layers)).shapes()
        places = [at for at, layer in enumerate(layers) if isinstance(layer, Linear)]
        for first, second in pairwise(places):
            made = _joined(layers[first], layers[first + 1 : second], layers[second], shapes[first + 1 : second + 1])
            if made is not None:
                layers[first], layers[second] = made
                changed = True
                break
    return replace(network, layers=tuple(layers))


def _joined(
    first: Layer, between: Sequence[Layer], second: Layer, shapes: Sequence[Shape]
) -> tuple[Linear, Linear] | None:
    """Two linears without the units between them that are dead; None if there are none.

    Args:
        first: gives the units.
        between: layers of every unit by itself.
        second: reads them.
        shapes: after the first, and after those between.
    """
    if not isinstance(first, Linear) or not isinstance(second, Linear):
        return None
    columns = _columns(second, shapes[-1])
    unread = np.array([not np.any(second.weight[:, own]) for own in columns])
    constant = ~np.any(first.weight, axis=1)
    bias = second.bias
    if np.any(constant & ~unread):
        values = np.broadcast_to(first.requantise.run(first.bias), (shapes[0].vectors, len(first.weight)))
        for layer, shape in zip(between, shapes, strict=False):
            values = layer.run(values, shape)
        read = second.gather(values, shapes[-1])
        for unit in np.flatnonzero(constant & ~unread):
            terms = read[:, columns[unit]] @ second.weight[:, columns[unit]].T
            constant[unit] = np.all(terms == terms[0])  # padding may differ from it
            bias = bias + terms[0] * constant[unit]
    keep = ~(constant | unread)
    if keep.all() or not keep.any():
        return None
    kept = np.sort(np.concatenate([columns[unit] for unit in np.flatnonzero(keep)]))
    order = second.order
    if order is not None:
        order = np.searchsorted(kept, order[np.isin(order, kept)])
    made = replace(second, weight=second.weight[:, kept], bias=bias, order=order)
    return replace(first, weight=first.weight[keep], bias=first.bias[keep], requantise=_rows(first, keep)), made


def _columns(layer: Linear, shape: Shape) -> list[Integers]:
    """Inputs of a linear that every unit of its stream becomes."""
    width = layer.weight.shape[1]
    if layer.order is not None:
        return list(layer.order.reshape(shape.vectors, shape.width).T)
    return list(np.arange(width).reshape(shape.width, width // shape.width))


def _rows(layer: Linear, keep: npt.NDArray[np.bool_]) -> Requantise:
    rule = layer.requantise
    factors, shifts = (values[keep] if len(values) > 1 else values for values in (rule.factors, rule.shifts))
    return replace(rule, factors=factors, shifts=shifts)
