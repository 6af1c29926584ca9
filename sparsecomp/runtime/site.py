"""A rewritten linear at run time, and the op that calls it."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.runtime.weight_site import ACTIVATIONS, WeightSite
from sparsecomp.targets.base import Candidate, DeviceKernel, Kernel, LinearCall, Target, WeightFacts

Chooser = Callable[[WeightFacts, int], Candidate]
LinearKernel = TypeVar("LinearKernel", Kernel, DeviceKernel)

# Shapes that are remembered; a stream of ever new sizes must not grow without bound.
_MAX_SHAPES = 1024

_sites: weakref.WeakValueDictionary[int, LinearRuntime[Any]] = weakref.WeakValueDictionary()


class LinearRuntime(WeightSite[int, LinearKernel]):
    """A linear; a call is told apart by its number of tokens."""

    def __init__(
        self, name: str, weight: Tensor, transposed: bool, target: Target, chooser: Chooser, activation: str
    ) -> None:
        """Make a site.

        Args:
            name: for messages.
            weight: `[O, I]`, or `[I, O]` if transposed.
            transposed: see `weight`.
            target: packs the weight and builds the kernels.
            chooser: what to use for a weight at a number of tokens; dense is allowed.
            activation: as in `Problem`.
        """
        super().__init__(name, weight, transposed, target)
        self._chooser = chooser
        self._activation = activation
        _sites[self.handle] = self

    def _candidate(self, facts: WeightFacts, call: int) -> Candidate:
        return self._chooser(facts, call)

    def _key(self, candidate: Candidate) -> Hashable:
        return candidate

    def _build(self, kernel: LinearKernel, call: int, residual: bool) -> None:
        kernel.build(call, self._activation, residual)

    @abstractmethod
    def run(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """`activation(x @ W.T + bias) + residual` for x of `[..., I]`; the result is contiguous, of x's type."""

    def write(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
        """As `run`, to a contiguous output of x's type."""
        out.copy_(self.run(x, bias, residual))

    def _dense(self, matrix: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        value = ACTIVATIONS[self._activation](functional.linear(x, matrix, bias))
        value = value if residual is None else value + residual
        return value.contiguous()


class RuntimeSite(LinearRuntime[Kernel]):
    """A linear on the CPU."""

    def _prepare(self, candidate: Candidate, weight: Tensor) -> Kernel:
        kernel = self._target.prepare(candidate, weight)
        if not isinstance(kernel, Kernel):
            raise ValueError(f"{candidate} of target {self._target.name} is no kernel for the CPU")
        return kernel

    def run(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """See `LinearRuntime.run`."""
        call = self._ready(x, residual)
        if call is None:
            return self._dense(self._here.packed.values, x, bias, residual)
        out = torch.empty((*x.shape[:-1], self._here.packed.facts.out_features))
        call(_plain(x), _plain_or_none(bias), _plain_or_none(residual), out)
        return out if x.dtype == torch.float32 else out.to(x.dtype)

    def write(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
        """See `LinearRuntime.write`."""
        call = self._ready(x, residual)
        if call is not None and out.dtype == torch.float32:
            call(_plain(x), _plain_or_none(bias), _plain_or_none(residual), out)
        else:
            out.copy_(self.run(x, bias, residual))

    def _ready(self, x: Tensor, residual: Tensor | None) -> LinearCall | None:
        """The call for inputs of a shape, None for the dense one; remembered."""
        packed = self._here.packed
        key = (x.shape, residual is None, torch.get_num_threads())
        try:
            ready: LinearCall | None = packed.ready[key]
        except KeyError:
            inputs = packed.facts.in_features
            tokens = x.numel() // inputs if inputs else 0
            kernel = self._kernel(packed, tokens, residual is not None) if tokens else None
            ready = None if kernel is None else kernel.ready(tokens, self._activation, residual is not None)
            if len(packed.ready) >= _MAX_SHAPES:
                packed.ready.clear()
            packed.ready[key] = ready
        return ready


def _plain_or_none(value: Tensor | None) -> Tensor | None:
    return None if value is None else _plain(value)


def _plain(value: Tensor) -> Tensor:
    """A value in float32, contiguous. Most are, and each conversion that is not asked for saves a microsecond."""
    return (value if value.dtype == torch.float32 else value.float()).contiguous()


# A plain Library: an op of torch.library.custom_op costs tens of microseconds a call, this one two.
_library = torch.library.Library("sparsecomp", "FRAGMENT")
_library.define(
    "linear(Tensor x, Tensor? bias, Tensor? residual, int site, int out_features, str activation) -> Tensor"
)


def linear_site(handle: int) -> LinearRuntime[Any]:
    """The site of a handle.

    Raises:
        RuntimeError: it was released.
    """
    found = _sites.get(handle)
    if found is None:
        raise RuntimeError(
            f"sparsecomp::linear was called for site {handle}, which was released: compile the model again"
        )
    return found


def _linear(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, site: int, out_features: int, activation: str
) -> Tensor:
    return linear_site(site).run(x, bias, residual)


def _linear_meta(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, site: int, out_features: int, activation: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=torch.int32 if x.dtype == torch.int8 else x.dtype)


_library.impl("linear", _linear, "CPU")
_library.impl("linear", _linear, "CUDA")
_library.impl("linear", _linear_meta, "Meta")
