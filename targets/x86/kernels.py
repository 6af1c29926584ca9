"""Packed weights with their kernels on x86: what `X86Target.prepare` gives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from sparsecomp.kernels import gathered, panel, rows
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.kernels.quads import QuadShape
from sparsecomp.patterns import PanelWeight
from sparsecomp.patterns.gathered import GatherWeight, MaskWeight
from sparsecomp.patterns.quads import QuadWeight
from sparsecomp.runtime.launch import KernelSource, Launch, Weights, assembly_of, function_of
from sparsecomp.targets.base import Kernel, LinearCall
from sparsecomp.targets.cpu import schedules
from sparsecomp.targets.cpu.level import Level
from sparsecomp.targets.x86.cpu import caches

# Calls that are remembered; a stream of ever new lengths must not grow without bound.
_MAX_CALLS = 1024

_MASK_SPREADS: dict[str, gathered.MaskSchedule] = {
    "pshufb": gathered.MaskSchedule("pshufb"),
    "expand": gathered.MaskSchedule("expand"),
}


class X86Kernel(Kernel):
    """Common to all families: the variants that were built, and the call."""

    name: str

    def __init__(self, level: Level, shape: tuple[int, int], arrays: Sequence[npt.NDArray[Any]]) -> None:
        self._level = level
        self._shape = shape
        self._weights = Weights(arrays)
        self._no_bias = torch.zeros(shape[0])
        self._calls: dict[tuple[int, int, str, bool], LinearCall] = {}
        self._variants: dict[tuple[int, Epilogue], tuple[KernelSource, Any]] = {}
        self.nbytes = self._weights.nbytes

    @abstractmethod
    def _cut(self, tokens: int, threads: int) -> tuple[int, list[int], int, int]:
        """For a call: the variant of the kernel, `dims`, work items and floats of scratch per thread."""

    @abstractmethod
    def _schedule(self, variant: int) -> Any:
        """The schedule of a variant; its repr is part of the name of the compiled kernel."""

    @abstractmethod
    def _build(self, schedule: Any, epilogue: Epilogue) -> Any:
        """The kernel in TIR."""

    def run(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, out: Tensor) -> None:
        """See `Kernel.run`."""
        self.ready(x.shape[0], activation, residual is not None)(x, bias, residual, out)

    def ready(self, tokens: int, activation: str, residual: bool) -> LinearCall:
        """See `Kernel.ready`."""
        threads = torch.get_num_threads()
        key = (tokens, threads, activation, residual)
        call = self._calls.get(key)
        if call is None:
            variant, dims, items, scratch = self._cut(tokens, threads)
            function = self._function(variant, Epilogue(activation, residual))
            run, no_bias = Launch(function, self._weights, dims, items, threads, scratch).run, self._no_bias

            def call(x: Tensor, bias: Tensor | None, added: Tensor | None, out: Tensor) -> None:
                run(x, no_bias if bias is None else bias, added, out)

            if len(self._calls) >= _MAX_CALLS:
                self._calls.clear()
            self._calls[key] = call
        return call

    def build(self, tokens: int, activation: str, residual: bool) -> None:
        """See `Kernel.build`."""
        variant = self._cut(max(tokens, 1), torch.get_num_threads())[0]
        self._function(variant, Epilogue(activation, residual))

    def _function(self, variant: int, epilogue: Epilogue) -> Any:
        found = self._variants.get((variant, epilogue))
        if found is None:
            schedule = self._schedule(variant)
            build: Callable[[], Any] = lambda: self._build(schedule, epilogue)  # noqa: E731 -- a closure, built later
            source = KernelSource(self.name, f"{schedule!r} {epilogue!r}", build, self._level.tvm_target)
            found = self._variants[variant, epilogue] = (source, function_of(source))
        return found[1]

    @property
    def source(self) -> str:
        """Assembly of the variants that were used."""
        return "\n".join(assembly_of(source) for source, _ in self._variants.values())


class RowsKernel(X86Kernel):
    """Unstructured and N:M weights at several tokens."""

    name = "rows"

    def __init__(self, level: Level, weight: Tensor) -> None:
        shape = (weight.shape[0], weight.shape[1])
        packed = QuadWeight.pack(
            weight, **schedules.row_packing(level, shape, caches().l1, int(weight.count_nonzero()))
        )
        self._block, self._chunk = packed.block, packed.chunk
        super().__init__(level, shape, rows.weights(packed))

    def _cut(self, tokens: int, threads: int) -> tuple[int, list[int], int, int]:
        outputs, inputs = self._shape
        call = schedules.row_call(self._level, tokens, self._shape, threads)
        schedule = self._schedule(call.variant)
        blocks = -(-inputs // self._block)
        together = schedules.together(self._chunk, schedule.tile, caches().l2)
        dims = [tokens, inputs, outputs, blocks, self._block, self._block * schedule.tile]
        dims += [self._chunk, together, call.splits]
        return call.variant, dims, call.items, rows.scratch_floats(self._block, self._chunk, together, schedule)

    def _schedule(self, variant: int) -> QuadShape:
        return QuadShape(self._level.lanes, variant, schedules.spread(self._level))

    def _build(self, schedule: Any, epilogue: Epilogue) -> Any:
        return rows.build(schedule, epilogue)


class PanelKernel(X86Kernel):
    """Weights whose rows share their columns in panels of V."""

    name = "panel"

    def __init__(self, level: Level, weight: Tensor, v: int) -> None:
        packed = PanelWeight.pack(weight.detach().float(), v, signed_zeros=False)
        self._v = v
        super().__init__(level, packed.shape, panel.weights(packed, schedules.panel_width(level, v)))

    def _cut(self, tokens: int, threads: int) -> tuple[int, list[int], int, int]:
        outputs, inputs = self._shape
        call = schedules.panel_call(self._level, self._v, tokens, self._shape, threads)
        return call.variant, [tokens, inputs, outputs, call.group, call.splits], call.items, panel.SCRATCH_FLOATS

    def _schedule(self, variant: int) -> panel.PanelSchedule:
        return schedules.panel_schedule(self._level, self._v, variant)

    def _build(self, schedule: Any, epilogue: Epilogue) -> Any:
        return panel.build(schedule, epilogue)


class GatherKernel(X86Kernel):
    """One or a few tokens, 16-bit indices."""

    name = "gather"

    def __init__(self, level: Level, weight: Tensor) -> None:
        packed = GatherWeight.pack(weight, group=schedules.gather_schedule(level).group)
        super().__init__(level, packed.shape, gathered.gather_weights(packed))

    def _cut(self, tokens: int, threads: int) -> tuple[int, list[int], int, int]:
        outputs, inputs = self._shape
        return 0, [tokens, inputs, outputs], outputs, 0

    def _schedule(self, variant: int) -> gathered.GatherSchedule:
        return schedules.gather_schedule(self._level)

    def _build(self, schedule: Any, epilogue: Epilogue) -> Any:
        return gathered.build_gather(schedule, epilogue)


class MaskKernel(X86Kernel):
    """One or a few tokens, one bit per entry."""

    name = "mask"

    def __init__(self, level: Level, weight: Tensor) -> None:
        packed = MaskWeight.pack(weight)
        super().__init__(level, packed.shape, gathered.mask_weights(packed))

    def _cut(self, tokens: int, threads: int) -> tuple[int, list[int], int, int]:
        outputs, inputs = self._shape
        return 0, [tokens, inputs, outputs], outputs, 0

    def _schedule(self, variant: int) -> gathered.MaskSchedule:
        return _MASK_SPREADS[self._level.spread]

    def _build(self, schedule: Any, epilogue: Epilogue) -> Any:
        return gathered.build_mask(schedule, epilogue)
