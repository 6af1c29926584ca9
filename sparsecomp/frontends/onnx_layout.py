"""Where ONNX Runtime changes the layout of maps: beside its own convolutions, which want them in blocks of channels."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, prod

import networkx as nx

from sparsecomp.frontends.onnx import Overlay
from sparsecomp.ir import ConvSite

_POOLS = {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"}
_PLAIN = {"Add", "BatchNormalization", "Clip", "Concat", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Mul"}
_KEEPS = _POOLS | _PLAIN | {"Relu", "Sigmoid", "Sum", "Tanh"}
"""Operations that ONNX Runtime runs in either layout."""
_MOST = 1000  # operations that are looked at between two convolutions


def best_mixture(overlay: Overlay, gains: Mapping[str, float], us_per_value: float) -> set[str]:
    """Which convolutions should run our kernels, so that most time is gained in all.

    A value between one that does and one that does not costs a change of its layout. Two labels, and a price for
    neighbours of which each has another: the best is a minimum cut (Greig, Porteous and Seheult 1989, section 2).

    Args:
        overlay: of the graph.
        gains: microseconds that a convolution of ours gains, by name of the site; others stay dense.
        us_per_value: microseconds of a value in another layout.

    Returns:
        Names of sites.
    """
    cut = nx.DiGraph()
    for site in overlay.graph.sites:
        if isinstance(site, ConvSite):
            if site.name in gains:
                cut.add_edge("sparse", site.name, capacity=max(gains[site.name], 0.0))
            else:
                cut.add_edge(site.name, "dense", capacity=inf)
    if not {"sparse", "dense"} <= set(cut):
        return set(gains)
    for first, second, values in _neighbours(overlay):
        for edge in ((first, second), (second, first)):
            known = cut.get_edge_data(*edge, {"capacity": 0.0})["capacity"]
            cut.add_edge(*edge, capacity=known + values * us_per_value)
    _, (ours, _) = nx.minimum_cut(cut, "sparse", "dense")
    return {name for name in gains if name in ours}


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
