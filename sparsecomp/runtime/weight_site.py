"""A rewritten site at run time: its packed weight, and the kernel for each way in which it is called."""

from __future__ import annotations

import itertools
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter, is_
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from sparsecomp.log import log
from sparsecomp.runtime.facts import facts_of
from sparsecomp.runtime.failures import record_failure
from sparsecomp.targets.base import DENSE, Candidate, ConvKernel, DeviceKernel, Kernel, Target, WeightFacts

_handles = itertools.count(1)
# Calls whose choice is remembered; a stream of ever new lengths must not grow without bound.
_MAX_CHOICES = 4096

PackedKernel = TypeVar("PackedKernel", Kernel, ConvKernel, DeviceKernel)
Call = TypeVar("Call", bound=Hashable)
Form = TypeVar("Form")


class Seen:
    """Tensors as they were at some time, none of which is kept alive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._versions = [tensor._version for tensor in tensors]
        self._addresses = [tensor.data_ptr() for tensor in tensors]

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether as many given ones are the same, unchanged since; a hundred take a hundredth of a millisecond."""
        return (
            all(map(is_, [reference() for reference in self._tensors], tensors))
            and list(map(_version, tensors)) == self._versions
            and list(map(Tensor.data_ptr, tensors)) == self._addresses
        )


_version = attrgetter("_version")


class PackedWeight(Generic[Call, PackedKernel]):
    """One weight as a site uses it: its facts, and its kernels by candidate and by what the site is called with."""

    def __init__(self, weight: Tensor, transposed: bool) -> None:
        self.weight = weakref.ref(weight)
        self.stamp = _stamp(weight)
        self.values = weight.detach().t() if transposed else weight.detach()
        self.facts = facts_of(weight, transposed)
        self.kernels: dict[Candidate, PackedKernel] = {}
        self.choices: dict[Call, PackedKernel | None] = {}
        self.terms: tuple[Seen, Tensor] | None = None  # of a convolution, and what they were made of
        self.ready: dict[Hashable, Any] = {}  # what a site keeps for its calls beside the kernels

    def is_current(self, weight: Tensor) -> bool:
        """Whether this is that weight, unchanged."""
        return self.weight() is weight and self.stamp == _stamp(weight)


class _SharedKernels:
    """Packed weights by weight, so that layers which share a weight share its packed form too."""

    def __init__(self) -> None:
        self._by_weight = WeakIdKeyDictionary()
        self._lock = threading.Lock()

    def get(self, packed: PackedWeight[Call, PackedKernel], key: Hashable, prepare: Callable[[], Form]) -> Form:
        """The kernel for a weight as it is now, by what else decides its form; packs where no site has done so."""
        weight = packed.weight()
        if weight is None:
            return prepare()
        key = (packed.values.shape, packed.values.stride(), key)
        with self._lock:
            stamp, kernels = self._by_weight.get(weight, (None, {}))
            if stamp != packed.stamp:
                kernels = {}
                self._by_weight[weight] = (packed.stamp, kernels)
            if key not in kernels:
                kernels[key] = prepare()
            kernel: Form = kernels[key]
            return kernel


_shared_kernels = _SharedKernels()


