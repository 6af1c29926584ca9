"""What a pass is, and how a list of them runs: conditions, body, conditions, then a check of the whole graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sparsecomp.ir import IRError, SparseGraph


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        changed: Whether it wrote anything to the graph.
        notes: Sentences for the log: what was found and why it went no further.
    """

    changed: bool
    notes: tuple[str, ...] = ()


class Pass(ABC):
    """A step over a `SparseGraph` that reads operations and writes sites."""

    name: str

    def preconditions(self, graph: SparseGraph) -> None:  # noqa: B027 (a pass without conditions is common)
        """Raise `IRError` when the graph is not in the state that the body relies on."""

    @abstractmethod
    def run(self, graph: SparseGraph) -> PassResult:
        """Do the work, in place."""

    def postconditions(self, graph: SparseGraph) -> None:  # noqa: B027 (as above)
        """Raise `IRError` when the body did not leave what it promises."""


Observer = Callable[[Pass, SparseGraph, PassResult | None], None]
"""Called before each pass (with None) and after it (with its result)."""


def run_passes(graph: SparseGraph, passes: Iterable[Pass], observer: Observer | None = None) -> list[PassResult]:
    """Run passes in order, in place.

    Args:
        graph: The graph to work on.
        passes: What to run.
        observer: Told about each pass before and after it, for debugging output.

    Returns:
        One result per pass.

    Raises:
        IRError: A condition of a pass does not hold, or the graph is broken after it; the message names the pass.
    """
    results = []
    for step in passes:
        if observer is not None:
            observer(step, graph, None)
        try:
            step.preconditions(graph)
            result = step.run(graph)
            step.postconditions(graph)
            graph.verify()
        except IRError as error:
            raise IRError(f"pass {step.name}: {error}") from error
        if observer is not None:
            observer(step, graph, result)
        results.append(result)
    return results
