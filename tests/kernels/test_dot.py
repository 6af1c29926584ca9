"""The int8 kernel against its reference, with plain products where dot products would be, and its packed weights."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import Guarded, close, needs_x86, tvm_target

from sparsecomp.kernels import dot, tir
from sparsecomp.kernels.dot import DotSchedule, DotWeight, Levels
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.runtime.launch import KernelSource, Launch, Weights, function_of
from sparsecomp.targets.arm import mca
from sparsecomp.targets.arm.cpu import cpu

SIGNED, UNSIGNED = Levels(0.03, -128 - 5), Levels(0.02, -131)


def integers(outputs: int, inputs: int, v: int, density: float, seed: int = 0) -> npt.NDArray[np.int8]:
    """Rows of a panel share their columns."""
    rng = np.random.default_rng(seed)
    kept = np.repeat(rng.random((-(-outputs // v), inputs)) < density, v, axis=0)[:outputs]
    values: npt.NDArray[np.int8] = np.where(kept, rng.integers(-128, 128, (outputs, inputs)), 0).astype(np.int8)
    return values


@given(
    outputs=st.integers(1, 20),
    inputs=st.integers(1, 150),
    v=st.sampled_from([4, 8, 16]),
    window=st.sampled_from([1, 2, 4]),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_packing_loses_nothing(outputs: int, inputs: int, v: int, window: int, density: float, seed: int) -> None:
    weight = integers(outputs, inputs, v, density, seed)
    packed = DotWeight.pack(weight, v, window)
    assert np.array_equal(packed.unpack(), weight)
    assert packed.picks.max(initial=0) < 16 * window
    assert np.array_equal(DotWeight.pack_own(weight, v).unpack(), weight)


def test_a_step_holds_sixteen_of_thirty_two_columns() -> None:
    weight = np.tile(np.array([0, 3, 5, 0], np.int8), (16, 32))
    assert len(DotWeight.pack(weight, 16, 2).firsts) == 128 / 2 / 16
    assert len(DotWeight.pack(weight, 16, 1).firsts) == 128 / 16


def test_rows_with_columns_of_their_own_keep_four_of_sixteen() -> None:
    weight = np.stack([np.tile(np.roll(np.array([7, 0, 0, 0], np.int8), row % 4), 32) for row in range(16)])
    assert len(DotWeight.pack(weight, 16, 2).firsts) == 128 / 16  # together they keep all
    packed = DotWeight.pack_own(weight, 16)
    assert len(packed.firsts) == 128 / 16
    assert packed.values.size == weight.size / 4


@pytest.mark.parametrize("levels", [SIGNED, UNSIGNED])
def test_levels_are_those_of_quantize_linear(levels: Levels) -> None:
    x = np.concatenate([levels.scale * (np.arange(-300, 300) + 0.5), [np.inf, -np.inf]]).astype(np.float32)
    zero = -128 - levels.least
    expected = np.clip(np.rint(x / np.float32(levels.scale)) + zero, -128, 127)
    assert np.array_equal(levels.of(x), expected.astype(np.int8))


@needs_x86
@pytest.mark.parametrize(
    ("shape", "tokens", "schedule", "epilogue", "cut"),
    [
        ((40, 72), 7, DotSchedule(16, 4, 1, own=False, native=False), Epilogue(), (7, 1)),
        ((37, 130), 9, DotSchedule(16, 2, 2, own=False, native=False), Epilogue("gelu", True), (4, 3)),
        ((6, 33), 5, DotSchedule(4, 8, 4, own=False, native=False), Epilogue("relu", True, True), (8, 1)),
        ((20, 50), 3, DotSchedule(16, 2, 1, own=True, native=False), Epilogue("none", True), (3, 2)),
        ((24, 15), 1, DotSchedule(8, 1, 2, own=False, native=False), Epilogue(), (1, 2)),
    ],
    ids=str,
)
def test_the_kernel_computes_its_reference(
    shape: tuple[int, int], tokens: int, schedule: DotSchedule, epilogue: Epilogue, cut: tuple[int, int]
) -> None:
    rng = np.random.default_rng(1)
    levels = SIGNED if tokens % 2 else UNSIGNED
    if schedule.own:
        packed = DotWeight.pack_own(integers(*shape, 1, 0.3), schedule.v)
    else:
        density = 1.0 if schedule.window == 1 else 0.4
        packed = DotWeight.pack(integers(*shape, schedule.v, density), schedule.v, schedule.window)
    outputs, inputs = shape
    # Values on the borders between levels too, which are rounded to even, and beyond the last level.
    x = np.rint(rng.standard_normal((tokens, inputs)) * 100).astype(np.float32) * np.float32(levels.scale / 2)
    terms = packed.terms(*rng.standard_normal((2, outputs)).astype(np.float32), levels)
    residual = rng.standard_normal((tokens, outputs)).astype(np.float32)
    group, splits = cut
    source = KernelSource("dot", f"{schedule} {epilogue}", lambda: dot.build(schedule, epilogue), tvm_target("generic"))
    out, threads, items = Guarded((tokens, outputs)), 2, -(-tokens // group) * splits
    scratch = dot.scratch_floats(inputs, group)
    dims = [tokens, inputs, outputs, group, splits]
    call = Launch(function_of(source), Weights(packed.arrays(levels)), dims, items, threads, scratch)
    call.run(
        torch.from_numpy(x),
        torch.from_numpy(terms),
        torch.from_numpy(residual) if epilogue.residual else None,
        out.tensor,
    )
    out.check()
    close(out.tensor, dot.reference(x, packed, levels, terms, residual, epilogue), 1e-6)


def test_its_loop_is_dot_products_by_element_and_one_look_up() -> None:
    schedule = DotSchedule(16, 4, 2, own=False, native=True)
    text = tir.compile_object(dot.build(schedule, Epilogue()), "kernel", cpu("cortex-a76").level.tvm_target)[1]
    (loop,) = ["\n".join(body) for body in mca.inner_loops(text) if any("sdot" in line for line in body)]
    assert len(re.findall(r"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.4b\[\d\]", loop)) == 64
    assert loop.count("tbl\t") == 4
