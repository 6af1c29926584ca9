"""A rewritten linear at run time: its packed weight, the kernel for each number of tokens, and the op that calls it."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from sparsecomp.log import log
from sparsecomp.runtime.facts import facts_of
from sparsecomp.runtime.failures import record_failure
from sparsecomp.targets.base import DENSE, Candidate, Kernel, Target, WeightFacts

Chooser = Callable[[WeightFacts, int], Candidate]

_handles = itertools.count(1)
_sites: weakref.WeakValueDictionary[int, RuntimeSite] = weakref.WeakValueDictionary()
# Numbers of tokens whose choice is remembered; a stream of ever new lengths must not grow without bound.
_MAX_CHOICES = 4096


class _Packed:
    """One weight as a site uses it: its facts, and its kernels by candidate and by number of tokens."""

    def __init__(self, weight: Tensor, transposed: bool) -> None:
        self.weight = weakref.ref(weight)
        self.stamp = _stamp(weight)
        self.matrix = weight.detach().t() if transposed else weight.detach()
        self.facts = facts_of(weight, transposed)
        self.kernels: dict[Candidate, Kernel] = {}
        self.choices: dict[int, Kernel | None] = {}

    def is_current(self, weight: Tensor) -> bool:
        """Whether this is that weight, unchanged."""
        return self.weight() is weight and self.stamp == _stamp(weight)


class _SharedKernels:
    """Packed weights by weight, so that layers which share a weight share its packed form too."""

    def __init__(self) -> None:
        self._by_weight = WeakIdKeyDictionary()
        self._lock = threading.Lock()

    def get(self, packed: _Packed, target: Target, candidate: Candidate) -> Kernel:
        """The kernel for a weight as it is now; packs where no site has done so."""
        weight = packed.weight()
        if weight is None:
            return target.prepare(candidate, packed.matrix)
        key = (target, packed.matrix.shape, packed.matrix.stride(), candidate)
        with self._lock:
            stamp, kernels = self._by_weight.get(weight, (None, {}))
            if stamp != packed.stamp:
                kernels = {}
                self._by_weight[weight] = (packed.stamp, kernels)
            if key not in kernels:
                kernels[key] = target.prepare(candidate, packed.matrix)
            kernel: Kernel = kernels[key]
            return kernel


_shared_kernels = _SharedKernels()


class RuntimeSite:
    """A linear whose weight is constant but for changes in place.

    The op looks it up by its handle in a weak table, so whoever compiled the graph keeps it alive. Dynamo runs one
    compiled graph for all modules of a class (layers compiled one by one, copies of a model), perhaps at once in
    several threads: so a site keeps a packed form for every living weight that it has seen, and each thread has its
    own current one.

    Attributes:
        handle: of the op `sparsecomp::linear`.
    """

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
        self.name = name
        self._transposed = transposed
        self._target = target
        self._chooser = chooser
        self._activation = activation
        self._lock = threading.Lock()
        self._packed = WeakIdKeyDictionary()
        self._here = threading.local()
        self.refresh(weight)
        self.handle = next(_handles)
        _sites[self.handle] = self

    def refresh(self, weight: Tensor) -> None:
        """Make a weight the current one of this thread; packs if it is new or was changed in place."""
        packed: _Packed | None = getattr(self._here, "packed", None)
        if packed is not None and packed.is_current(weight):
            return
        with self._lock, torch.no_grad():
            packed = self._packed.get(weight)
            if packed is None or not packed.is_current(weight):
                if packed is not None:
                    log.info("site %s: the weight changed, it is packed anew", self.name)
                packed = self._packed[weight] = _Packed(weight, self._transposed)
        self._here.packed = packed

    def prepare(self, tokens: int, residual: bool) -> None:
        """Pack and build now what a call with this many tokens needs.

        Raises:
            BuildError: a kernel could not be built here.
        """
        with self._lock:
            self._choose(self._here.packed, tokens, residual)

    def _choose(self, packed: _Packed, tokens: int, residual: bool) -> Kernel | None:
        candidate = self._chooser(packed.facts, tokens)
        kernel = None
        if not candidate.is_dense:
            kernel = packed.kernels.get(candidate)
            if kernel is None:
                kernel = packed.kernels[candidate] = _shared_kernels.get(packed, self._target, candidate)
            kernel.build(tokens, self._activation, residual)
        self._remember(packed, tokens, kernel)
        return kernel

    @staticmethod
    def _remember(packed: _Packed, tokens: int, kernel: Kernel | None) -> None:
        if len(packed.choices) >= _MAX_CHOICES:
            packed.choices.clear()
        packed.choices[tokens] = kernel

    def _kernel(self, packed: _Packed, tokens: int, residual: bool) -> Kernel | None:
        try:
            return packed.choices[tokens]
        except KeyError:
            pass
        with self._lock:
            try:
                return self._choose(packed, tokens, residual)
            except Exception as error:  # noqa: BLE001 -- logged with its traceback, and reported by `explain`
                # A number of tokens that was not there at compile time must not raise where Inductor would not.
                log.warning("site %s runs dense at %d tokens: its kernel failed", self.name, tokens, exc_info=True)
                self._remember(packed, tokens, None)
                if (weight := packed.weight()) is not None:
                    record_failure(weight, tokens, error)
                return None

    def run(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """`activation(x @ W.T + bias) + residual` for x of `[..., I]`; the result is contiguous, of x's type."""
        packed: _Packed = self._here.packed
        outputs, inputs = packed.facts.out_features, packed.facts.in_features
        shape = (*x.shape[:-1], outputs)
        tokens = x.numel() // inputs if inputs else 0
        kernel = self._kernel(packed, tokens, residual is not None) if tokens else None
        if kernel is None:
            return self._dense(packed.matrix, x, bias, residual)
        flat = x.reshape(tokens, inputs)
        if flat.dtype != torch.float32:
            flat = flat.float()
        if residual is not None:
            residual = residual.reshape(tokens, outputs).to(torch.float32).contiguous()
        out = torch.empty(tokens, outputs)
        bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
        kernel.run(flat.contiguous(), bias, residual, self._activation, out)
        return out.reshape(shape).to(x.dtype)

    def _dense(self, matrix: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        value = ACTIVATIONS[self._activation](functional.linear(x, matrix, bias))
        value = value if residual is None else value + residual
        return value.contiguous()

    @property
    def facts(self) -> WeightFacts:
        """Of the current weight of this thread."""
        packed: _Packed = self._here.packed
        return packed.facts

    @property
    def nbytes(self) -> int:
        """Bytes of the packed forms of the current weight; of the dense one where only dense is used."""
        packed: _Packed = self._here.packed
        taken = sum(kernel.nbytes for kernel in packed.kernels.values())
        return taken or packed.matrix.numel() * packed.matrix.element_size()

    @property
    def source(self) -> str:
        """The generated code of the kernels of the current weight, for people."""
        kernels = self._here.packed.kernels
        return "\n".join(f"; {candidate}\n{kernel.source}" for candidate, kernel in kernels.items()) or str(DENSE)


def _stamp(weight: Tensor) -> tuple[int, int]:
    """Changes with every write through torch, and when the storage is swapped (`weight.data = ...`)."""
    return weight._version, weight.data_ptr()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda value: value,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda value: functional.gelu(value, approximate="tanh"),
    "silu": functional.silu,
}
"""What the dense form of a site applies, by the name that the op takes."""

# A plain Library: an op of torch.library.custom_op costs tens of microseconds a call, this one two.
_library = torch.library.Library("sparsecomp", "DEF")
_library.define(
    "linear(Tensor x, Tensor? bias, Tensor? residual, int site, int out_features, str activation) -> Tensor"
)


def _linear(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, site: int, out_features: int, activation: str
) -> Tensor:
    found = _sites.get(site)
    if found is None:
        raise RuntimeError(
            f"sparsecomp::linear was called for site {site}, which was released: compile the model again"
        )
    return found.run(x, bias, residual)


def _linear_meta(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, site: int, out_features: int, activation: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


_library.impl("linear", _linear, "CPU")
_library.impl("linear", _linear_meta, "Meta")
