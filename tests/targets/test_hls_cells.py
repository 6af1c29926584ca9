"""Cells of FPGA designs: rules that yosys follows, and fits that hold for what they have not seen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecomp.targets.hls import Cells
from sparsecomp.targets.hls.cells import blocks, cells, fold_errors, kinds, points


def test_slices_and_block_rams_are_those_of_every_mapped_unit() -> None:
    for kind in kinds():
        for point in points()["points"][kind]:
            found = cells(kind, point["sizes"])
            assert (found.dsp, found.ramb18) == (point["cells"]["DSP"], point["cells"]["RAMB18"]), (kind, point)


@pytest.mark.parametrize("cell", ["LUT", "FF"])
def test_units_that_a_fit_has_not_seen_are_predicted_within_a_fifth(cell: str) -> None:
    # A table of 256 values is logic of what it holds, which sizes do not tell; it is small beside what it follows.
    errors = {kind: np.abs(fold_errors(kind, cell)) for kind in kinds() if kind != "look_up"}
    for kind, found in errors.items():
        assert found.mean() < 0.2, kind
    assert np.mean(np.concatenate([*errors.values()]) < 0.2) > 0.9


@given(st.integers(1, 20_000), st.integers(1, 500))
def test_block_rams_hold_every_bit_and_a_wider_or_deeper_memory_takes_no_fewer(depth: int, bits: int) -> None:
    count, together = blocks(depth, bits)
    assert count * 18 * 1024 >= depth * bits
    assert together >= 1
    assert count <= blocks(depth + 1, bits)[0]
    assert count <= blocks(depth, bits + 1)[0]


def test_more_multipliers_choices_and_rows_take_more_cells() -> None:
    tile = {"rows": 4, "groups": 4, "n": 2, "m": 4, "shared": 1, "sums": 24, "values": 8}
    base = cells("multiply", tile)
    assert base.dsp == 32
    for larger in ({"rows": 8}, {"groups": 8}, {"sums": 32}, {"m": 8}):
        more = cells("multiply", tile | larger)
        assert more.lut > base.lut, larger
        assert more.ff > base.ff, larger
    shared = cells("multiply", tile | {"shared": 4})
    assert shared.lut < base.lut
    assert shared.dsp == base.dsp


def test_cells_add_up() -> None:
    assert Cells(1, 2.0, 3.0, 4) + Cells(10, 20.0, 30.0, 40) == Cells(11, 22.0, 33.0, 44)
