"""A rewritten linear at run time: its packed weight, the kernel for each number of tokens, and the op that calls it."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.log import log
from sparsecomp.targets.base import DENSE, Candidate, Kernel, Target, WeightFacts

Chooser = Callable[[WeightFacts, int], Candidate]

_handles = itertools.count(1)
_sites: weakref.WeakValueDictionary[int, RuntimeSite] = weakref.WeakValueDictionary()
# Numbers of tokens whose choice is remembered; a stream of ever new lengths must not grow without bound.
_MAX_CHOICES = 4096


class RuntimeSite:
    """A linear whose weight is constant but for changes in place.

    The op looks it up by its handle in a weak table, so whoever compiled the graph keeps it alive.

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
        self._load(weight)
        self.handle = next(_handles)
        _sites[self.handle] = self

    def _load(self, weight: Tensor) -> None:
        self._weight = weakref.ref(weight)
        self._stamp = _stamp(weight)
        self._matrix = weight.detach().t() if self._transposed else weight.detach()
        self._facts = WeightFacts.of(self._matrix)
        self._kernels: dict[Candidate, Kernel] = {}
        self._choices: dict[int, Kernel | None] = {}
        self._zero_bias: Tensor | None = None

    def refresh(self, weight: Tensor) -> None:
        """Pack anew if the weight is another tensor or was changed in place; costs two comparisons if not."""
        if self._weight() is weight and self._stamp == _stamp(weight):
            return
        with self._lock, torch.no_grad():
            if self._weight() is weight and self._stamp == _stamp(weight):
                return  # another thread was faster
            log.info("site %s: the weight changed, it is packed anew", self.name)
            self._load(weight)

    def prepare(self, tokens: int) -> None:
        """Pack and build for a number of tokens now.

        Raises:
            BuildError: a kernel could not be built here.
        """
        with self._lock:
            self._choose(tokens)

    def _choose(self, tokens: int) -> Kernel | None:
        candidate = self._chooser(self._facts, tokens)
        kernel = None
        if not candidate.is_dense:
            kernel = self._kernels.get(candidate)
            if kernel is None:
                kernel = self._kernels[candidate] = self._target.prepare(candidate, self._matrix)
        if len(self._choices) >= _MAX_CHOICES:
            self._choices.clear()
        self._choices[tokens] = kernel
        return kernel

    def run(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """`activation(x @ W.T + bias) + residual` for x of `[..., I]`; the result is contiguous, of x's type."""
        outputs, inputs = self._facts.out_features, self._facts.in_features
        shape = (*x.shape[:-1], outputs)
        tokens = x.numel() // inputs if inputs else 0
        try:
            kernel = self._choices[tokens]
        except KeyError:
            with self._lock:
                kernel = self._choose(tokens)
        if kernel is None or tokens == 0:
            return self._dense(x, bias, residual)
        flat = x.reshape(tokens, inputs)
        if flat.dtype != torch.float32:
            flat = flat.float()
        if residual is not None:
            residual = residual.reshape(tokens, outputs).to(torch.float32).contiguous()
        out = torch.empty(tokens, outputs)
        bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
        kernel.run(flat.contiguous(), bias, residual, self._activation, out)
        return out.reshape(shape).to(x.dtype)

    def _dense(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        value = _ACTIVATIONS[self._activation](functional.linear(x, self._matrix, bias))
        value = value if residual is None else value + residual
        return value.contiguous()

    @property
    def facts(self) -> WeightFacts:
        """Of the weight as it is packed now."""
        return self._facts

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights; of the dense one where only dense is used."""
        packed = sum(kernel.nbytes for kernel in self._kernels.values())
        return packed or self._matrix.numel() * self._matrix.element_size()

    @property
    def source(self) -> str:
        """The generated code of its kernels, for people."""
        return "\n".join(f"; {candidate}\n{kernel.source}" for candidate, kernel in self._kernels.items()) or str(DENSE)


def _stamp(weight: Tensor) -> tuple[int, int]:
    """Changes with every write through torch, and when the storage is swapped (`weight.data = ...`)."""
    return weight._version, weight.data_ptr()


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda value: value,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda value: functional.gelu(value, approximate="tanh"),
    "silu": functional.silu,
}

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
        raise RuntimeError(f"sparsecomp::linear was called for site {site}, which was released: compile the model again")
    return found.run(x, bias, residual)


def _linear_meta(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, site: int, out_features: int, activation: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


_library.impl("linear", _linear, "CPU")
_library.impl("linear", _linear_meta, "Meta")
