"""Find mixtures of experts: a linear whose output is ranked to pick experts, and the linears of those experts."""

from __future__ import annotations

from sparsecomp.blocks import MoeBlock
from sparsecomp.ir import LinearSite, SparseGraph
from sparsecomp.passes.base import Pass, PassResult

_BETWEEN = frozenset({"identity", "reshape", "softmax", "sigmoid", "add", "mul", "opaque"})
_MOST_STEPS = 8
_MOST_EXPERTS = 1024


class DetectMoe(Pass):
    """Add a block for every router: a linear with an output per expert that a `topk` or an `argmax` ranks.

    Shazeer et al., arXiv:1701.06538, section 2.1, with the top k of a softmax; Switch (arXiv:2101.03961) takes one. The
    experts are sites like any other: this names them, it changes none.
    """

    name = "detect_moe"

    def run(self, graph: SparseGraph) -> PassResult:
        """Append the blocks in graph order."""
        for site in graph.sites:
            if not isinstance(site, LinearSite):
                continue
            experts = graph.operation(site.operations[0]).shape[-1:]
            picked = _picked(graph, site) if experts and 1 < experts[0] <= _MOST_EXPERTS else None
            if picked is None:
                continue
            name = site.name.partition("#")[0].rpartition(".")[0]
            if name.rpartition(".")[2] in ("router", "gate"):
                # Switch has its classifier in a module of its own, beside the experts.
                name = name.rpartition(".")[0]
            prefix = f"{name}." if name else ""
            inside = tuple(other.name for other in graph.sites if other is not site and _is_below(other.name, prefix))
            # A classifier is ranked too; it has no experts beside it.
            if any(operation.module.startswith(f"{prefix}experts") for operation in graph):
                stacked = _stacked(graph, f"{prefix}experts", experts[0])
                graph.moes.append(MoeBlock(name or "moe", site.name, experts[0], picked, inside, stacked))
        return PassResult(bool(graph.moes), tuple(str(block) for block in graph.moes))


def _stacked(graph: SparseGraph, module: str, experts: int) -> tuple[str, ...]:
    """The weights of a module that hold one matrix for each expert."""
    constants = (operation for operation in graph if operation.kind == "constant" and len(operation.shape) == 3)
    paths = [str(operation.attrs.get("path", "")) for operation in constants if operation.shape[0] == experts]
    return tuple(path for path in paths if path.startswith(f"{module}."))


def _is_below(name: str, prefix: str) -> bool:
    return name.startswith(prefix) if prefix else "expert" in name


def _picked(graph: SparseGraph, site: LinearSite) -> int | None:
    """How many experts the router picks, None if the site is no router."""
    width = graph.operation(site.operations[0]).shape[-1]
    front, seen = [site.anchor], set()
    for _ in range(_MOST_STEPS):
        following = []
        for name in front:
            for user in graph.users(name):
                if user.kind == "topk":
                    return int(user.attrs["count"])
                if user.kind in _BETWEEN and user.shape[-1:] == (width,) and user.name not in seen:
                    seen.add(user.name)
                    following.append(user.name)
        front = following
    return None
