"""An ARM CPU that PyTorch runs on: the kernels of `ArmTarget`, called through the launcher."""

from __future__ import annotations

import platform
from collections.abc import Collection, Hashable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.patterns import Pattern
from sparsecomp.runtime.launch import KernelSource, Launch, Weights, assembly_of, function_of
from sparsecomp.targets.arm.cpu import LANES, MACHINES, ArmCpu, ArmLevel, cpu, cpu_names, this_cpu, unfit
from sparsecomp.targets.arm.kernels import Call, ConvWeight, DepthwiseWeight, LinearWeight, SiteCall, pack_conv
from sparsecomp.targets.arm.target import ArmTarget
from sparsecomp.targets.base import (
    DENSE,
    DEPTHWISE,
    Candidate,
    ConvEpilogue,
    ConvKernel,
    Kernel,
    Problem,
    WeightFacts,
)
from sparsecomp.window import Maps, Window

# Calls that are remembered; a stream of ever new sizes must not grow without bound.
_MAX_CALLS = 512
_MOVED = 2.0
"""Cycles of a vector of values that changes its layout: one load and one store of it, and shuffles between."""


def names() -> tuple[str, ...]:
    """The targets of this family."""
    return ("arm", *(f"arm:{name}" for name in cpu_names()))


def create(name: str) -> ArmTarget:
    """The target of a name, such as `arm:cortex-a76`: `arm` is this machine's CPU.

    Raises:
        ValueError: this machine is no ARM machine, and no CPU is named.
    """
    _, _, cpu_name = name.partition(":")
    if not cpu_name and platform.machine() not in MACHINES:
        raise ValueError(
            f"target 'arm' is the CPU of an ARM machine, and this is {platform.machine()}: name one, such as "
            f"{names()[1]!r}"
        )
    chosen = cpu(cpu_name) if cpu_name else this_cpu()
    return ArmTarget(chosen) if unfit(chosen) else ArmMachine(chosen, chosen.level)


class ArmMachine(ArmTarget):
    """The CPU of this machine, or one like it."""

    calibration = "torch"
    cautions: Mapping[str, float] = {**ArmTarget.cautions, "depthwise": 1.25}

    def __init__(self, chosen: ArmCpu, level: ArmLevel) -> None:
        """Make it.

        Args:
            chosen: that gives the prices.
            level: that kernels are built for; this machine runs it.
        """
        super().__init__(chosen)
        self._level = level

    def why_not_here(self) -> str | None:
        """See `Target.why_not_here`."""
        return None

    def conv_candidates(
        self, facts: WeightFacts, window: Window, allowed: Collection[str] | None = None
    ) -> list[Candidate]:
        """See `Target.conv_candidates`."""
        if window.is_depthwise(facts.in_features):
            return [DENSE, DEPTHWISE]
        return super().conv_candidates(facts, window, allowed)

    def family(self, candidate: Candidate, problem: Problem) -> str:
        """See `ArmTarget.family`; dense is PyTorch's, also of depthwise convolutions."""
        ours = super().family(candidate, problem)
        return "dense_depthwise" if candidate.is_dense and ours == "depthwise" else ours

    def layout_us(self, values: int, threads: int) -> float:
        """See `Target.layout_us`."""
        moved = max(values / LANES * _MOVED / self.cpu.ghz / threads, 8 * values / self.cpu.bandwidth)
        return moved / 1e3

    def prepare(self, candidate: Candidate, weight: Tensor) -> Kernel:
        """See `Target.prepare`."""
        _check(candidate, weight)
        return ArmKernel(LinearWeight.pack(self._level, self.cpu.caches, candidate, weight))

    def prepare_conv(self, candidate: Candidate, weight: Tensor, window: Window) -> ConvKernel:
        """See `Target.prepare_conv`."""
        if candidate.kernel not in ("conv", "depthwise"):
            return super().prepare_conv(candidate, weight, window)
        _check(candidate, weight.flatten(1))
        return ArmConvKernel(pack_conv(self._level, self.cpu.caches, weight, window), int(weight.shape[0]))


def _check(candidate: Candidate, matrix: Tensor) -> None:
    # Every weight is unstructured, and dense: nothing has to be looked at.
    if candidate.pattern not in ("unstructured", "dense") and not Pattern.parse(candidate.pattern).check(matrix):
        raise ValueError(f"the weight {tuple(matrix.shape)} does not satisfy the pattern of {candidate}")


