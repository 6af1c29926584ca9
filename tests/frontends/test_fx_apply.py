"""What `apply` writes into a graph, and that it checks everything before it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fx_cases import Captured, capture, ensure_op
from torch import Tensor, nn

from sparsecomp.frontends.fx import Replacement, apply, build
from sparsecomp.ir import LinearSite

TOKENS = torch.arange(6 * 8, dtype=torch.float32).reshape(2, 3, 8).sin()


@pytest.fixture(autouse=True)
def _op() -> Iterator[None]:
    library = ensure_op()
    yield
    if library is not None:
        library._destroy()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.gelu(self.up(x), approximate="tanh")))


def captured_only(model: nn.Module) -> tuple[torch.fx.GraphModule, list[Any]]:
    torch._dynamo.reset()
    seen: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append((gm, inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(TOKENS)
    return seen[0]


def test_apply_is_all_or_nothing() -> None:
    gm, inputs = captured_only(Residual().eval())
    before = gm.code
    clean = Captured(gm, inputs)
    bad = Replacement(LinearSite(**{**vars(clean.sites[1]), "operations": ("gone",)}), 1)
    with pytest.raises(ValueError, match="needs gone"):
        apply(gm, [Replacement(clean.sites[0], 0), bad])
    with pytest.raises(ValueError, match="which another replacement takes"):
        apply(gm, [Replacement(clean.sites[0], 0), Replacement(clean.sites[0], 1)])
    clean.sites[1].declined = "a reason"
    with pytest.raises(ValueError, match="was declined: a reason"):
        apply(gm, [Replacement(clean.sites[1], 0)])
    apply(gm, [])
    assert gm.code == before


def test_apply_some_and_the_call_it_writes() -> None:
    gm, inputs = captured_only(Residual().eval())
    captured = Captured(gm, inputs)
    apply(gm, [Replacement(captured.sites[1], 7)])
    (call,) = [node for node in gm.graph.nodes if node.target is torch.ops.sparsecomp.linear.default]
    x, bias, residual, handle, out_features, activation = call.args
    assert (x.name, bias.name, residual.name) == tuple(
        getattr(captured.sites[1], field) for field in ("x", "bias", "residual")
    )
    assert (handle, out_features, activation) == (7, 8, "none")
    assert [node.name for node in gm.graph.nodes if node.op == "placeholder"][captured.sites[1].weight_index]


def test_build_checks_the_number_of_inputs() -> None:
    gm, inputs = captured_only(Residual().eval())
    with pytest.raises(ValueError, match=f"{len(inputs)} inputs but 0 values"):
        build(gm, [])


def test_absorbed_nodes_are_gone() -> None:
    (captured,), _ = capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Dropout(0.5)).eval(), TOKENS)
    calls = [node for node in captured.gm.graph.nodes if node.op == "call_function"]
    assert [getattr(node.target, "__name__", "") for node in calls] == ["reference", "dropout"]
    assert calls[0].meta["example_value"].shape == (2, 3, 8)
