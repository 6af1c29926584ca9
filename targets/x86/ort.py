"""Operations for ONNX Runtime on x86: weights packed as constants of a model, and the kernels of its library."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparsecomp.kernels import conv, conv_open, gathered, panel, rows
from sparsecomp.kernels.conv_geometry import Geometry
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.kernels.quads import QuadShape
from sparsecomp.patterns import PanelWeight
from sparsecomp.patterns.gathered import GatherWeight, MaskWeight
from sparsecomp.patterns.quads import QuadWeight
from sparsecomp.runtime.launch import KernelSource
from sparsecomp.runtime.ort_library import OrtKernel, OrtTarget, PackedForm, PackedWeight
from sparsecomp.targets.base import Candidate
from sparsecomp.targets.cpu import conv_schedules, schedules
from sparsecomp.targets.cpu.level import Level
from sparsecomp.targets.x86.cpu import caches, facts
from sparsecomp.targets.x86.ort_target import Forms, full_panel, full_tiles
from sparsecomp.window import Maps, Window

_BUILTIN_NAMES = {"bmi1": "bmi"}  # Linux's name of a feature: the C compiler's
_THREADS = (1, 2, 4, 8, 16)
_UNTESTED = {"f16c", "movbe"}  # not known to `__builtin_cpu_supports`; every CPU with AVX2 has them


def pack(level: Level, forms: Forms, weight: Tensor) -> PackedWeight:
    """Pack a weight `[O, I]` in its forms; see the packed forms in `sparsecomp.patterns`.

    Raises:
        ValueError: there is no such kernel here.
    """
    packed = tuple(_pack(level, candidate, weight) for candidate in forms.candidates)
    return PackedWeight(packed, np.array(forms.choice, np.int32) if len(packed) > 1 else None)


def _pack(level: Level, candidate: Candidate, weight: Tensor) -> PackedForm:
    sizes = {"outputs": int(weight.shape[0]), "inputs": int(weight.shape[1])}
    if candidate.kernel == "rows":
        shape = (sizes["outputs"], sizes["inputs"])
        packing = schedules.row_packing(level, shape, caches().l1, int(weight.count_nonzero()))
        quads = QuadWeight.pack(weight, **packing)
        return PackedForm("rows", 1, {**sizes, "chunk": quads.chunk, "block": quads.block}, _arrays(quads))
    if candidate.kernel == "full":
        v = full_panel(level)
        values = PanelWeight.full(weight.detach().float(), v).values
        return PackedForm("full", v, sizes, {"values": values.reshape(-1).numpy()}, v)
    if candidate.kernel == "panel":
        v = dict(candidate.params)["v"]
        width = schedules.panel_width(level, v)
        packed = panel.weights(PanelWeight.pack(weight.detach().float(), v, signed_zeros=False), width)
        arrays = dict(zip(("values", "columns", "ptr"), packed, strict=True))
        arrays["values"] = arrays["values"].reshape(-1)
        return PackedForm("panel", v, sizes, arrays, width)
    if candidate.kernel == "gather":
        gather = GatherWeight.pack(weight, group=schedules.gather_schedule(level).group)
        arrays = {"values": gather.values, "columns": gather.columns, "ptr": gather.ptr}
        return PackedForm("gather", gather.group, sizes, arrays)
    if candidate.kernel == "mask" and level.spread:
        mask = MaskWeight.pack(weight)
        return PackedForm("mask", 1, sizes, {"values": mask.values, "masks": mask.masks, "ptr": mask.ptr})
    raise ValueError(f"target x86:{level.name} has no kernel {candidate.kernel!r} for ONNX Runtime")


def pack_conv(level: Level, candidate: Candidate, weight: Tensor, window: Window) -> PackedWeight:
    """Pack a weight `[O, I / groups, *kernel]` of a convolution for a candidate; see `sparsecomp.patterns.quads`."""
    vectors = dict(candidate.params)["vectors"]
    matrix = weight.detach().flatten(1)
    shape = (int(matrix.shape[0]), int(matrix.shape[1]))
    nonzeros = int(matrix.count_nonzero())
    packing = conv_schedules.packing(level, shape, window.groups, vectors, caches().l1, nonzeros)
    packed = QuadWeight.pack(matrix, **packing)
    sizes = {"outputs": shape[0], "inputs": shape[1], "chunk": packed.chunk, "block": packed.block, "vectors": vectors}
    return PackedWeight((PackedForm("conv", 1, sizes, _arrays(packed)),))


def _arrays(packed: QuadWeight) -> dict[str, npt.NDArray[Any]]:
    """The arrays of quads by the names of an operation's inputs; ONNX knows no words of eight columns."""
    columns = packed.words.view(np.uint8)
    return {"values": packed.values, "columns": columns, "quads": packed.quads, "starts": packed.starts}


