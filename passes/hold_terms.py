"""Let what a convolution adds and scales with be computed once instead of in every call, where it is constant."""

from __future__ import annotations

from sparsecomp.ir import ConvSite, SparseGraph
from sparsecomp.passes.base import Pass, PassResult
from sparsecomp.passes.detect_linear import storage_reason, weight_changes


class HoldTerms(Pass):
    """Note for each convolution the values of its bias and normalisation, if all of them belong to the program.

    A loop over so few values costs a call more than it computes: of a ResNet-50 with 90 % zeros a twentieth of the time
    (docs/convolutions.md).
    """

    name = "hold_terms"

    def run(self, graph: SparseGraph) -> PassResult:
        """Set `held` of the sites."""
        notes, changed = [], False
        for site in graph.sites:
            if not isinstance(site, ConvSite) or site.declined is not None or not site.term_names:
                continue
            reason = _why_not(graph, site)
            if reason is None:
                values = [graph.operation(name).attrs for name in site.term_names]
                site.held = tuple((int(attrs["index"]), attrs["value"]) for attrs in values)
                changed = True
            notes.append(f"{site.name}: {'held' if reason is None else f'computed at each call: {reason}'}")
        return PassResult(changed, tuple(notes))


def _why_not(graph: SparseGraph, site: ConvSite) -> str | None:
    for name in site.term_names:
        operation = graph.operation(name)
        value = operation.attrs.get("value")
        if operation.kind != "constant" or value is None:
            return f"{name} is no constant of the program"
        reason = storage_reason(value) or weight_changes(graph, name)
        if reason is None and value.is_inference():
            reason = "it is an inference tensor, of which nobody can tell whether it was changed"
        if reason is not None:
            return f"{name}: {reason}"
    return None