class WeightSite(ABC, Generic[Call, PackedKernel]):
    """A site whose weight is constant but for changes in place.

    The op looks it up by its handle in a weak table, so whoever compiled the graph keeps it alive. Dynamo runs one
    compiled graph for all modules of a class (layers compiled one by one, copies of a model), perhaps at once in
    several threads: so a site keeps a packed form for every living weight that it has seen, and each thread has its
    own current one.

    Attributes:
        handle: of the op.
    """

    def __init__(self, name: str, weight: Tensor, transposed: bool, target: Target) -> None:
        self.name = name
        self.handle = next(_handles)
        self._transposed = transposed
        self._target = target
        self._lock = threading.Lock()
        self._packed = WeakIdKeyDictionary()
        self._here = threading.local()
        self.refresh(weight)

    @abstractmethod
    def _candidate(self, facts: WeightFacts, call: Call) -> Candidate:
        """What to use for a weight and a call; dense is allowed."""

    @abstractmethod
    def _prepare(self, candidate: Candidate, weight: Tensor) -> PackedKernel:
        """Pack a weight."""

    @abstractmethod
    def _key(self, candidate: Candidate) -> Hashable:
        """What decides the packed form of a weight."""

    @abstractmethod
    def _build(self, kernel: PackedKernel, call: Call, residual: bool) -> None:
        """Compile what a call needs."""

    def refresh(self, weight: Tensor) -> None:
        """Make a weight the current one of this thread; packs if it is new or was changed in place."""
        packed: PackedWeight[Call, PackedKernel] | None = getattr(self._here, "packed", None)
        if packed is not None and packed.is_current(weight):
            return
        with self._lock, torch.no_grad():
            packed = self._packed.get(weight)
            if packed is None or not packed.is_current(weight):
                if packed is not None:
                    log.info("site %s: the weight changed, it is packed anew", self.name)
                packed = self._packed[weight] = PackedWeight(weight, self._transposed)
        self._here.packed = packed

    def prepare(self, call: Call, residual: bool) -> None:
        """Pack and build now what such a call needs.

        Raises:
            BuildError: a kernel could not be built here.
        """
        with self._lock:
            self._choose(self._here.packed, call, residual)

    def _choose(self, packed: PackedWeight[Call, PackedKernel], call: Call, residual: bool) -> PackedKernel | None:
        candidate = self._candidate(packed.facts, call)
        kernel = None
        if not candidate.is_dense:
            kernel = packed.kernels.get(candidate)
            if kernel is None:
                kernel = packed.kernels[candidate] = _shared_kernels.get(
                    packed, (self._target, self._key(candidate)), lambda: self._prepare(candidate, packed.values)
                )
            self._build(kernel, call, residual)
        self._remember(packed, call, kernel)
        return kernel

    @staticmethod
    def _remember(packed: PackedWeight[Call, PackedKernel], call: Call, kernel: PackedKernel | None) -> None:
        if len(packed.choices) >= _MAX_CHOICES:
            packed.choices.clear()
        packed.choices[call] = kernel

    def _kernel(self, packed: PackedWeight[Call, PackedKernel], call: Call, residual: bool) -> PackedKernel | None:
        try:
            return packed.choices[call]
        except KeyError:
            pass
        with self._lock:
            try:
                return self._choose(packed, call, residual)
            except Exception as error:  # noqa: BLE001 -- logged with its traceback, and reported by `explain`
                # A call that was not there at compile time must not raise where Inductor would not.
                where = f"{call} tokens" if isinstance(call, int) else str(call)
                log.warning("site %s runs dense at %s: its kernel failed", self.name, where, exc_info=True)
                self._remember(packed, call, None)
                if (weight := packed.weight()) is not None:
                    record_failure(weight, where, error)
                return None

    @property
    def current(self) -> object:
        """Stands for the current weight of this thread and its values: another object once either has changed."""
        packed: object = self._here.packed
        return packed

    def form(self, key: Hashable, make: Callable[[Tensor], Form]) -> Form:
        """Something made of the current weight `[O, I]`, once for all sites that share it and until it changes.

        Args:
            key: what decides it beside the weight.
            make: makes it; must not ask for another form.
        """
        packed: PackedWeight[Call, PackedKernel] = self._here.packed
        return _shared_kernels.get(packed, key, lambda: make(packed.values))

    @property
    def weight(self) -> Tensor | None:
        """The current weight of this thread, None if it is gone."""
        packed: PackedWeight[Call, PackedKernel] = self._here.packed
        return packed.weight()

    @property
    def facts(self) -> WeightFacts:
        """Of the current weight of this thread."""
        packed: PackedWeight[Call, PackedKernel] = self._here.packed
        return packed.facts

    @property
    def nbytes(self) -> int:
        """Bytes of the packed forms of the current weight; of the dense one where only dense is used."""
        packed: PackedWeight[Call, PackedKernel] = self._here.packed
        taken = sum(kernel.nbytes for kernel in packed.kernels.values())
        return taken or packed.values.numel() * packed.values.element_size()

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
    "relu6": functional.relu6,
    "hardswish": functional.hardswish,
    "relu2": lambda value: functional.relu(value).square(),
}
"""What the dense form of a site applies, by the name that the op takes."""