def kernels(level: Level, family: str, v: int, epilogue: Epilogue) -> tuple[OrtKernel, ...]:
    """The kernels of an operation of linears, by ascending number."""

    def kernel(number: int, schedule: Any, build: Callable[[Any, Epilogue], Any]) -> OrtKernel:
        return OrtKernel(number, _source(level, f"{family}{v}_{number}", schedule, epilogue, build))

    if family == "rows":
        return tuple(
            kernel(vectors, QuadShape(level.lanes, vectors, schedules.spread(level)), rows.build)
            for vectors in schedules.ROW_VECTORS
            if vectors <= level.vectors
        )
    if family in ("panel", "full"):
        tiles = full_tiles(level) if family == "full" else sorted({1, 2, 4, level.panel_tokens})
        return tuple(kernel(tile, schedules.panel_schedule(level, v, tile), panel.build) for tile in tiles)
    if family == "gather":
        return (kernel(0, schedules.gather_schedule(level), gathered.build_gather),)
    spread: Literal["pshufb", "expand"] = "expand" if level.spread == "expand" else "pshufb"
    return (kernel(0, gathered.MaskSchedule(spread), gathered.build_mask),)


def conv_kernels(
    level: Level, window: Window, epilogue: Epilogue, calls: Collection[tuple[Maps, tuple[int, int], int, int]]
) -> tuple[tuple[OrtKernel, ...], KernelSource | None]:
    """The kernels of an operation of convolutions, and the one that takes its maps apart, if it needs that.

    There are many variants, so that those are built which calls choose, and one for every call that is not foreseen.

    Args:
        level: of the schedules.
        window: of the convolution.
        epilogue: what follows.
        calls: for every site its maps, the shape and the entries of its weight as a matrix, and the most vectors that
            it was packed for.
    """
    wanted = {(vectors, False, False) for vectors in conv_schedules.widest(level)}
    masked = False
    for maps, shape, nonzeros, vectors in calls:
        geometry = Geometry.of(window, maps)
        masked = masked or geometry.masked
        rows = (shape[0] // window.groups, window.groups)
        packing = conv_schedules.packing(level, shape, window.groups, vectors, caches().l1, nonzeros)
        packed = (vectors, packing["block"], conv_schedules.uses(shape, window.groups, nonzeros))
        for threads in _THREADS:
            cut = conv_schedules.call(level, geometry, maps.images, rows, packed, threads, caches(), tails=True)
            wanted |= {(part.vectors, part.whole, part.direct) for part in cut.parts}
    spread = schedules.spread(level)
    found = []
    for number, whole, direct in sorted(wanted):
        schedule = conv.ConvSchedule(level.lanes, number, spread, masked, whole, direct)
        source = _source(level, f"conv_{schedule.label}", schedule, epilogue, conv.build)
        found.append(OrtKernel(number, source, whole, direct))
    # As `Geometry.of`: with a stride, or where the output is wider than the map.
    zeros = 2 * window.padding[1] + window.extra[1]
    opened = window.stride != (1, 1) or zeros > window.dilation[1] * (window.kernel[1] - 1)
    step = window.stride[1] if window.stride[1] <= 2 else 0
    opening = conv_open.OpenSchedule(level.lanes, step)
    source = KernelSource(f"conv_open_{step}", repr(opening), lambda: conv_open.build(opening), level.tvm_target)
    return tuple(found), source if opened else None


def _source(
    level: Level, name: str, schedule: Any, epilogue: Epilogue, build: Callable[[Any, Epilogue], Any]
) -> KernelSource:
    order = "_first" if epilogue.residual_first else ""
    name = f"{name}_{epilogue.activation}{'_residual' * epilogue.residual}{order}"
    return KernelSource(name, f"{schedule!r} {epilogue!r}", lambda: build(schedule, epilogue), level.tvm_target)


def ort_target(level: Level) -> OrtTarget:
    """What a library for a level needs of the CPU, and the constants of its schedules."""
    needs = [need for need in facts()["levels"][level.name]["needs"] if need not in _UNTESTED]
    constants = {
        "conv_step_cost": conv_schedules.STEP_COST,
        "uses_to_pack": conv_schedules.USES_TO_PACK,
        "conv_runs_cost": conv_schedules.RUNS_COST,
        "conv_tail_cost": conv_schedules.TAIL_COST,
        "sums_bytes": int(schedules.L2_SHARE * caches().l2),
        "l1_line": conv_schedules.LINE,
        "l1_sets": conv_schedules.SETS,
        "l1_ways": caches().l1 // (4 * conv_schedules.LINE * conv_schedules.SETS),
        "row_step_cost": schedules.ROW_STEP_COST,
        "panel_step_cost": schedules.PANEL_STEP_COST,
        "group_tokens": schedules.GROUP_TOKENS,
    }
    return OrtTarget(f"x86:{level.name}", tuple(_BUILTIN_NAMES.get(need, need) for need in needs), constants)
