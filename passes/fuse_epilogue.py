"""Let a site take in what follows it, when nothing else could see the difference.

A linear takes a bias, an activation and a residual; a convolution a batch normalisation, an activation and a residual.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sparsecomp.ir import ACTIVATIONS, ConvSite, IRError, LinearSite, Norm, Operation, Site, SparseGraph
from sparsecomp.passes.base import Pass, PassResult

PRODUCTS = ("linear", "addmm", "matmul", "conv")
_EPILOGUE = frozenset({"add", "batch_norm", "identity", *ACTIVATIONS})


class FuseEpilogue(Pass):
    """Extend every site along its value while that has one user which the kernels can apply.

    The value of a linear is `activation(x @ W.T + bias) + residual`, so the order is fixed: bias, activation, residual.
    That of a convolution is `activation(norm(conv(x) + bias)) + residual`, where the residual may also come before the
    activation. A site computes at the place of its last operation; it therefore stops before an operation when
    something between could have changed what it reads. Later sites go first: of two products that are added, the later
    one takes the other as its residual.
    """

    name = "fuse_epilogue"

    def preconditions(self, graph: SparseGraph) -> None:
        """Sites are found and not yet extended."""
        for site in graph.sites:
            if site.declined is None and graph.operation(site.anchor).kind not in PRODUCTS:
                raise IRError(
                    f"site {site.name} already has an epilogue; run this pass once, after the sites are found"
                )

    def run(self, graph: SparseGraph) -> PassResult:
        """Extend the sites, in place."""
        taken = {name for site in graph.sites if site.declined is None for name in site.operations}
        notes, changed = [], False
        for site in sorted(graph.sites, key=lambda site: -graph.position(site.anchor)):
            if site.declined is None:
                before = len(site.operations)
                stop = self._extend(graph, site, taken)
                changed |= len(site.operations) > before
                notes.append(f"{site.name}: takes {', '.join(site.operations[1:]) or 'nothing'}; stops because {stop}")
        return PassResult(changed, tuple(reversed(notes)))

    def _extend(self, graph: SparseGraph, site: Site, taken: set[str]) -> str:
        value, pending = site.anchor, []
        while True:
            users = graph.users(value)
            if len(users) != 1:
                return f"{value} has {len(users)} users"
            user = users[0]
            stop = _why_stop(graph, site, value, user, taken)
            if stop is None and user.kind == "identity":
                # worth taking only if something that is computed follows
                pending.append(user.name)
                value = user.name
                continue
            stop = stop or _absorb(graph, site, value, user)
            if stop is not None:
                return stop
            site.operations = (*site.operations, *pending, user.name)
            taken.update((*pending, user.name))
            value, pending = user.name, []


def _why_stop(graph: SparseGraph, site: Site, value: str, user: Operation, taken: set[str]) -> str | None:
    """What forbids taking a user, whatever room the site has."""
    if user.kind not in _EPILOGUE:
        return f"{user.name} ({user.kind}) is not part of an epilogue"
    if user.kind != "add" and user.inputs[0] != value:
        return f"{user.name} reads {value} in another role"
    if user.name in taken:
        return f"{user.name} belongs to another site"
    if user.inputs.count(value) != 1:
        return f"{user.name} reads {value} twice"
    if user.mutates not in ((), (value,)):
        return f"{user.name} changes {', '.join(user.mutates)} in place"
    if user.dtype != site.dtype:
        return f"{user.name} gives {user.dtype}, the product {site.dtype}"
    if user.sizes != graph.operation(site.anchor).sizes:
        return f"{user.name} has another shape"
    if not user.contiguous:
        return f"{user.name} is not laid out row by row"
    return _hazard(graph, site, user)


def _hazard(graph: SparseGraph, site: Site, last: Operation) -> str | None:
    operands = [name for name in (site.x, site.bias, site.residual) if name is not None]
    if isinstance(site, ConvSite) and site.norm is not None:
        operands += site.norm.values
    return hazard(graph, operands, (*site.operations, last.name))


def hazard(graph: SparseGraph, operands: Iterable[str], operations: Sequence[str]) -> str | None:
    """What changes an operand between the first and the last of operations that shall run at the place of the last.

    Args:
        graph: the graph.
        operands: values that they read.
        operations: in graph order; what they change themselves does not count.
    """
    read = {root for name in operands for root in graph.roots(name)}
    outside = any(graph.operation(root).kind in ("input", "constant") for root in read)
    last = graph.operation(operations[-1])
    for writer in graph.writers(after=operations[0], before=last.name):
        if writer.name in operations:
            continue
        changed = {root for name in writer.mutates for root in graph.roots(name)}
        # two values from outside may share memory without the graph showing it
        if changed & read or (outside and any(graph.operation(root).kind in ("input", "constant") for root in changed)):
            return f"{writer.name} may change an operand before {last.name}"
    return None


def _absorb(graph: SparseGraph, site: Site, value: str, user: Operation) -> str | None:
    """Take a user into the site if the form of a site has room for it; otherwise say why not."""
    if user.kind == "batch_norm":
        return _absorb_norm(graph, site, user)
    if user.kind in ACTIVATIONS:
        if site.activation != "none":
            return f"{user.name} ({user.kind}) comes after an activation"
        if site.residual is not None:
            if isinstance(site, LinearSite):
                return f"{user.name} ({user.kind}) comes after a residual"
            site.residual_first = True
        site.activation = user.kind
        return None
    if "scalar" in user.attrs:
        return f"{user.name} adds a number"
    other = graph.operation(next(name for name in user.inputs[:2] if name != value))
    if other.dtype != site.dtype:
        return f"{user.name} adds {other.dtype} to {site.dtype}"
    free = (site.bias, site.residual, site.activation) == (None, None, "none")
    if isinstance(site, LinearSite) and free and other.sizes == (site.out_features,):
        site.bias = other.name
        return None
    if other.sizes == user.sizes and site.residual is None:
        site.residual = other.name
        return None
    return f"{user.name} adds a value of another shape or a second one"


def _absorb_norm(graph: SparseGraph, site: Site, user: Operation) -> str | None:
    if isinstance(site, LinearSite):
        return f"{user.name} normalises a linear"
    if site.norm is not None or site.activation != "none" or site.residual is not None:
        return f"{user.name} comes after another normalisation, an activation or a residual"
    mean, variance, *affine = user.inputs[1:]
    for name in (mean, variance, *affine):
        if graph.operation(name).sizes != (site.out_features,):
            return f"{user.name} reads {name} of another shape than [{site.out_features}]"
    has_weight, has_bias = user.attrs["affine"]
    weight = affine[0] if has_weight else None
    bias = affine[int(has_weight)] if has_bias else None
    site.norm = Norm(mean, variance, weight, bias, user.attrs["eps"])
    return None
