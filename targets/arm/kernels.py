"""Packed weights and how a call is cut on ARM: a kernel with its arrays and sizes, ready to be written to a package.

The kernels are those of `sparsecomp.kernels` with four lanes. Weights are loaded four at a time: AArch64 multiplies by
one lane of a register, so that spreading a weight over a vector costs no instruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparsecomp.kernels import conv, conv_open, depthwise, panel, rows
from sparsecomp.kernels.conv_geometry import Geometry, table
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.kernels.quads import HalfShape, QuadShape
from sparsecomp.patterns import PanelWeight
from sparsecomp.patterns.quads import QuadWeight
from sparsecomp.runtime.launch import KernelSource
from sparsecomp.targets.arm.cpu import LANES, ROW_VECTORS, ArmLevel
from sparsecomp.targets.base import Candidate
from sparsecomp.targets.cpu import conv_schedules, schedules
from sparsecomp.targets.cpu.level import Caches
from sparsecomp.window import Maps, Window

PANEL_TILES = {4: (1, 2, 4, 8, 16), 8: (1, 2, 4, 8, 12), 16: (1, 2, 4, 6)}
"""For each number of rows of a panel the numbers of tokens of its register tile: at most 24 sums."""
DENSE_V = 16
"""Rows of a panel of a dense weight."""
HALF = "rows_half"
"""The row kernel with weights, activations and the sums over a block of columns in float16."""
CONV_HALF = "conv_half"
"""The convolution kernel with weights, packed input and the sums over a block of columns in float16."""
SVE = "rows_sve"
"""The row kernel in SVE of 256 bits: LLVM takes vectors of eight lanes as such where it is told the length."""
ROW_KERNELS = ("rows", HALF, SVE)
_SVE_256 = "-aarch64-sve-vector-bits-min:uint=256"
_SPREAD = "shuffle"

Arrays = tuple[npt.NDArray[Any], ...]


@dataclass(frozen=True)
class Call:
    """A kernel with everything that a call passes beside x, bias, residual and y.

    Attributes:
        source: of the kernel.
        arrays: `w0` to `w3`, as many as it takes.
        dims: the sizes that it reads; of a linear the first is the tokens.
        items: work items, which threads share.
        scratch_floats: of each thread.
        step: of a linear the tokens of an item: fewer tokens make fewer items of the same size. 0 for a convolution,
            whose call is for its number of images alone.
    """

    source: KernelSource
    arrays: Arrays
    dims: tuple[int, ...]
    items: int
    scratch_floats: int
    step: int = 0


@dataclass(frozen=True)
class SiteCall:
    """A site: the call of its kernel and, where maps have to be taken apart for it, the call that does.

    Attributes:
        call: of the kernel.
        opening: reads x and writes what the kernel reads; None for none.
        opened_floats: that it writes.
    """

    call: Call
    opening: Call | None = None
    opened_floats: int = 0


def panel_schedule(v: int, tokens: int) -> panel.PanelSchedule:
    """The register tile of panels of `v` rows with so many tokens."""
    vectors = min(4, v // LANES)
    return panel.PanelSchedule(v, LANES, vectors, tokens, min(v, vectors * LANES))


def row_schedule(vectors: int, kernel: str = "rows") -> QuadShape:
    """The register tile of a quad with so many vectors of tokens, for one of the row kernels."""
    if kernel == HALF:
        return HalfShape(2 * LANES, vectors, _SPREAD)
    return QuadShape(2 * LANES, vectors, "load") if kernel == SVE else QuadShape(LANES, vectors, _SPREAD)


def row_level(level: ArmLevel, kernel: str) -> ArmLevel:
    """The numbers that calls of a row kernel are cut by, and the target that it is compiled for."""
    if kernel == SVE:
        return replace(level, lanes=2 * LANES, options=(_SVE_256,))
    return replace(level, lanes=2 * LANES) if kernel == HALF else level


def panel_tile(v: int, tokens: int) -> int:
    """Tokens of the register tile with the least work; weights and column numbers cost about as much as a token."""
    return min(PANEL_TILES[v], key=lambda t: (math.ceil(tokens / t) * (t + 1), -t))


@dataclass(frozen=True)
class LinearWeight:
    """A weight `[O, I]` of a linear, packed for a kernel; its calls are cut for any number of tokens.

    Attributes:
        level: of the schedules.
        shape: O and I.
        sizes: of the packing: `block`, `blocks` and `chunk` of quads, or `v` of panels.
        arrays: as the kernel takes them: quads, or panels, of which a dense weight keeps all columns.
        kernel: of the candidate.
    """

    level: ArmLevel
    shape: tuple[int, int]
    sizes: dict[str, int]
    arrays: Arrays
    kernel: str
    l2: int

    @classmethod
    def pack(cls, level: ArmLevel, caches: Caches, candidate: Candidate, weight: Tensor) -> LinearWeight:
        """Pack a weight `[O, I]` for a candidate: `dense`, `rows`, `rows_half`, `rows_sve` or `panel`.

        Raises:
            ValueError: there is no such kernel, or the weight has values that float16 cannot hold.
        """
        shape = int(weight.shape[0]), int(weight.shape[1])
        kernel = candidate.kernel
        if kernel in ROW_KERNELS:
            packing = schedules.row_packing(row_level(level, kernel), shape, caches.l1, int(weight.count_nonzero()))
            quads = QuadWeight.pack(weight, **packing)
            values, *others = rows.weights(quads)
            if kernel == HALF:
                values = _narrowed(values)
            sizes = {"block": quads.block, "blocks": quads.blocks, "chunk": quads.chunk}
            return cls(level, shape, sizes, (values, *others), kernel, caches.l2)
        if kernel not in ("dense", "panel"):
            raise ValueError(f"there is no ARM kernel {kernel!r}")
        v = DENSE_V if candidate.is_dense else dict(candidate.params)["v"]
        weight = weight.detach().float()
        full = candidate.is_dense
        panels = PanelWeight.full(weight, v) if full else PanelWeight.pack(weight, v, signed_zeros=False)
        # The stored width of a panel is the same for all tiles.
        return cls(level, shape, {"v": v}, tuple(panel.weights(panels, panel_schedule(v, 1).width)), kernel, caches.l2)

    def call(self, tokens: int, threads: int, epilogue: Epilogue) -> SiteCall:
        """Cut a call.

        Raises:
            ValueError: x or y is larger than 32-bit numbers address.
        """
        outputs, inputs = self.shape
        if tokens * max(self.shape) >= 2**31:
            raise ValueError(f"{tokens} tokens of {max(self.shape)} values are more than 32-bit numbers address")
        if self.kernel in ROW_KERNELS:
            return self._rows(tokens, threads, epilogue)
        v = self.sizes["v"]
        tile = panel_tile(v, tokens)
        schedule = panel_schedule(v, tile)
        cut = schedules.panel_cut(tile, tokens, math.ceil(outputs / v), threads)
        dims = (tokens, inputs, outputs, cut.group, cut.splits)
        source = source_of(self.level, f"panel_{v}_{tile}", schedule, epilogue, lambda: panel.build(schedule, epilogue))
        return SiteCall(Call(source, self.arrays, dims, cut.items, panel.SCRATCH_FLOATS, cut.group))

    def _rows(self, tokens: int, threads: int, epilogue: Epilogue) -> SiteCall:
        level = row_level(self.level, self.kernel)
        cut = schedules.row_call(level, tokens, self.shape, threads)
        shape = row_schedule(cut.variant, self.kernel)
        block, blocks, chunk = self.sizes["block"], self.sizes["blocks"], self.sizes["chunk"]
        together = schedules.together(chunk, shape.tile, self.l2)
        dims = (tokens, self.shape[1], self.shape[0], blocks, block, block * shape.tile, chunk, together, cut.splits)
        scratch = rows.scratch_floats(block, chunk, together, shape)
        source = source_of(level, f"{self.kernel}_{cut.variant}", shape, epilogue, lambda: rows.build(shape, epilogue))
        return SiteCall(Call(source, self.arrays, dims, cut.items, scratch, shape.tile))


def _narrowed(values: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    largest = float(np.abs(values).max(initial=0))
    if not largest <= float(np.finfo(np.float16).max):
        raise ValueError(f"a weight of {largest:g} is more than float16 holds; leave the dtype float32")
    return values.astype(np.float16)


@dataclass(frozen=True)
class ConvWeight:
    """A weight `[O, I / groups, *kernel]` of a convolution, packed; zeros are left out.

    Attributes:
        level: of the schedules.
        caches: that calls are cut for.
        window: of the convolution.
        channels: I / groups.
        sizes: see `conv.weight_sizes`.
        uses: see `conv_schedules.uses`.
        arrays: as the kernel takes them.
        half: whether the kernel is `conv_half`.
    """

    level: ArmLevel
    caches: Caches
    window: Window
    channels: int
    sizes: dict[str, int]
    uses: float
    arrays: Arrays
    half: bool = False

    @classmethod
    def pack(cls, level: ArmLevel, caches: Caches, weight: Tensor, window: Window, *, half: bool = False) -> ConvWeight:
        """Pack a weight.

        Raises:
            ValueError: the weight has values that float16 cannot hold, and is to be in it.
        """
        level = row_level(level, HALF) if half else level
        matrix = weight.detach().float().flatten(1)
        shape = int(matrix.shape[0]), int(matrix.shape[1])
        nonzeros = int(matrix.count_nonzero())
        packing = conv_schedules.packing(level, shape, window.groups, ROW_VECTORS, caches.l1, nonzeros)
        packed, channels = QuadWeight.pack(matrix, **packing), int(weight.shape[1])
        values, *others = conv.weights(packed, table(window, channels))
        arrays = (_narrowed(values) if half else values, *others)
        uses = conv_schedules.uses(shape, window.groups, nonzeros)
        return cls(level, caches, window, channels, conv.weight_sizes(packed, window), uses, arrays, half)

    def call(self, maps: Maps, threads: int, epilogue: Epilogue) -> SiteCall:
        """Cut a call.

        Raises:
            ValueError: the maps are larger than 32-bit numbers address.
        """
        window, level, sizes = self.window, self.level, self.sizes
        geometry = Geometry.of(window, maps)
        rows_groups = (sizes["group_rows"], window.groups)
        packed_for = (ROW_VECTORS, sizes["block"], self.uses)
        cut = conv_schedules.call(level, geometry, maps.images, rows_groups, packed_for, threads, self.caches)
        if self.half:
            schedule: conv.ConvSchedule = conv.HalfConvSchedule(
                level.lanes, cut.vectors, _SPREAD, geometry.masked, cut.whole, direct=False
            )
        else:
            schedule = conv.ConvSchedule(LANES, cut.vectors, _SPREAD, geometry.masked, cut.whole, cut.direct)
        dims = conv.dims(schedule, sizes, geometry, maps.images, (window.groups, cut.splits, cut.image_tiles, 0))
        scratch = conv.scratch_floats(schedule, sizes, cut.splits)
        name = f"{CONV_HALF if self.half else 'conv'}_{schedule.label}"
        source = source_of(level, name, schedule, epilogue, lambda: conv.build(schedule, epilogue))
        call = Call(source, self.arrays, tuple(dims), cut.items, scratch)
        if not geometry.opened:
            return SiteCall(call)
        stride = window.stride[1]
        opening = conv_open.OpenSchedule(LANES, stride if stride <= 2 else 0)
        name = f"conv_open_{opening.step}"
        source = KernelSource(name, repr(opening), lambda: conv_open.build(opening), level.tvm_target)
        phases = (np.array(geometry.phases, np.int32),)
        open_dims = tuple(conv_open.dims(window, maps, geometry))
        channels = self.channels * window.groups
        opened = Call(source, phases, open_dims, maps.images * channels, 0)
        planes = channels * len(geometry.phases)
        return SiteCall(call, opened, maps.images * planes * geometry.rows * geometry.pitch)


@dataclass(frozen=True)
class DepthwiseWeight:
    """A weight `[O, 1, *kernel]` of a depthwise convolution, dense.

    Attributes:
        level: of the schedules.
        window: of the convolution.
        values: float32 `[O, taps]`.
    """

    level: ArmLevel
    window: Window
    values: npt.NDArray[np.float32]

    @classmethod
    def pack(cls, level: ArmLevel, weight: Tensor, window: Window) -> DepthwiseWeight:
        """Pack a weight."""
        return cls(level, window, weight.detach().float().flatten(1).contiguous().numpy())

    def call(self, maps: Maps, threads: int, epilogue: Epilogue) -> SiteCall:
        """Cut a call, alike for any number of threads."""
        level, window, outputs = self.level, self.window, self.values.shape[0]
        layout = depthwise.Layout.of(window, maps)
        schedule = conv_schedules.depthwise_schedule(level, layout, window, maps)
        name = f"depthwise_{schedule.vectors}_{schedule.step}"
        source = source_of(level, name, schedule, epilogue, lambda: depthwise.build(schedule, epilogue))
        dims = tuple(depthwise.dims(schedule, layout, window, maps, outputs))
        scratch = depthwise.scratch_floats(schedule, layout, window.output(maps.height, maps.width)[0])
        arrays = (self.values, layout.distances, layout.phases)
        return SiteCall(Call(source, arrays, dims, maps.images * outputs, scratch))


def pack_conv(
    level: ArmLevel, caches: Caches, weight: Tensor, window: Window, *, half: bool = False
) -> ConvWeight | DepthwiseWeight:
    """Pack a weight `[O, I / groups, *kernel]` of a convolution; zeros are left out, if it is not a depthwise one.

    Raises:
        ValueError: it is to be in float16 and has values that this cannot hold.
    """
    if window.is_depthwise(int(weight.flatten(1).shape[1])):
        return DepthwiseWeight.pack(level, weight, window)
    return ConvWeight.pack(level, caches, weight, window, half=half)


def source_of(level: ArmLevel, name: str, schedule: Any, epilogue: Epilogue, build: Any) -> KernelSource:
    """A kernel to build, named after its schedule and what follows its sums."""
    order = "_first" if epilogue.residual_first else ""
    name = f"{name}_{epilogue.activation}{'_residual' * epilogue.residual}{order}"
    return KernelSource(name, f"{schedule!r} {epilogue!r}", build, level.tvm_target)


def sources_of(calls: Iterable[SiteCall]) -> list[KernelSource]:
    """The kernels of calls, each name once."""
    found = {call.source.name: call.source for site in calls for call in (site.opening, site.call) if call is not None}
    return list(found.values())
