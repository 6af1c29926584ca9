"""Operations for ONNX Runtime on x86: weights packed as constants of a model, and the kernels of its library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sparsecomp.kernels import gathered, panel, rows
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.patterns import PanelWeight
from sparsecomp.patterns.gathered import GatherWeight, MaskWeight
from sparsecomp.patterns.rows import RowWeight
from sparsecomp.runtime.launch import KernelSource
from sparsecomp.runtime.ort_library import OrtTarget, PackedWeight
from sparsecomp.targets.base import Candidate, Target
from sparsecomp.targets.x86 import schedules
from sparsecomp.targets.x86.cpu import LEVELS, Level, caches, facts, level

_BUILTIN_NAMES = {"bmi1": "bmi"}  # Linux's name of a feature: the C compiler's
_UNTESTED = {"f16c", "movbe"}  # not known to `__builtin_cpu_supports`; every CPU with AVX2 has them


def level_of(target: Target) -> Level:
    """The instruction set level of a target.

    Raises:
        ValueError: there is no library for such a target.
    """
    family, _, name = target.name.partition(":")
    if family != "x86" or name not in LEVELS:
        raise ValueError(f"there is no ONNX Runtime library for target {target.name!r}; give 'x86'")
    return level(name)


def pack(level: Level, candidate: Candidate, weight: Tensor) -> PackedWeight:
    """Pack a weight `[O, I]` for a candidate; see the packed forms in `sparsecomp.patterns`.

    Raises:
        ValueError: there is no such kernel here.
    """
    sizes = {"outputs": int(weight.shape[0]), "inputs": int(weight.shape[1])}
    if candidate.kernel == "rows":
        shape = (sizes["outputs"], sizes["inputs"])
        row = RowWeight.pack(weight, **schedules.row_packing(level, shape, caches().l1))
        arrays = dict(zip(("values", "columns", "pairs", "rows"), rows.weights(row), strict=True))
        return PackedWeight("rows", 1, {**sizes, "chunk": row.chunk, "block": row.block}, arrays)
    if candidate.kernel == "panel":
        v = dict(candidate.params)["v"]
        width = schedules.panel_width(level, v)
        packed = panel.weights(PanelWeight.pack(weight.detach().float(), v, signed_zeros=False), width)
        arrays = dict(zip(("values", "columns", "ptr"), packed, strict=True))
        arrays["values"] = arrays["values"].reshape(-1)
        return PackedWeight("panel", v, sizes, arrays, width)
    if candidate.kernel == "gather":
        gather = GatherWeight.pack(weight, group=schedules.gather_schedule(level).group)
        arrays = {"values": gather.values, "columns": gather.columns, "ptr": gather.ptr}
        return PackedWeight("gather", gather.group, sizes, arrays)
    if candidate.kernel == "mask" and level.spread:
        mask = MaskWeight.pack(weight)
        return PackedWeight("mask", 1, sizes, {"values": mask.values, "masks": mask.masks, "ptr": mask.ptr})
    raise ValueError(f"target x86:{level.name} has no kernel {candidate.kernel!r} for ONNX Runtime")


def kernels(level: Level, family: str, v: int, epilogue: Epilogue) -> tuple[tuple[int, KernelSource], ...]:
    """The kernels of an operation by the number that a call chooses by, ascending."""

    def source(number: int, schedule: Any, build: Callable[[Any, Epilogue], Any]) -> tuple[int, KernelSource]:
        residual = "_residual" if epilogue.residual else ""
        name = f"{family}{v}_{number}_{epilogue.activation}{residual}"
        return number, KernelSource(
            name, f"{schedule!r} {epilogue!r}", lambda: build(schedule, epilogue), level.tvm_target
        )

    if family == "rows":
        return tuple(
            source(vectors, rows.RowSchedule(level.lanes, vectors), rows.build)
            for vectors in schedules.ROW_VECTORS
            if vectors <= level.vectors
        )
    if family == "panel":
        tiles = sorted({1, 2, 4, level.panel_tokens})
        return tuple(source(tile, schedules.panel_schedule(level, v, tile), panel.build) for tile in tiles)
    if family == "gather":
        return (source(0, schedules.gather_schedule(level), gathered.build_gather),)
    return (source(0, gathered.MaskSchedule("expand" if level.spread == "expand" else "pshufb"), gathered.build_mask),)


def ort_target(level: Level) -> OrtTarget:
    """What a library for a level needs of the CPU, and the constants of its schedules."""
    needs = [need for need in facts()["levels"][level.name]["needs"] if need not in _UNTESTED]
    constants = {
        "row_step_cost": schedules.ROW_STEP_COST,
        "panel_step_cost": schedules.PANEL_STEP_COST,
        "group_tokens": schedules.GROUP_TOKENS,
    }
    return OrtTarget(f"x86:{level.name}", tuple(_BUILTIN_NAMES.get(need, need) for need in needs), constants)
