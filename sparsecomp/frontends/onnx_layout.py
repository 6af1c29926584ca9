"""Where ONNX Runtime changes the layout of maps: beside its own convolutions, which want them in blocks of channels."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, prod

from sparsecomp.frontends.onnx import Overlay
from sparsecomp.ir import ConvSite
from sparsecomp.planner.layouts import TwoLabels

_POOLS = {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"}
_PLAIN = {"Add", "BatchNormalization", "Clip", "Concat", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Mul"}
_KEEPS = _POOLS | _PLAIN | {"Relu", "Sigmoid", "Sum", "Tanh"}
"""Operations that ONNX Runtime runs in either layout."""
_MOST = 1000  # operations that are looked at between two convolutions


def best_mixture(overlay: Overlay, gains: Mapping[str, float], us_per_value: float) -> set[str]:
    """Which convolutions should run our kernels, so that most time is gained in all.

    A value between one that does and one that does not costs a change of its layout.

    Args:
        overlay: of the graph.
        gains: microseconds that a convolution of ours gains, by name of the site; others stay dense.
        us_per_value: microseconds of a value in another layout.

    Returns:
        Names of sites.
    """
    labels = TwoLabels()
    for site in overlay.graph.sites:
        if isinstance(site, ConvSite):
            # Ours is the first label, and costs what would be gained where a convolution has the other.
            labels.price(site.name, *((0.0, max(gains[site.name], 0.0)) if site.name in gains else (inf, 0.0)))
    for first, second, values in _neighbours(overlay):
        labels.unlike(first, second, values * us_per_value)
    return labels.first() & gains.keys()


def _neighbours(overlay: Overlay) -> list[tuple[str, str, int]]:
    """Pairs of convolutions of which the second reads what the first gives, and how many values that is."""
    graph = overlay.graph
    sites = {site.anchor: site for site in graph.sites if isinstance(site, ConvSite)}
    found = []
    for site in sites.values():
        waiting, seen = [name for name in (site.x, site.residual) if name is not None], set[str]()
        while waiting and len(seen) < _MOST:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in sites:
                found.append((sites[name].name, site.name, prod(graph.operation(name).shape)))
            elif (nodes := overlay.nodes.get(name)) and nodes[-1].op_type in _KEEPS:
                waiting.extend(graph.operation(name).inputs)
    return found
