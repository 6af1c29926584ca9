"""Captures what Dynamo hands a backend, and runs a rewritten graph with a reference in the place of the sparse op."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsecomp.frontends.fx import Replacement, apply, build
from sparsecomp.ir import LinearSite, SparseGraph
from sparsecomp.passes import default_passes, run_passes

SCHEMA = "linear(Tensor x, Tensor? bias, Tensor? residual, int site, int out_features, str activation) -> Tensor"
ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda value: value,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda value: F.gelu(value, approximate="tanh"),
    "silu": F.silu,
}


def ensure_op() -> torch.library.Library | None:
    """Make `torch.ops.sparsecomp.linear` exist; the library to keep alive when the package does not define it."""
    if importlib.util.find_spec("sparsecomp.runtime.site") is not None:
        importlib.import_module("sparsecomp.runtime.site")
    if hasattr(torch.ops.sparsecomp, "linear"):
        return None
    library = torch.library.Library("sparsecomp", "FRAGMENT")
    library.define(SCHEMA)
    return library


class Captured:
    """One graph that a compiled function was split into, and its overlay after the default passes."""

    def __init__(self, gm: fx.GraphModule, inputs: list[Any]) -> None:
        self.gm = gm
        self.graph: SparseGraph = build(gm, inputs)
        self.results = run_passes(self.graph, default_passes())

    @property
    def sites(self) -> list[LinearSite]:
        return self.graph.sites

    @property
    def accepted(self) -> list[LinearSite]:
        return [site for site in self.sites if site.declined is None]

    def kinds(self, site: LinearSite) -> list[str]:
        return [self.graph.operation(name).kind for name in site.operations]


def capture(function: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> tuple[list[Captured], Any]:
    """Compile and call a function under no_grad; every graph, and the result of the graphs with all sites replaced."""
    torch._dynamo.reset()
    graphs: list[Captured] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured = Captured(gm, inputs)
        graphs.append(captured)
        replace(gm, captured.accepted)
        return gm.forward

    with torch.no_grad():
        result = torch.compile(function, backend=backend, dynamic=dynamic)(*args)
    return graphs, result


def replace(gm: fx.GraphModule, sites: list[LinearSite]) -> None:
    """Apply sites to a graph, then put a reference in the place of the op, so that the graph runs by itself."""
    apply(gm, [Replacement(site, handle) for handle, site in enumerate(sites)])

    def reference(
        x: Tensor, bias: Tensor | None, residual: Tensor | None, handle: int, out_features: int, activation: str
    ) -> Tensor:
        site = sites[handle]
        weight = site.weight.t() if site.transposed else site.weight
        assert weight.shape[0] == out_features
        value = ACTIVATE[activation](F.linear(x, weight, bias))
        return value if residual is None else value + residual

    for node in gm.graph.nodes:
        if node.target is torch.ops.sparsecomp.linear.default:
            node.target = reference
    gm.recompile()