class _Launches:
    """Calls that were made ready, and the kernels that they run."""

    def __init__(self) -> None:
        self._ready: dict[Hashable, tuple[Launch, Launch | None, int]] = {}
        self._sources: dict[str, KernelSource] = {}

    def find(self, key: Hashable) -> tuple[Launch, Launch | None, int] | None:
        """The launch of a call, that of its opening, and the floats that this writes; None if it was not made yet."""
        return self._ready.get(key)

    def make(self, key: Hashable, call: SiteCall, weights: Weights | None) -> tuple[Launch, Launch | None, int]:
        """Make a call ready; its arrays are the given ones, or its own."""
        threads = torch.get_num_threads()
        opening = None if call.opening is None else self._launch(call.opening, None, threads)
        ready = self._launch(call.call, weights, threads), opening, call.opened_floats
        if len(self._ready) >= _MAX_CALLS:
            self._ready.clear()
        self._ready[key] = ready
        return ready

    def _launch(self, call: Call, weights: Weights | None, threads: int) -> Launch:
        self._sources[call.source.name] = call.source
        held = Weights(call.arrays) if weights is None else weights
        return Launch(function_of(call.source), held, call.dims, call.items, threads, call.scratch_floats)

    @property
    def source(self) -> str:
        """Assembly of the kernels that were used."""
        return "\n".join(assembly_of(source) for source in self._sources.values())


class ArmKernel(Kernel):
    """A weight of a linear."""

    def __init__(self, weight: LinearWeight) -> None:
        # The aligned copy is what kernels read.
        self._weight, self._weights = replace(weight, arrays=()), Weights(weight.arrays)
        self._no_bias = torch.zeros(weight.shape[0])
        self._launches = _Launches()
        self.nbytes = self._weights.nbytes

    def run(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, out: Tensor) -> None:
        """See `Kernel.run`."""
        launch = self._ready(x.shape[0], activation, residual is not None)
        launch.run(x, self._no_bias if bias is None else bias, residual, out)

    def build(self, tokens: int, activation: str, residual: bool) -> None:
        """See `Kernel.build`."""
        self._ready(max(tokens, 1), activation, residual)

    def _ready(self, tokens: int, activation: str, residual: bool) -> Launch:
        threads = torch.get_num_threads()
        key = (tokens, threads, activation, residual)
        ready = self._launches.find(key)
        if ready is None:
            call = self._weight.call(tokens, threads, Epilogue(activation, residual))
            ready = self._launches.make(key, call, self._weights)
        return ready[0]

    @property
    def source(self) -> str:
        """See `Kernel.source`."""
        return self._launches.source


class ArmConvKernel(ConvKernel):
    """A weight of a convolution."""

    def __init__(self, weight: ConvWeight | DepthwiseWeight, outputs: int) -> None:
        self._weight: ConvWeight | DepthwiseWeight = weight
        self._weights: Weights | None = None  # what a depthwise kernel reads beside its weight depends on the maps
        if isinstance(weight, ConvWeight):
            self._weight, self._weights = replace(weight, arrays=()), Weights(weight.arrays)
            self.nbytes = self._weights.nbytes
        else:
            self.nbytes = weight.values.nbytes
        self._no_terms = torch.cat([torch.zeros(outputs), torch.ones(outputs)])
        self._launches = _Launches()

    def run(
        self, x: Tensor, terms: Tensor | None, residual: Tensor | None, epilogue: ConvEpilogue, out: Tensor
    ) -> None:
        """See `ConvKernel.run`."""
        launch, opening, floats = self._ready(Maps(x.shape[0], x.shape[2], x.shape[3]), epilogue, residual is not None)
        if opening is not None:
            opened = torch.empty(floats)
            opening.run(x, self._no_terms, None, opened)
            x = opened
        launch.run(x, self._no_terms if terms is None else terms, residual, out)

    def build(self, maps: Maps, epilogue: ConvEpilogue, residual: bool) -> None:
        """See `ConvKernel.build`."""
        if maps.positions(self._weight.window):
            self._ready(maps, epilogue, residual)

    def _ready(self, maps: Maps, epilogue: ConvEpilogue, residual: bool) -> tuple[Launch, Launch | None, int]:
        threads = torch.get_num_threads()
        key = (maps, threads, epilogue, residual)
        if (ready := self._launches.find(key)) is not None:
            return ready
        after = Epilogue(epilogue.activation, residual, epilogue.residual_first)
        return self._launches.make(key, self._weight.call(maps, threads, after), self._weights)

    @property
    def source(self) -> str:
        """See `ConvKernel.source`."""
        return self._launches.source
