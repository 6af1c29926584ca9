"""What criteria know of the inputs of a site: sums over the calibration rows, collected by hooks.

With the rows `X [R, I]` of all calls: the sum of squares and the sum of every input, and the Gram matrix `X^T X`, which
is half the Hessian of the squared output error with respect to a row of the weight.

Each row is divided by the square root of its length before it is summed. An output error grows with the length of the
row, so that the sum of the squared errors would be that of a few long rows, the first token of a text above all. So
divided, an error counts by its size instead of its square (the weights of iteratively reweighted least squares for a
sum of sizes, at errors that are in proportion to the rows). Where single entries are ranked, by Wanda, rows of one
length serve better, and a norm that leans towards the largest values. docs/pruning.md has what each changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsecomp.pruning.calibration import Call
from sparsecomp.pruning.sites import Site


@dataclass
class Statistics:
    """Sums over rows of inputs: of those that went into a weight, divided as `balanced` does.

    Attributes:
        rows: their number.
        sums: of every input, float64 `[I]`.
        squares: sum of squares of every input, float64 `[I]`.
        gram: `X^T X`, float32 `[I, I]` (float64 for a float64 weight); None where it was not asked for.
        tails: sum of the powers 9/4 of every input, of rows all brought to one length, float64 `[I]`; None where `gram`
            was asked for.
    """

    rows: int
    sums: Tensor
    squares: Tensor
    gram: Tensor | None = None
    tails: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, *, gram: bool) -> Statistics:
        """Of the rows `[R, I]` of one call; those of 16 bits are summed in float32, as those of float32 are."""
        rows = rows.detach() if rows.dtype == torch.float64 else rows.detach().float()
        # As a linear: `Call.run`, inside of which hooks get here, has a faster one than the plain product.
        columns = rows.T.contiguous() if gram else None
        product = None if columns is None else functional.linear(columns, columns)
        squares = rows.square().sum(dim=0) if product is None else product.diagonal()
        tails = None if gram else _tails(rows)
        return cls(rows.shape[0], rows.sum(dim=0).double(), squares.double(), product, tails)

    def copy(self) -> Statistics:
        """Sums that change on their own."""
        gram = None if self.gram is None else self.gram.clone()
        tails = None if self.tails is None else self.tails.clone()
        return Statistics(self.rows, self.sums.clone(), self.squares.clone(), gram, tails)

    def add(self, other: Statistics) -> None:
        """Add the sums over other rows."""
        self.rows += other.rows
        self.sums += other.sums
        self.squares += other.squares
        if self.gram is not None and other.gram is not None:
            self.gram += other.gram
        if self.tails is not None and other.tails is not None:
            self.tails += other.tails

    @property
    def norms(self) -> Tensor:
        """Euclidean norm of every input over the rows, float64 `[I]`."""
        return self.squares.sqrt()

    @property
    def tail_norms(self) -> Tensor:
        """9/4-norm of every input over rows of one length, float64 `[I]`; `norms` where that is not known."""
        return self.norms if self.tails is None else self.tails.pow(4 / 9)

    @property
    def variances(self) -> Tensor:
        """Variance of every input over the rows, float64 `[I]`, never negative."""
        rows = max(self.rows, 1)
        return (self.squares / rows - (self.sums / rows).square()).clamp_min(0)

    @property
    def means(self) -> Tensor:
        """Mean of every input over the rows, float64 `[I]`."""
        return self.sums / max(self.rows, 1)


def balanced(rows: Tensor) -> Tensor:
    """Rows `[R, I]` divided by the square roots of their root mean squares, in float32 (float64 as it is)."""
    rows = rows.detach() if rows.dtype == torch.float64 else rows.detach().float()
    return rows * _lengths(rows).rsqrt().to(rows.dtype)


def _lengths(rows: Tensor) -> Tensor:
    """The root mean square of each row `[R, I]`, float64 `[R, 1]`, in which the squares of no float32 overflow."""
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64) / max(rows.shape[1], 1) ** 0.5
    return lengths.clamp_min(1e-30)


def _tails(rows: Tensor) -> Tensor:
    """Sums of the powers 9/4 of every input over rows of one length; by roots, which are faster than powers."""
    sizes = (rows / _lengths(rows).to(rows.dtype)).abs()
    return (sizes.square() * sizes.sqrt().sqrt()).sum(dim=0).double()


class _AllSeen(Exception):
    """Every site got its input: the rest of the call is of no interest."""


class _Collector:
    """Adds up the inputs of weights; what several sites are given at the same time is summed once."""

    def __init__(self, *, gram: bool) -> None:
        self.by_weight: dict[int, Statistics] = {}
        self._gram = gram
        self._last: tuple[Tensor, int, Statistics] | None = None

    def __call__(self, site: Site, value: Tensor) -> None:
        rows = site.kind.to_inputs(site.module, value)
        last = self._last
        if last is None or not _same(rows, last[0]) or rows._version != last[1]:
            last = self._last = (rows, rows._version, Statistics.of(balanced(rows), gram=self._gram))
        known = self.by_weight.get(id(site.weight))
        if known is None:
            self.by_weight[id(site.weight)] = last[2].copy()
        else:
            known.add(last[2])


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def collect(
    module: nn.Module, calls: Sequence[Call], sites: Sequence[Site], *, gram: bool, once: bool = False
) -> dict[int, Statistics]:
    """Run a module on its calls and sum up what goes into the sites within it.

    Args:
        module: holds the sites.
        calls: its calls.
        sites: modules within it; those that share a weight share the statistics.
        gram: whether the Gram matrix is wanted.
        once: whether every site runs once in a call, so that what follows the last of them need not run.

    Returns:
        The statistics by `id` of the weight.

    Raises:
        ValueError: a site was never called, or an input holds NaN or infinity.
    """
    collector = _Collector(gram=gram)
    distinct = len({id(site.module) for site in sites})
    seen = 0

    def receive(site: Site, value: Tensor) -> None:
        nonlocal seen
        collector(site, value)
        seen += 1
        if once and seen == distinct:
            raise _AllSeen

    with _inputs(sites, receive):
        for call in calls:
            seen = 0
            with suppress(_AllSeen):
                call.run(module)
    for site in sites:
        statistics = collector.by_weight.get(id(site.weight))
        if statistics is None or not statistics.rows:
            raise ValueError(
                f"{site.where} ({type(site.module).__name__}) was not called with any calibration input, so nothing is "
                "known of what goes into it: give inputs that reach it, leave it out with filter_fn, or use "
                "criterion='magnitude'"
            )
        if not bool(torch.isfinite(statistics.squares).all()):
            raise ValueError(
                f"{site.where} has NaN or infinity in its calibration inputs: look at the batches, and at the modules "
                "before it"
            )
    return collector.by_weight


def stages(module: nn.Module, call: Call, sites: Sequence[Site]) -> tuple[list[list[Site]], bool]:
    """Group the sites of a module by the input that they share, in the order in which they run.

    Sites of the same input (query, key and value) can be pruned from one look at it; those behind them are better
    looked at again, when they see what the pruned ones give.

    Returns:
        The groups, sites that did not run last, in one group; and whether every site ran exactly once.
    """
    order: list[tuple[Tensor, list[Site]]] = []
    runs: Counter[int] = Counter()

    def note(site: Site, value: Tensor) -> None:
        runs[id(site)] += 1
        if runs[id(site)] > 1:
            return
        for known, group in order:
            if known is value:
                group.append(site)
                return
        order.append((value, [site]))

    with _inputs(sites, note):
        call.run(module)
    rest = [site for site in sites if id(site) not in runs]
    groups = [group for _, group in order] + ([rest] if rest else [])
    return groups, all(runs[id(site)] == 1 for site in sites)


@contextmanager
def _inputs(sites: Iterable[Site], receive: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Hand every input of the sites to a function; a module that is there under two names is one site."""
    with ExitStack() as stack:
        for site in {id(site.module): site for site in sites}.values():

            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], site: Site = site) -> None:
                receive(site, args[0] if args else next(iter(kwargs.values())))

            stack.callback(site.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
