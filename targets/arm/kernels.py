"""Packed weights and how a call is cut on ARM: a kernel with its arrays and sizes, ready to be written to a package.

The kernels are those of `sparsecomp.kernels` with four lanes. Weights are loaded four at a time: AArch64 multiplies by
one lane of a register, so that spreading a weight over a vector costs no instruction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparsecomp.kernels import conv, depthwise, panel, rows
from sparsecomp.kernels.conv_geometry import Geometry, table
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.kernels.quads import QuadShape
from sparsecomp.patterns import PanelWeight
from sparsecomp.patterns.quads import QuadWeight
from sparsecomp.runtime.launch import KernelSource
from sparsecomp.targets.arm.cpu import LANES, ROW_VECTORS, ArmLevel
from sparsecomp.targets.base import Candidate
from sparsecomp.targets.x86 import conv_schedules, schedules
from sparsecomp.targets.x86.cpu import Caches
from sparsecomp.window import Maps, Window

PANEL_TILES = {4: (1, 2, 4, 8, 16), 8: (1, 2, 4, 8, 12), 16: (1, 2, 4, 6)}
"""For each number of rows of a panel the numbers of tokens of its register tile: at most 24 sums."""
DENSE_V = 16
"""Rows of a panel of a dense weight."""
_SPREAD = "shuffle"

Arrays = tuple[npt.NDArray[Any], ...]


@dataclass(frozen=True)
class Call:
    """A kernel with everything that a call passes beside x, bias, residual and y.

    Attributes:
        source: of the kernel.
        arrays: `w0` to `w3`, as many as it takes.
        dims: the sizes that it reads.
        items: work items, which threads share.
        scratch_floats: of each thread.
    """

    source: KernelSource
    arrays: Arrays
    dims: tuple[int, ...]
    items: int
    scratch_floats: int


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


def row_schedule(vectors: int) -> QuadShape:
    """The register tile of a quad with so many vectors of tokens."""
    return QuadShape(LANES, vectors, _SPREAD)


def panel_tile(v: int, tokens: int) -> int:
    """Tokens of the register tile with the least work; weights and column numbers cost about as much as a token."""
    return min(PANEL_TILES[v], key=lambda t: (math.ceil(tokens / t) * (t + 1), -t))


def linear_call(
    level: ArmLevel,
    caches: Caches,
    candidate: Candidate,
    weight: Tensor,
    call: tuple[int, int],
    epilogue: Epilogue,
) -> SiteCall:
    """Pack a weight `[O, I]` of a linear for a candidate, and cut a call.

    Args:
        level: of the schedules.
        caches: that it is cut for.
        candidate: `dense`, `rows` or `panel`.
        weight: float32.
        call: tokens and threads.
        epilogue: what follows.

    Raises:
        ValueError: there is no such kernel.
    """
    tokens, threads = call
    outputs, inputs = int(weight.shape[0]), int(weight.shape[1])
    if candidate.kernel == "rows":
        packing = schedules.row_packing(level, (outputs, inputs), caches.l1, int(weight.count_nonzero()))
        packed = QuadWeight.pack(weight, **packing)
        cut = schedules.row_call(level, tokens, (outputs, inputs), threads)
        shape = row_schedule(cut.variant)
        dims: tuple[int, ...] = (
            tokens,
            inputs,
            outputs,
            packed.blocks,
            packed.block * shape.tile,
            packed.chunk,
            cut.splits,
        )
        scratch = rows.scratch_floats(inputs, packed.chunk, shape)
        source = _source(level, f"rows_{cut.variant}", shape, epilogue, lambda: rows.build(shape, epilogue))
        return SiteCall(Call(source, tuple(rows.weights(packed)), dims, cut.items, scratch))
    if candidate.kernel not in ("dense", "panel"):
        raise ValueError(f"there is no ARM kernel {candidate.kernel!r}")
    dense = candidate.is_dense
    v = DENSE_V if dense else dict(candidate.params)["v"]
    weight = weight.detach().float()
    panels = PanelWeight.full(weight, v) if dense else PanelWeight.pack(weight, v, signed_zeros=False)
    tile = panel_tile(v, tokens)
    schedule = panel_schedule(v, tile)
    cut = schedules.panel_cut(tile, tokens, math.ceil(outputs / v), threads)
    arrays = tuple(panel.weights(panels, schedule.width))
    dims = (tokens, inputs, outputs, cut.group, cut.splits)
    source = _source(level, f"panel_{v}_{tile}", schedule, epilogue, lambda: panel.build(schedule, epilogue))
    return SiteCall(Call(source, arrays, dims, cut.items, panel.SCRATCH_FLOATS))


def conv_call(
    level: ArmLevel,
    caches: Caches,
    weight: Tensor,
    window: Window,
    maps: Maps,
    threads: int,
    epilogue: Epilogue,
) -> SiteCall:
    """Pack a weight `[O, I / groups, *kernel]` of a convolution, and cut a call; zeros are left out.

    Raises:
        ValueError: the maps are larger than 32-bit numbers address.
    """
    if window.is_depthwise(int(weight.flatten(1).shape[1])):
        return _depthwise_call(level, weight, window, maps, epilogue)
    matrix = weight.detach().float().flatten(1)
    outputs, columns = int(matrix.shape[0]), int(matrix.shape[1])
    packing = conv_schedules.packing(level, (outputs, columns), window.groups, ROW_VECTORS, caches.l1)
    packed = QuadWeight.pack(matrix, **packing)
    geometry = Geometry.of(window, maps)
    rows_groups = (packed.group_rows, window.groups)
    packed_for = (ROW_VECTORS, packed.block)
    cut = conv_schedules.call(level, geometry, maps.images, rows_groups, packed_for, threads, caches)
    schedule = conv.ConvSchedule(LANES, cut.vectors, _SPREAD, geometry.masked, cut.whole, cut.direct)
    channels = int(weight.shape[1])
    sizes = conv.weight_sizes(packed, window)
    dims = conv.dims(schedule, sizes, geometry, maps.images, (window.groups, cut.splits, cut.image_tiles))
    scratch = conv.scratch_floats(schedule, sizes, cut.splits)
    source = _source(level, f"conv_{schedule.label}", schedule, epilogue, lambda: conv.build(schedule, epilogue))
    arrays = tuple(conv.weights(packed, table(window, channels)))
    call = Call(source, arrays, tuple(dims), cut.items, scratch)
    if not geometry.opened:
        return SiteCall(call)
    stride = window.stride[1]
    opening = conv.OpenSchedule(LANES, stride if stride <= 2 else 0)
    name = f"conv_open_{opening.step}"
    source = KernelSource(name, repr(opening), lambda: conv.build_open(opening), level.tvm_target)
    phases = (np.array(geometry.phases, np.int32),)
    open_dims = tuple(conv.open_dims(window, maps, geometry))
    opened = Call(source, phases, open_dims, maps.images * channels * window.groups, 0)
    planes = channels * window.groups * len(geometry.phases)
    return SiteCall(call, opened, maps.images * planes * geometry.rows * geometry.pitch)


def _depthwise_call(level: ArmLevel, weight: Tensor, window: Window, maps: Maps, epilogue: Epilogue) -> SiteCall:
    layout = depthwise.Layout.of(window, maps)
    schedule = conv_schedules.depthwise_schedule(level, layout, window, maps)
    outputs = int(weight.shape[0])
    values = weight.detach().float().flatten(1).contiguous().numpy()
    name = f"depthwise_{schedule.vectors}_{schedule.step}"
    source = _source(level, name, schedule, epilogue, lambda: depthwise.build(schedule, epilogue))
    dims = tuple(depthwise.dims(schedule, layout, window, maps, outputs))
    scratch = depthwise.scratch_floats(schedule, layout, window.output(maps.height, maps.width)[0])
    return SiteCall(Call(source, (values, layout.distances, layout.phases), dims, maps.images * outputs, scratch))


def _source(level: ArmLevel, name: str, schedule: Any, epilogue: Epilogue, build: Any) -> KernelSource:
    order = "_first" if epilogue.residual_first else ""
    name = f"{name}_{epilogue.activation}{'_residual' * epilogue.residual}{order}"
    return KernelSource(name, f"{schedule!r} {epilogue!r}", build, level.tvm_target)


def sources_of(calls: Sequence[SiteCall]) -> list[KernelSource]:
    """The kernels of calls, each name once."""
    found = {call.source.name: call.source for site in calls for call in (site.opening, site.call) if call is not None}
    return list(found.values())
