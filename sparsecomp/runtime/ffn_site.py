"""An FFN, or a linear, that skips at run time what its token does not need, and the op that calls it."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from sparsecomp.log import log
from sparsecomp.runtime.failures import record_failure
from sparsecomp.runtime.site import LinearRuntime
from sparsecomp.runtime.skip_pays import REST, WINDOW, pays
from sparsecomp.runtime.skip_rates import Counted, count_skips, note_rest
from sparsecomp.runtime.weight_site import ACTIVATIONS
from sparsecomp.targets.base import Target
from sparsecomp.targets.skip import FEW_TOKENS, DeviceSkipKernel, SkipKernel, SkipRows, SkipSpec

OwnKernel = TypeVar("OwnKernel", SkipKernel, DeviceSkipKernel)

_sites: weakref.WeakValueDictionary[int, SkipSite] = weakref.WeakValueDictionary()

TILE = 256
"""Tokens that share their dead units where many tokens skip exact zeros."""
MOST_ALIVE = 0.75
"""Share of units up to which the rows of those that are alive are gathered for a tile."""
PATIENCE = 15
"""Calls of many tokens that look for no dead units after one that found too few."""


@dataclass(frozen=True, eq=False)
class SkipForms:
    """What a site skips.

    Attributes:
        spec: what its kernels compute.
        floor: see `FfnSite.floor`.
        exact: whether only zeros are skipped, so that many tokens may skip as well.
        low_rank: of a linear: A `[O, rank]` and B `[rank, I]`; `A B` times the inputs that were dropped is added.
        after: activation behind that sum; `spec` has none then.
    """

    spec: SkipSpec
    floor: float = 0.0
    exact: bool = False
    low_rank: tuple[Tensor, Tensor] | None = None
    after: str = "none"


class SkipSite(Protocol):
    """What the op calls."""

    def run(self, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None) -> Tensor:
        """See `SkipRuntime.run`."""


def register(handle: int, site: SkipSite) -> None:
    """Let the op find a site by its handle for as long as it lives."""
    _sites[handle] = site


class _Here(threading.local):
    """What a thread has ready: the kernel, and the weights that it is for."""

    current: tuple[object, ...] = ()
    kernel: Any = None
    pause = 0
    calls = 0
    rest = 0
    counted = (0, 0)


class SkipRuntime(ABC, Generic[OwnKernel]):
    """A site that skips; it holds the linears of the block, which compute what does not skip.

    Attributes:
        handle: of the op.
    """

    def __init__(self, name: str, linears: Sequence[LinearRuntime[Any]], forms: SkipForms, target: Target) -> None:
        """Make a site.

        Args:
            name: for messages.
            linears: gate, up where it is one of its own, down; or the one linear.
            forms: what to skip.
            target: has kernels that skip.
        """
        self.name = name
        self.handle = linears[0].handle  # not used by another site: the linears are not called by their handle
        self._linears = tuple(linears)
        self._forms, self._spec, self._target = forms, forms.spec, target
        self._inputs, self._outputs = self._spec.sizes[0], self._spec.sizes[-1]
        self._here = _Here()
        self._lock = threading.Lock()
        self._kernels = WeakIdKeyDictionary()
        register(self.handle, self)

    def refresh(self, *weights: Tensor) -> None:
        """Make weights the current ones of this thread, in the order of the linears."""
        for linear, weight in zip(self._linears, weights, strict=True):
            linear.refresh(weight)

    @abstractmethod
    def prepare(self, tokens: int, residual: bool) -> None:
        """Pack and build now what such a call needs.

        Raises:
            BuildError: a kernel could not be built here.
        """

    @abstractmethod
    def run(self, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None) -> Tensor:
        """The block for x of `[..., I]`; the result is contiguous.

        Args:
            x: input.
            biases: of gate, up and down, or of the linear and twice None.
            residual: of the output's shape, or None.
        """

    @abstractmethod
    def _prepared(self, spec: SkipSpec) -> OwnKernel:
        """The target's kernel for the current weights."""

    @abstractmethod
    def _counted(self, kernel: OwnKernel, place: int) -> Counted:
        """How to ask what a kernel has counted for a linear."""

    def _dense(self, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None) -> Tensor:
        if not self._spec.is_ffn:
            return self._linears[0].run(x, biases[0], residual)
        return self._linears[-1].run(self._hidden(x, biases), biases[2], residual)

    def _hidden(self, x: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
        spec = self._spec
        gate = self._linears[0].run(x, biases[0], None)
        up = self._linears[1].run(x, biases[1], None) if len(self._linears) == 3 else None
        if spec.fused:
            first, second = gate.chunk(2, dim=-1)
            gate, up = (first, second) if spec.fused == "gate" else (second, first)
        hidden = ACTIVATIONS[spec.activation](gate)
        if self._forms.floor:
            hidden = functional.threshold(hidden, self._forms.floor, 0.0)
        return hidden if up is None else hidden * up

    # -- kernels ------------------------------------------------------------------------------------------------------

    def _kernel(self) -> OwnKernel | None:
        here = self._here
        current = tuple(linear.current for linear in self._linears)
        # Compared one by one: what stands for a weight has no other equality.
        if here.kernel is not None and current == here.current:
            kernel: OwnKernel = here.kernel
            return kernel
        try:
            return self._make_current()
        except Exception as error:  # noqa: BLE001 -- logged with its traceback, and reported by `explain`
            log.warning("site %s runs dense: its kernel failed", self.name, exc_info=True)
            if (weight := self._linears[-1].weight) is not None:
                record_failure(weight, "few tokens", error)
            return None

    def _make_current(self) -> OwnKernel:
        current = tuple(linear.current for linear in self._linears)
        last = self._linears[-1].weight
        with self._lock, torch.no_grad():
            known = self._kernels.get(last) if last is not None else None
            if known is None or known[0] != current:
                known = (current, self._make())
                if last is not None:
                    self._kernels[last] = known
        kernel: OwnKernel = known[1]
        self._here.current, self._here.kernel = current, kernel
        return kernel

    def _make(self) -> OwnKernel:
        kernel = self._prepared(self._spec)
        for place, linear in enumerate(self._linears):
            if (weight := linear.weight) is not None:
                count_skips(weight, self.handle, self._counted(kernel, place))
        return kernel

    def _current_rows(self) -> list[SkipRows]:
        rows: list[SkipRows] = []
        for place, linear in enumerate(self._linears):
            own = [self._rows(linear, self._by_input(place), half) for half in self._halves(place)]
            rows += own if self._spec.fused != "up" else own[::-1]
        return rows

    def _rows(self, linear: LinearRuntime[Any], by_input: bool, half: int | None) -> SkipRows:
        def make(weight: Tensor) -> SkipRows:
            part = weight if half is None else weight.chunk(2)[half]
            rows = self._target.skip_rows(part.t() if by_input else part)
            if rows is None:
                raise ValueError(f"target {self._target.name} has no kernels that skip at run time")
            return rows

        return linear.form((self._target, "skip", by_input, half), make)

    def _halves(self, place: int) -> tuple[int | None, ...]:
        """The parts of a linear that have rows of their own."""
        return (0, 1) if self._spec.fused and place == 0 else (None,)

    def _by_input(self, place: int) -> bool:
        return self._spec.kind == "inputs" or place == len(self._linears) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of what was packed for the current weights; 0 where they are used as they are."""
        return sum(
            self._rows(linear, self._by_input(place), half).nbytes
            for place, linear in enumerate(self._linears)
            for half in self._halves(place)
        )

    @property
    def source(self) -> str:
        """What is run, for people."""
        form = "inputs" if self._spec.kind == "inputs" else "hidden units"
        return f"; skips {form} of {' -> '.join(map(str, self._spec.sizes))}"


class RuntimeSkip(SkipRuntime[SkipKernel]):
    """A site on the CPU that skips, in float32 or bfloat16, which is widened before and narrowed after the kernels."""

    def prepare(self, tokens: int, residual: bool) -> None:
        """See `SkipRuntime.prepare`."""
        if 0 < tokens <= FEW_TOKENS:
            self._make_current().build(tokens, residual)

    def run(self, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None) -> Tensor:
        """See `SkipRuntime.run`."""
        tokens = x.numel() // self._inputs
        here = self._here
        if not 0 < tokens <= FEW_TOKENS:
            return self._many(x, biases, residual)
        if here.rest:
            here.rest -= 1
            return self._dense(x, biases, residual)
        kernel = self._kernel()
        if kernel is None:
            return self._dense(x, biases, residual)
        out = self._few(kernel, x, biases, residual)
        here.calls += 1
        if here.calls >= WINDOW:
            here.calls = 0
            self._look(kernel, x, biases, residual)
        return out

    def _few(self, kernel: SkipKernel, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None) -> Tensor:
        if x.dtype != torch.float32:
            wide = [None if value is None else value.float() for value in (*biases, residual)]
            return self._few(kernel, x.float(), wide[:-1], wide[-1]).to(x.dtype)
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], self._outputs)
        biases = [None if bias is None else bias.detach().contiguous() for bias in biases]
        residual = None if residual is None else residual.contiguous()
        flat = x.view(-1, self._inputs)
        if self._forms.low_rank is not None:
            kernel.run(flat, biases, None, out)
            return self._with_low_rank(x, out, residual)
        kernel.run(flat, biases, residual, out)
        return out

    def _look(self, kernel: SkipKernel, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None) -> None:
        """Take the dense way for a while where the last calls skipped too little to be worth it."""
        here, tokens = self._here, x.numel() // self._inputs
        stayed, seen = self._sums(kernel)
        before, here.counted = here.counted, (stayed, seen)
        if seen <= before[1]:
            return  # another kernel counts now: its weights changed
        kept = (stayed - before[0]) / (seen - before[1])
        facts = [linear.facts for linear in self._linears]
        sizes = tuple((own.out_features, own.in_features, round(own.density, 1)) for own in facts)
        key = (sizes, self._spec.kind, x.dtype, residual is None, self._forms.low_rank is None)

        def ways() -> list[Callable[[], object]]:
            none, every = self._with_threshold(float("inf")), self._with_threshold(-1.0)
            return [
                lambda: self._dense(x, biases, residual),
                lambda: self._few(none, x, biases, residual),
                lambda: self._few(every, x, biases, residual),
            ]

        here.rest = 0 if pays(kept, tokens, key, ways) else REST
        for linear in self._linears:
            if (weight := linear.weight) is not None:
                note_rest(weight, self.handle, kept if here.rest else None)

    def _with_threshold(self, value: float) -> SkipKernel:
        thresholds = tuple(torch.full_like(own, value) for own in self._spec.thresholds)
        return self._prepared(replace(self._spec, thresholds=thresholds))

    def _sums(self, kernel: SkipKernel) -> tuple[int, int]:
        """What stayed and what was looked at so far, each linear by the size of what it reads for one of them."""
        sizes = self._spec.sizes
        heights = [1] if len(kernel.counters) == 1 else [sizes[1]] * (len(kernel.counters) - 1) + [sizes[-1]]
        stayed, seen = (np.array(heights) @ kernel.counters[:, :2]).tolist()
        return stayed, seen

    def _with_low_rank(self, x: Tensor, out: Tensor, residual: Tensor | None) -> Tensor:
        """R-Sparse (Zhang et al., arXiv:2504.19449, section 3): the inputs that were dropped go through low rank."""
        assert self._forms.low_rank is not None
        a, b = self._forms.low_rank
        dropped = torch.where(x.abs() <= self._spec.thresholds[0], x, 0.0)
        out = out + functional.linear(functional.linear(dropped, b), a)
        out = ACTIVATIONS[self._forms.after](out)
        return out if residual is None else out + residual

    # -- many tokens --------------------------------------------------------------------------------------------------

    def _many(self, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None) -> Tensor:
        if not self._spec.is_ffn:
            return self._linears[0].run(x, biases[0], residual)
        hidden = self._hidden(x, biases)
        if self._forms.exact and hidden.numel():
            if self._here.pause:
                self._here.pause -= 1
            elif (found := self._by_tiles(hidden, biases[2], residual)) is not None:
                return found
            else:
                self._here.pause = PATIENCE
        return self._linears[-1].run(hidden, biases[2], residual)

    def _by_tiles(self, hidden: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor | None:
        """The down projection of the units that are not zero for a whole tile; None if the first tile keeps many."""
        flat = hidden.reshape(-1, hidden.shape[-1]).float()
        rows = self._linears[-1].form("by unit", lambda weight: weight.t().float().contiguous())
        out = torch.empty(flat.shape[0], self._outputs)
        for start in range(0, flat.shape[0], TILE):
            tile = flat[start : start + TILE]
            alive = tile.ne(0).any(0).nonzero().squeeze(1)
            if start == 0 and alive.numel() > MOST_ALIVE * tile.shape[1]:
                return None
            part = out[start : start + TILE]
            torch.mm(tile.index_select(1, alive), rows.index_select(0, alive), out=part)
        out = out.view(*hidden.shape[:-1], self._outputs)
        out = out if bias is None else out.add_(bias.detach())
        return (out if residual is None else out.add_(residual)).to(hidden.dtype)

    def _prepared(self, spec: SkipSpec) -> SkipKernel:
        kernel = self._target.prepare_skip(spec, self._current_rows())
        if not isinstance(kernel, SkipKernel):
            raise ValueError(f"what target {self._target.name} has for {self.name} does not run on the CPU")
        return kernel

    def _counted(self, kernel: SkipKernel, place: int) -> Counted:
        # Units are counted once, for all linears of the block.
        own = min(place + (place > 0 and bool(self._spec.fused)), len(kernel.counters) - 1)
        counted: Counted = kernel.counters[own].tolist
        return counted


_library = torch.library.Library("sparsecomp", "FRAGMENT")
_library.define("skip(Tensor x, Tensor?[] biases, Tensor? residual, int site, int out_features) -> Tensor")


def _skip(x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None, site: int, _: int) -> Tensor:
    found = _sites.get(site)
    if found is None:
        raise RuntimeError(f"a skipping op was called for site {site}, which was released: compile the model again")
    return found.run(x, biases, residual)


def _meta(x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None, site: int, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


_library.impl("skip", _skip, "CPU")
_library.impl("skip", _skip, "CUDA")
_library.impl("skip", _meta, "Meta")
