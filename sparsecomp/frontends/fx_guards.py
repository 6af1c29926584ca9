"""Make Dynamo compile anew for weights that a compiled graph is wrong for.

Dynamo takes parameters as graph inputs, so one compiled graph serves every module of a class: a dense model's graph
would run its pruned copy dense. A guard on a weight looks at what it holds, not at which tensor it is, so that layers
of a class that are compiled one by one still share their graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._guards import Guard

from sparsecomp.log import log


def guard_weight(gm: fx.GraphModule, index: int, holds: Callable[[Any], bool], text: str) -> None:
    """Let a compiled graph only be used while `holds(weight)`.

    Called while the backend runs, before Dynamo builds its guards. Outside of Dynamo nobody would ask the guard, and
    nothing is done.

    Args:
        gm: Dynamo's graph.
        index: of the placeholder that takes the weight.
        holds: asked at every call, with the weight of that call; must not raise.
        text: what is true while it holds, for `TORCH_LOGS=recompiles`.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    source = getattr(placeholders[index].meta.get("grapharg"), "source", None)
    if source is None:
        log.debug("input %d has no source in Dynamo: %r is not guarded", index, text)
        return

    def create(builder: GuardBuilder, guard: Guard) -> None:
        builder.get_guard_manager(guard).add_lambda_guard(holds, [text], guard.user_stack)

    install_guard(source.make_guard(create))
