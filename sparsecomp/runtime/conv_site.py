"""A rewritten convolution at run time, and the op that calls it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecomp.ir import Norm
from sparsecomp.runtime.terms import fold_terms
from sparsecomp.runtime.weight_site import ACTIVATIONS, PackedWeight, Seen, WeightSite
from sparsecomp.targets.base import Candidate, ConvCall, ConvEpilogue, ConvKernel, Target, WeightFacts
from sparsecomp.window import Maps, Window, convolve, read_form

ConvChooser = Callable[[WeightFacts, Maps], Candidate]

# Shapes that are remembered; a stream of ever new sizes must not grow without bound.
_MAX_SHAPES = 1024

Ready = tuple[ConvCall | None, tuple[int, ...]]
"""A call, None for the dense one, and the shape of its output."""


@dataclass(frozen=True)
class HeldTerms:
    """What of a convolution's terms is constant, so that the site computes them: names in the order of its sources.

    Attributes:
        names: of the bias and of what the normalisation reads.
        norm: reads some of them.
        bias: one of them, or None.
    """

    names: tuple[str, ...]
    norm: Norm | None
    bias: str | None

    def fold(self, sources: Sequence[Tensor]) -> Tensor:
        """The terms of present values."""
        with torch.no_grad():
            return fold_terms(self.norm, self.bias, dict(zip(self.names, sources, strict=True)).__getitem__)


class _Terms(threading.local):
    """Those of the current weight of a thread, None where they are given at each call."""

    current: Tensor | None = None


_sites: weakref.WeakValueDictionary[int, RuntimeConv] = weakref.WeakValueDictionary()


class RuntimeConv(WeightSite[Maps, ConvKernel]):
    """A convolution; a call is told apart by the number and the size of its maps."""

    def __init__(
        self,
        name: str,
        weight: Tensor,
        window: Window,
        target: Target,
        chooser: ConvChooser,
        epilogue: ConvEpilogue,
        held: HeldTerms | None = None,
    ) -> None:
        """Make a site.

        Args:
            name: for messages.
            weight: `[O, I / groups, kh, kw]` or `[O, I / groups, k]`.
            window: of the convolution.
            target: packs the weight and builds the kernels.
            chooser: what to use for a weight on maps of a size; dense is allowed.
            epilogue: what follows.
            held: how the terms come from what `refresh` is given; None if they are given at each call.
        """
        self._held, self._terms = held, _Terms()
        super().__init__(name, weight, False, target)
        self._window, self._chooser, self._epilogue = window, chooser, epilogue
        self._outputs = weight.shape[0]
        _sites[self.handle] = self

    def _candidate(self, facts: WeightFacts, call: Maps) -> Candidate:
        return self._chooser(facts, call)

    def _prepare(self, candidate: Candidate, weight: Tensor) -> ConvKernel:
        return self._target.prepare_conv(candidate, weight, self._window)

    def _key(self, candidate: Candidate) -> Hashable:
        return candidate, self._window

    def _build(self, kernel: ConvKernel, call: Maps, residual: bool) -> None:
        kernel.build(call, self._epilogue, residual)

    def refresh(self, weight: Tensor, *sources: Tensor) -> None:
        """See `WeightSite.refresh`.

        Args:
            weight: to become the current one.
            sources: what the terms that are held are of; none leaves the terms as they are.
        """
        super().refresh(weight)
        if self._held is None or not sources:
            return
        packed = self._here.packed
        if packed.terms is None or not packed.terms[0].are(sources):
            # In one write, as another thread may read it.
            packed.terms = (Seen(sources), self._held.fold(sources))
        self._terms.current = packed.terms[1]

    def run(self, x: Tensor, terms: Tensor | None, residual: Tensor | None) -> Tensor:
        """`activation(conv(x) * scale + shift) + residual`, or with the residual before the activation.

        Args:
            x: `[N, I, H, W]` or `[N, I, L]`.
            terms: float32 `[2 * O]`, the shifts and the scales, contiguous; those that the site holds if None, and none
                if it holds none.
            residual: of the output's shape, or None.

        Returns:
            The output, contiguous, of x's type.
        """
        call, sizes = self._ready(x, residual)
        if call is None:
            return self._dense(x, terms, residual)
        out = torch.empty(sizes)
        self._call(call, x, terms, residual, out)
        return out if x.dtype == torch.float32 else out.to(x.dtype)

    def write(self, x: Tensor, terms: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
        """As `run`, to a contiguous output of x's type."""
        call, _ = self._ready(x, residual)
        if call is not None and out.dtype == torch.float32:
            self._call(call, x, terms, residual, out)
        else:
            out.copy_(self.run(x, terms, residual))

    def _call(self, call: ConvCall, x: Tensor, terms: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
        # Most calls need no conversion, and each that is not made saves a microsecond.
        if x.dtype != torch.float32:
            x = x.float()
        if residual is not None:
            residual = (residual if residual.dtype == torch.float32 else residual.float()).contiguous()
        call(x.contiguous(), self._terms.current if terms is None else terms, residual, out)

    def _ready(self, x: Tensor, residual: Tensor | None) -> Ready:
        packed = self._here.packed
        key = (x.shape, residual is None, torch.get_num_threads())
        ready = packed.ready.get(key)
        return self._make_ready(packed, key) if ready is None else ready

    def _make_ready(self, packed: PackedWeight[Maps, ConvKernel], key: tuple[torch.Size, bool, int]) -> Ready:
        """The call for inputs of a shape, with a residual or without, and the output's shape; remembered."""
        shape, alone, _ = key
        maps = Maps(shape[0], shape[2] if len(shape) == 4 else 1, shape[-1])
        rows, columns = self._window.output(maps.height, maps.width)
        sizes = (maps.images, self._outputs, *((rows, columns) if len(shape) == 4 else (columns,)))
        kernel = self._kernel(packed, maps, not alone) if maps.positions(self._window) else None
        ready = (None if kernel is None else kernel.ready(maps, self._epilogue, not alone), sizes)
        if len(packed.ready) >= _MAX_SHAPES:
            packed.ready.clear()
        packed.ready[key] = ready
        return ready

    def _dense(self, x: Tensor, terms: Tensor | None, residual: Tensor | None) -> Tensor:
        value = convolve(x, self._here.packed.values, self._window)
        terms = self._terms.current if terms is None else terms
        if terms is not None:
            shift, scale = terms.reshape(2, -1, *[1] * (x.dim() - 2))
            value = (value * scale + shift).to(x.dtype)
        activation = ACTIVATIONS[self._epilogue.activation]
        if residual is None:
            value = activation(value)
        elif self._epilogue.residual_first:
            value = activation(value + residual)
        else:
            value = activation(value) + residual
        return value.contiguous()


_library = torch.library.Library("sparsecomp", "FRAGMENT")
# What decides the shape of the output is in the graph, and not only in the site: compiled graphs are cached by it.
_library.define("conv(Tensor x, Tensor? terms, Tensor? residual, int site, str form) -> Tensor")


def conv_site(handle: int) -> RuntimeConv:
    """The site of a handle.

    Raises:
        RuntimeError: it was released.
    """
    found = _sites.get(handle)
    if found is None:
        raise RuntimeError(
            f"sparsecomp::conv was called for site {handle}, which was released: compile the model again"
        )
    return found


def _conv(x: Tensor, terms: Tensor | None, residual: Tensor | None, site: int, form: str) -> Tensor:
    return conv_site(site).run(x, terms, residual)


def _conv_meta(x: Tensor, terms: Tensor | None, residual: Tensor | None, site: int, form: str) -> Tensor:
    window, outputs = read_form(form)
    height, width = window.output(x.shape[2] if x.dim() == 4 else 1, x.shape[-1])
    return x.new_empty((x.shape[0], outputs, *((height, width) if x.dim() == 4 else (width,))))


_library.impl("conv", _conv, "CPU")
_library.impl("conv", _conv_meta, "Meta")
