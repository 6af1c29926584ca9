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
import torch
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
        packed = QuadWeight.pack(weight, **schedules.row_packing(level, (outputs, inputs), caches.l1))
        cut = schedules.row_call(level, tokens, (outputs, inputs), threads)
        shape = row_schedule(cut.variant)
        dims = (tokens, inputs, outputs, packed.blocks, packed.block * shape.tile, packed.chunk, cut.splits)
        scratch = rows.scratch_floats(inputs, packed.chunk, shape)
        source = _source(level, f"rows_{cut.variant}", shape, epilogue, lambda: rows.build(shape, epilogue))
        return SiteCall(Call(source, tuple(rows.weights(packed)), dims, cut.items, scratch))
    if candidate.kernel not in ("dense", "panel"):
        raise ValueError(f"there is no ARM kernel {candidate.kernel!r}")
    dense = candidate.is_dense
    v = DENSE_V if dense else dict(candidate.params)["v"]
    panels = _full_panels(weight, v) if dense else PanelWeight.pack(weight.detach().float(), v, signed_zeros=False)
    tile = panel_tile(v, tokens)
    schedule = panel_schedule(v, tile)
    group, splits, items = _panel_cut(tokens, tile, math.ceil(outputs / v), threads)
    arrays = tuple(panel.weights(panels, schedule.width))
    source = _source(level, f"panel_{v}_{tile}", schedule, epilogue, lambda: panel.build(schedule, epilogue))
    return SiteCall(Call(source, arrays, (tokens, inputs, outputs, group, splits), items, panel.SCRATCH_FLOATS))


def _panel_cut(tokens: int, tile: int, panels: int, threads: int) -> tuple[int, int, int]:
    """Tokens of an item, parts of the panels, and items."""
    tiles = math.ceil(tokens / tile)
    groups = max(1, math.ceil(tokens / schedules.GROUP_TOKENS))
    groups = min(tiles, math.ceil(groups / threads) * threads if groups > 1 else groups)
    group = math.ceil(tiles / groups) * tile
    groups = math.ceil(tokens / group)
    splits = 1 if groups >= threads else min(threads, panels)
    return group, splits, groups * splits


