"""Experts of a mixture at run time, and the op that runs those which a router picked.

Which rows an expert gets is known only at run time, so all experts of a layer are one op: it looks at the router's
picks and calls the experts that were picked, each with its own rows. Inductor's graph stays whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.runtime.site import RuntimeSite
from sparsecomp.runtime.weight_site import ACTIVATIONS

DENSE_EXPERTS = 0
"""Handle of an op whose experts are products with all of their weights."""

_sites: weakref.WeakValueDictionary[int, RuntimeExperts] = weakref.WeakValueDictionary()


class Expert(Protocol):
    """One expert of a rewritten op; a block that skips is one as well.

    Attributes:
        handle: of its first linear.
    """

    handle: int

    def refresh(self, *weights: Tensor) -> None:
        """Make weights the current ones of this thread."""

    def run(self, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None) -> Tensor:
        """The expert for x of `[rows, I]`; there are neither biases nor a residual."""

    @property
    def nbytes(self) -> int:
        """Bytes of what was packed."""

    @property
    def source(self) -> str:
        """What is run, for people."""


class LinearExpert:
    """An expert whose linears run one by one, each with its own kernel or dense."""

    def __init__(self, linears: tuple[RuntimeSite, RuntimeSite], activation: str, gated: bool) -> None:
        """Make an expert.

        Args:
            linears: gate and up in one, or up alone, which then applies the activation itself; and down.
            activation: of the gate.
            gated: whether there is one.
        """
        self._linears, self._activation, self._gated = linears, activation, gated
        self.handle = linears[0].handle

    def refresh(self, *weights: Tensor) -> None:
        """See `Expert`."""
        for linear, weight in zip(self._linears, weights, strict=True):
            linear.refresh(weight)

    def run(self, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None) -> Tensor:
        """See `Expert`."""
        hidden = self._linears[0].run(x, None, None)
        if self._gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = ACTIVATIONS[self._activation](gate) * up
        return self._linears[1].run(hidden, None, None)

    @property
    def nbytes(self) -> int:
        """See `Expert`."""
        return sum(linear.nbytes for linear in self._linears)

    @property
    def source(self) -> str:
        """See `Expert`."""
        return "\n".join(linear.source for linear in self._linears)


class RuntimeExperts:
    """The experts of one op.

    Attributes:
        handle: of the op.
        experts: in the order of their numbers.
    """

    def __init__(self, experts: Sequence[Expert]) -> None:
        """Make a site; its handle is that of the first linear, which is not called by it."""
        self.handle, self.experts = experts[0].handle, tuple(experts)
        _sites[self.handle] = self

    @property
    def nbytes(self) -> int:
        """Bytes of what was packed for all experts."""
        return sum(expert.nbytes for expert in self.experts)


_library = torch.library.Library("sparsecomp", "FRAGMENT")
_library.define(
    "experts(Tensor x, Tensor index, Tensor weights, Tensor[] first, Tensor[] down, bool gated, str activation, "
    "int site) -> Tensor"
)


def _experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    first: Sequence[Tensor],
    down: Sequence[Tensor],
    gated: bool,
    activation: str,
    site: int,
) -> Tensor:
    """`out[t] = sum over k of weights[t, k] * expert index[t, k] of x[t]` for x `[T, I]`, index and weights `[T, K]`.

    A number that is none of an expert adds nothing.
    """
    run = _dense(first, down, gated, activation) if site == DENSE_EXPERTS else _by_sites(site, first, down)
    out = x.new_zeros(x.shape[0], down[0].shape[0])
    picked = sorted({number for number in index.flatten().tolist() if 0 <= number < len(first)})
    for number in picked:
        if x.shape[0] == 1:
            # Nothing to gather: one token, and the share of every place where it picked this expert.
            share = weights if index.shape[1] == 1 else (weights * (index == number)).sum(dim=1, keepdim=True)
            out += run(number, x) * share
        else:
            token, place = torch.where(index == number)
            part = run(number, x[token]) * weights[token, place, None]
            out.index_add_(0, token, part.to(out.dtype))
    return out


def _dense(
    first: Sequence[Tensor], down: Sequence[Tensor], gated: bool, activation: str
) -> Callable[[int, Tensor], Tensor]:
    function = ACTIVATIONS[activation]

    def run(number: int, rows: Tensor) -> Tensor:
        hidden = functional.linear(rows, first[number])
        if gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = function(gate) * up
        else:
            hidden = function(hidden)
        return functional.linear(hidden, down[number])

    return run


def _by_sites(site: int, first: Sequence[Tensor], down: Sequence[Tensor]) -> Callable[[int, Tensor], Tensor]:
    found = _sites.get(site)
    if found is None:
        raise RuntimeError(f"experts were called for site {site}, which was released: compile the model again")
    experts = found.experts

    def run(number: int, rows: Tensor) -> Tensor:
        expert = experts[number]
        # Only of an expert that runs it matters whether its weights changed.
        expert.refresh(first[number], down[number])
        return expert.run(rows, (None, None, None), None)

    return run


def _meta(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    first: Sequence[Tensor],
    down: Sequence[Tensor],
    gated: bool,
    activation: str,
    site: int,
) -> Tensor:
    return x.new_empty(x.shape[0], down[0].shape[0])


_library.impl("experts", _experts, "CPU")
_library.impl("experts", _meta, "Meta")
