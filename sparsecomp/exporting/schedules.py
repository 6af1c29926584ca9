"""Schedules for what TVM lowers: no arrays between elementwise operations, and products of two activations in tiles.

Products with constant weights are sites and run in kernels of ours; what is left for TVM are those of attention.
"""

from __future__ import annotations

from typing import Any

_ROWS = (4, 3, 2, 1)
_COLUMNS = (16, 12, 8, 4)
"""Sizes of the register tile, of which the first that divides is taken: 4 x 16 values are 16 vectors."""
_PARTITION = "pragma_loop_partition_hint"


def scheduled(tvm: Any, function: Any) -> Any:
    """A PrimFunc of several blocks, scheduled; one that has nothing to schedule comes back as it was."""
    from tvm import s_tir

    schedule = s_tir.Schedule(function)
    _inline(tvm, schedule)
    for block in _blocks(schedule):
        if _is_matmul(tvm, schedule, block):
            _tile(tvm, schedule, block)
    return schedule.mod["main"]


def _blocks(schedule: Any) -> list[Any]:
    return list(schedule.get_child_blocks(schedule.get_sblock("root")))


def _is_spatial(tvm: Any, schedule: Any, block: Any) -> bool:
    return all(int(var.iter_type) == tvm.tirx.IterVar.DataPar for var in schedule.get(block).iter_vars)


def _inline(tvm: Any, schedule: Any) -> None:
    """Compute elementwise blocks where the only other elementwise block that reads them does."""
    for block in _blocks(schedule):
        readers = schedule.get_consumers(block)
        if len(readers) != 1 or not all(_is_spatial(tvm, schedule, each) for each in (block, readers[0])):
            continue
        try:
            schedule.compute_inline(block)
        except tvm.s_tir.ScheduleError:
            # TVM alone knows whether a block can be inlined; one that cannot keeps its array.
            continue


def _is_matmul(tvm: Any, schedule: Any, block: Any) -> bool:
    """Whether a block is C[.., i, j] += A[.., i, k] * B[.., k, j], in loops of this order."""
    body = schedule.get(block)
    kinds = [int(var.iter_type) for var in body.iter_vars]
    data, reduction = tvm.tirx.IterVar.DataPar, tvm.tirx.IterVar.CommReduce
    if kinds != [data] * (len(kinds) - 1) + [reduction] or len(kinds) < 3:
        return False
    store = body.body
    if not isinstance(store, tvm.tirx.BufferStore) or not isinstance(store.value, tvm.tirx.Add):
        return False
    product = store.value.b
    if not isinstance(product, tvm.tirx.Mul):
        return False
    factors = (product.a, product.b)
    if (
        not all(isinstance(factor, tvm.ir.expr.TensorLoad) for factor in factors)
        or str(store.buffer.dtype) != "float32"
    ):
        return False
    i, j, k = (var.var for var in body.iter_vars[-3:])
    wanted = ((store.indices, (i, j)), (factors[0].indices, (i, k)), (factors[1].indices, (k, j)))
    return all(
        len(indices) >= 2 and all(given.same_as(var) for given, var in zip(list(indices)[-2:], pair, strict=True))
        for indices, pair in wanted
    )


def _tile(tvm: Any, schedule: Any, block: Any) -> None:
    """Keep a tile of sums in registers over the whole of k; what follows, or a copy, stores it."""
    *outer, i, j, k = schedule.get_loops(block)
    rows_open, columns_open = (not hasattr(schedule.get(loop).extent, "value") for loop in (i, j))
    height, width = (_tile_size(schedule, *pair) for pair in ((i, _ROWS), (j, _COLUMNS)))
    if width is None or height is None:
        return
    readers = schedule.get_consumers(block)
    fused = len(readers) == 1 and _is_spatial(tvm, schedule, readers[0])
    last = readers[0] if fused else schedule.cache_write(block, 0, "global")
    i_outer, i_inner = schedule.split(i, [None, height])
    j_outer, j_inner = schedule.split(j, [None, width])
    schedule.reorder(*outer, i_outer, j_outer, k, i_inner, j_inner)
    for loop, is_open in ((i_outer, rows_open), (j_outer, columns_open)):
        if is_open:
            # The last tile, of which only a part may be there, gets a loop of its own: the others need no condition.
            schedule.annotate(loop, _PARTITION, 1)
    schedule.reverse_compute_at(last, j_outer)
    for each in (last, block):
        *_, row, column = schedule.get_loops(each)
        schedule.vectorize(column)
        schedule.unroll(row)
    *_, row, column = schedule.get_loops(schedule.decompose_reduction(block, k))
    if schedule.get(column).kind == tvm.tirx.ForKind.SERIAL:
        schedule.vectorize(column)
        schedule.unroll(row)


def _tile_size(schedule: Any, loop: Any, sizes: tuple[int, ...]) -> int | None:
    """The first size that divides a loop; the first of all if the loop's size is known at run time only."""
    extent = schedule.get(loop).extent
    return next((size for size in sizes if not hasattr(extent, "value") or int(extent) % size == 0), None)