def _full_panels(weight: Tensor, v: int) -> PanelWeight:
    """All columns of a weight, also those that are zero: a dense product."""
    outputs, inputs = weight.shape
    panels = -(-outputs // v)
    padded = torch.zeros(panels * v, inputs)
    padded[:outputs] = weight.detach().float()
    values = padded.reshape(panels, v, inputs).transpose(1, 2).reshape(-1, v).contiguous()
    columns = torch.arange(inputs, dtype=torch.int32).repeat(panels)
    ptr = torch.arange(panels + 1, dtype=torch.int32) * inputs
    return PanelWeight(v, (outputs, inputs), ptr, columns, values)


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
    cut = conv_schedules.call(level, geometry, maps.images, rows_groups, ROW_VECTORS, threads, caches.l2)
    schedule = conv.ConvSchedule(LANES, cut.vectors, geometry.masked, cut.whole, _SPREAD)
    channels = int(weight.shape[1])
    planes = channels * window.groups * len(geometry.phases)
    plane, area = geometry.rows * geometry.pitch, geometry.height * geometry.width
    dense = geometry.pitch == geometry.width
    sizes = {
        "planes": planes,
        "plane": plane,
        "rows": geometry.rows,
        "pitch": geometry.pitch,
        "length": geometry.length,
        "run": area if dense else geometry.width,
        "run_pitch": area if dense else geometry.pitch,
        "runs": 1 if dense else geometry.height,
        "images": maps.images,
        "outputs": outputs,
        "total": maps.images * planes * plane,
        "columns": columns,
        "block": packed.block,
        "block_floats": packed.block * schedule.tile,
        "blocks": packed.blocks,
        "chunk": packed.chunk,
        "group_chunks": packed.group_chunks,
        "group_rows": packed.group_rows,
        "group_planes": planes // window.groups,
        "taps": window.taps,
        "splits": cut.splits,
        "parts": cut.splits * window.groups,
        "image_tiles": cut.image_tiles,
    }
    _check_size(max(sizes["total"], maps.images * outputs * area))
    most = -(-packed.group_chunks // cut.splits)
    scratch = conv.scratch_floats(schedule, packed.block, packed.chunk, most, window.taps)
    name = f"conv_{cut.vectors}{'_whole' * cut.whole}{'_masked' * geometry.masked}"
    source = _source(level, name, schedule, epilogue, lambda: conv.build(schedule, epilogue))
    arrays = tuple(conv.weights(packed, table(window, channels)))
    call = Call(source, arrays, tuple(sizes[name] for name in conv.DIMS), cut.items, scratch)
    if not geometry.opened:
        return SiteCall(call)
    stride_y, stride_x = window.stride
    opening = conv.OpenSchedule(LANES, stride_x if stride_x <= 2 else 0)
    name = f"conv_open_{opening.step}"
    source = KernelSource(name, repr(opening), lambda: conv.build_open(opening), level.tvm_target)
    dims = (maps.height, maps.width, stride_y, stride_x, len(geometry.phases), geometry.rows, geometry.pitch)
    phases = (np.array(geometry.phases, np.int32),)
    opened = Call(source, phases, dims, maps.images * channels * window.groups, 0)
    return SiteCall(call, opened, sizes["total"])


def _depthwise_call(level: ArmLevel, weight: Tensor, window: Window, maps: Maps, epilogue: Epilogue) -> SiteCall:
    layout = depthwise.Layout.of(window, maps)
    height, width = window.output(maps.height, maps.width)
    positions = (height - 1) * layout.pitch + width
    vectors = conv_schedules.depthwise_vectors(level, positions)
    stride = window.stride[1]
    schedule = depthwise.DepthwiseSchedule(LANES, vectors, stride if stride <= 2 else 0)
    outputs = int(weight.shape[0])
    sizes = {
        "plane": maps.height * maps.width,
        "width": maps.width,
        "stride_y": window.stride[0],
        "stride_x": stride,
        "phases": len(layout.phases),
        "pitch": layout.pitch,
        "padded": layout.padded,
        "tiles": -(-positions // schedule.tile),
        "out_height": height,
        "out_width": width,
        "channels": window.groups,
        "outputs": outputs,
        "taps": window.taps,
        "total": maps.images * window.groups * maps.height * maps.width,
    }
    _check_size(max(sizes["total"], maps.images * outputs * height * width))
    values = weight.detach().float().flatten(1).contiguous().numpy()
    name = f"depthwise_{vectors}_{schedule.step}"
    source = _source(level, name, schedule, epilogue, lambda: depthwise.build(schedule, epilogue))
    dims = tuple(sizes[name] for name in depthwise.DIMS)
    scratch = depthwise.scratch_floats(schedule, layout, height)
    return SiteCall(Call(source, (values, layout.distances, layout.phases), dims, maps.images * outputs, scratch))


def _check_size(largest: int) -> None:
    if largest > 2**31 - 1:
        raise ValueError(f"maps of {largest} values are more than 32-bit numbers address; use fewer images")


def _source(level: ArmLevel, name: str, schedule: Any, epilogue: Epilogue, build: Any) -> KernelSource:
    order = "_first" if epilogue.residual_first else ""
    name = f"{name}_{epilogue.activation}{'_residual' * epilogue.residual}{order}"
    return KernelSource(name, f"{schedule!r} {epilogue!r}", build, level.tvm_target)


def sources_of(calls: Sequence[SiteCall]) -> list[KernelSource]:
    """The kernels of calls, each name once."""
    found = {call.source.name: call.source for site in calls for call in (site.opening, site.call) if call is not None}
    return list(found.values())
