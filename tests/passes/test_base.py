from __future__ import annotations

import pytest
import torch

from sparsecomp.ir import IRError, LinearSite, Operation, SparseGraph
from sparsecomp.passes import Pass, PassResult, run_passes


class Recording(Pass):
    name = "recording"

    def __init__(self, log: list[str], fail: str = "") -> None:
        self.log, self.fail = log, fail

    def _step(self, step: str) -> None:
        self.log.append(step)
        if self.fail == step:
            raise IRError(f"broken in {step}")

    def preconditions(self, graph: SparseGraph) -> None:
        self._step("pre")

    def run(self, graph: SparseGraph) -> PassResult:
        self._step("run")
        return PassResult(True, ("did it",))

    def postconditions(self, graph: SparseGraph) -> None:
        self._step("post")


def test_order_and_observer() -> None:
    log: list[str] = []

    def observer(step: Pass, graph: SparseGraph, result: PassResult | None) -> None:
        log.append(f"{step.name} {'before' if result is None else result.notes}")

    results = run_passes(SparseGraph(), [Recording(log)], observer)
    assert log == ["recording before", "pre", "run", "post", "recording ('did it',)"]
    assert results == [PassResult(True, ("did it",))]


@pytest.mark.parametrize("step", ["pre", "run", "post"])
def test_errors_name_the_pass(step: str) -> None:
    with pytest.raises(IRError, match=f"pass recording: broken in {step}"):
        run_passes(SparseGraph(), [Recording([], step)])


def test_graph_is_verified_after_each_pass() -> None:
    class Breaking(Pass):
        name = "breaking"

        def run(self, graph: SparseGraph) -> PassResult:
            weight = torch.ones(2, 2)
            graph.sites.append(LinearSite("s", weight, "w", 0, False, "x", (), 1, False, torch.float32))
            return PassResult(True)

    graph = SparseGraph()
    graph.add(Operation("x", "input"))
    with pytest.raises(IRError, match="pass breaking: site s: it absorbs no operation"):
        run_passes(graph, [Breaking()])
