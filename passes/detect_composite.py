"""Report the linears inside PyTorch's fused operations, which the graph shows as one call."""

from __future__ import annotations

import torch

from sparsecomp.ir import LinearSite, SparseGraph
from sparsecomp.passes.base import Pass, PassResult
from sparsecomp.passes.detect_linear import site_name, unique_name


class DetectComposite(Pass):
    """Add a declined site for every weight that a `composite` operation takes, so that no report leaves it out."""

    name = "detect_composite"

    def run(self, graph: SparseGraph) -> PassResult:
        """Append the declined sites."""
        notes = []
        for operation in graph:
            if operation.kind != "composite" or operation.attrs.get("expanded"):
                continue
            function = operation.attrs["function"]
            for weight_name in operation.attrs["weights"]:
                weight = graph.operation(weight_name)
                value = weight.attrs.get("value")
                if value is None:
                    value = torch.empty(weight.shape, device="meta")
                site = LinearSite(
                    name=unique_name(graph, site_name(operation, weight)),
                    weight=value,
                    weight_op=weight_name,
                    weight_index=int(weight.attrs.get("index", -1)),
                    transposed=False,
                    x=operation.inputs[0],
                    operations=(operation.name,),
                    tokens=0,
                    dynamic=operation.dynamic,
                    dtype=value.dtype,
                    declined=f"it is inside {function}, which in this form is kept as one operation",
                    composite=operation.name,
                )
                graph.sites.append(site)
                notes.append(str(site))
        graph.sites.sort(key=lambda site: graph.position(site.operations[0]))
        return PassResult(bool(notes), tuple(notes))
