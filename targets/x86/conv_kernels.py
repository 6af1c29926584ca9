"""The convolution kernels with their packed weights on x86: what `X86Target.prepare_conv` gives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecomp.kernels import conv, conv_open, conv_strips, depthwise_strips
from sparsecomp.kernels.conv_geometry import Geometry, table
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.patterns.quads import QuadWeight
from sparsecomp.runtime.launch import KernelSource, Launch, Weights, assembly_of, function_of
from sparsecomp.targets.base import ConvEpilogue, ConvKernel
from sparsecomp.targets.cpu import conv_schedules as schedules
from sparsecomp.targets.cpu import strip_schedules
from sparsecomp.targets.cpu.level import Level
from sparsecomp.targets.cpu.schedules import spread as weight_spread
from sparsecomp.targets.x86.cpu import caches
from sparsecomp.window import Maps, Window

# Calls that are remembered; a stream of ever new sizes must not grow without bound.
_MAX_CALLS = 256


class _Call:
    """A call made ready: launches of the kernel and, where the maps have to be opened first, one that does that."""

    def __init__(
        self, launches: Sequence[Launch], no_terms: Tensor, opening: Launch | None = None, opened: tuple[int, ...] = ()
    ) -> None:
        """Make it.

        Args:
            launches: of the kernel, each of a part of the output.
            no_terms: what stands for terms where there are none.
            opening: of the kernel that opens the maps.
            opened: shape of the opened maps.
        """
        self._launches, self._no_terms, self._opening, self._opened = launches, no_terms, opening, opened

    def __call__(self, x: Tensor, terms: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
        """See `ConvKernel.run`."""
        if self._opening is not None:
            opened = torch.empty(self._opened)
            self._opening.run(x, self._no_terms, None, opened)
            x = opened
        for launch in self._launches:
            launch.run(x, self._no_terms if terms is None else terms, residual, out)


class _X86Kernel(ConvKernel):
    """Common to both: the calls that were made ready, and the functions that were built."""

    def __init__(self, level: Level, window: Window, weights: Weights, outputs: int) -> None:
        self._level, self._window, self._weights = level, window, weights
        self._no_terms = torch.cat([torch.zeros(outputs), torch.ones(outputs)])
        self._calls: dict[tuple[Maps, int, ConvEpilogue, bool], _Call] = {}
        self._sources: dict[str, tuple[KernelSource, Any]] = {}
        self.nbytes = weights.nbytes

    @abstractmethod
    def _make(self, maps: Maps, epilogue: ConvEpilogue, residual: bool) -> _Call:
        """Make a call ready."""

    def run(
        self, x: Tensor, terms: Tensor | None, residual: Tensor | None, epilogue: ConvEpilogue, out: Tensor
    ) -> None:
        """See `ConvKernel.run`."""
        self.ready(Maps(x.shape[0], x.shape[2], x.shape[3]), epilogue, residual is not None)(x, terms, residual, out)

    def ready(self, maps: Maps, epilogue: ConvEpilogue, residual: bool) -> _Call:
        """See `ConvKernel.ready`."""
        key = (maps, torch.get_num_threads(), epilogue, residual)
        call = self._calls.get(key)
        if call is None:
            if len(self._calls) >= _MAX_CALLS:
                self._calls.clear()
            call = self._calls[key] = self._make(maps, epilogue, residual)
        return call

    def build(self, maps: Maps, epilogue: ConvEpilogue, residual: bool) -> None:
        """See `ConvKernel.build`."""
        if maps.positions(self._window):
            self.ready(maps, epilogue, residual)

    def _function(self, name: str, identity: str, build: Any) -> Any:
        key = f"{name} {identity}"
        if key not in self._sources:
            source = KernelSource(name, identity, build, self._level.tvm_target)
            self._sources[key] = (source, function_of(source))
        return self._sources[key][1]

    @property
    def source(self) -> str:
        """Assembly of the variants that were used."""
        return "\n".join(assembly_of(source) for source, _ in self._sources.values())


class X86ConvKernel(_X86Kernel):
    """Unstructured weights of convolutions, for tiles of at most so many vectors."""

    def __init__(self, level: Level, weight: Tensor, window: Window, vectors: int) -> None:
        self._vectors, self._channels = vectors, weight.shape[1]
        matrix = weight.detach().flatten(1)
        shape = (matrix.shape[0], matrix.shape[1])
        nonzeros = int(matrix.count_nonzero())
        packing = schedules.packing(level, shape, window.groups, vectors, caches().l1, nonzeros)
        packed = QuadWeight.pack(matrix, **packing)
        super().__init__(level, window, Weights(conv.weights(packed, table(window, self._channels))), shape[0])
        self._sizes = conv.weight_sizes(packed, window)
        self._uses = schedules.uses(shape, window.groups, nonzeros)

    def _make(self, maps: Maps, epilogue: ConvEpilogue, residual: bool) -> _Call:
        window, threads = self._window, torch.get_num_threads()
        geometry = Geometry.of(window, maps)
        rows = (self._sizes["group_rows"], window.groups)
        packed = (self._vectors, self._sizes["block"], self._uses)
        cut = schedules.call(self._level, geometry, maps.images, rows, packed, threads, caches(), tails=True)
        after = Epilogue(epilogue.activation, residual, epilogue.residual_first)
        launches = [self._launch(part, geometry, maps.images, after, threads) for part in cut.parts]
        channels = self._channels * window.groups
        opened = (maps.images, channels * len(geometry.phases), geometry.rows, geometry.pitch)
        opening = self._opening(maps, geometry, channels, threads) if geometry.opened else None
        return _Call(launches, self._no_terms, opening, opened)

    def _launch(
        self, cut: schedules.ConvCall, geometry: Geometry, images: int, after: Epilogue, threads: int
    ) -> Launch:
        form = (cut.vectors, weight_spread(self._level), geometry.masked, cut.whole, cut.direct)
        schedule = conv.ConvSchedule(self._level.lanes, *form)
        function = self._function("conv", f"{schedule!r} {after!r}", lambda: conv.build(schedule, after))
        cuts = (self._window.groups, cut.splits, cut.image_tiles, cut.skip)
        dims = conv.dims(schedule, self._sizes, geometry, images, cuts)
        scratch = conv.scratch_floats(schedule, self._sizes, cut.splits)
        return Launch(function, self._weights, dims, cut.items, threads, scratch)

    def _opening(self, maps: Maps, geometry: Geometry, channels: int, threads: int) -> Launch:
        stride = self._window.stride[1]
        schedule = conv_open.OpenSchedule(self._level.lanes, stride if stride <= 2 else 0)
        function = self._function("conv_open", repr(schedule), lambda: conv_open.build(schedule))
        weights = Weights([np.array(geometry.phases, np.int32)])
        dims = conv_open.dims(self._window, maps, geometry)
        return Launch(function, weights, dims, maps.images * channels, threads, 0)


class X86StripsKernel(_X86Kernel):
    """Unstructured weights of convolutions, for tiles of at most so many rows."""

    def __init__(self, level: Level, weight: Tensor, window: Window, vectors: int) -> None:
        weight = weight.detach().reshape(*weight.shape[:2], *window.kernel)
        shape = (weight.shape[0], weight.shape[1] * window.taps)
        nonzeros = int(weight.count_nonzero())
        found = strip_schedules.packing(level, shape, window, vectors, caches().l1, nonzeros)
        if found is None:
            raise ValueError(f"there is no kernel in strips for a window {window}")
        matrix = conv_strips.arrange(weight, window, found.block, found.pitch)
        blocks = -(-weight.shape[1] // found.block)
        packed = QuadWeight.pack(matrix, chunk=found.chunk, block=matrix.shape[1] // blocks, groups=window.groups)
        super().__init__(level, window, Weights(conv_strips.weights(packed)), shape[0])
        self._vectors, self._pitch = vectors, found.pitch
        self._sizes = conv_strips.sizes_of(packed, weight.shape[1], found.block)

    def _make(self, maps: Maps, epilogue: ConvEpilogue, residual: bool) -> _Call:
        window, threads, level = self._window, torch.get_num_threads(), self._level
        cut = strip_schedules.call(level, window, maps, self._sizes["group_rows"], self._vectors, threads, caches())
        piece = strip_schedules.piece(level, window.output(maps.height, maps.width)[1])
        form = (piece, self._pitch, window.kernel, window.stride, window.dilation)
        schedule = conv_strips.StripSchedule(level.lanes, cut.vectors, weight_spread(level), *form)
        after = Epilogue(epilogue.activation, residual, epilogue.residual_first)
        function = self._function("conv_strips", f"{schedule!r} {after!r}", lambda: conv_strips.build(schedule, after))
        dims = conv_strips.dims(schedule, self._sizes, window, maps, cut.splits)
        scratch = conv_strips.scratch_floats(schedule, self._sizes, cut.splits)
        return _Call([Launch(function, self._weights, dims, cut.items, threads, scratch)], self._no_terms)


class X86DepthwiseKernel(_X86Kernel):
    """Dense depthwise convolutions, channels first; without a weight max pooling of so many channels."""

    def __init__(self, level: Level, weight: Tensor | None, window: Window) -> None:
        self._outputs, self._largest = window.groups if weight is None else weight.shape[0], weight is None
        values = torch.zeros(1) if weight is None else weight.detach().to(torch.float32).flatten(1).contiguous()
        super().__init__(level, window, Weights([values.numpy()]), self._outputs)

    def _make(self, maps: Maps, epilogue: ConvEpilogue, residual: bool) -> _Call:
        window, threads = self._window, torch.get_num_threads()
        schedule = strip_schedules.depthwise(self._level, window, maps, largest=self._largest)
        after = Epilogue(epilogue.activation, residual, epilogue.residual_first)
        function = self._function(
            "depthwise", f"{schedule!r} {after!r}", lambda: depthwise_strips.build(schedule, after)
        )
        dims = depthwise_strips.dims(window, maps, self._outputs)
        scratch = depthwise_strips.scratch_floats(schedule)
        launch = Launch(function, self._weights, dims, maps.images * self._outputs, threads, scratch)
        return _Call([launch], self._no_terms)
