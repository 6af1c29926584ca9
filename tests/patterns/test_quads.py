"""The packed form of convolution weights: nothing is lost, and rows of a quad fit together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecomp.patterns.quads import WORDS_AHEAD, QuadWeight


def weight(outputs: int, columns: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(outputs, columns, generator=generator)
    return values * (torch.rand(outputs, columns, generator=generator) < density)


@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 60),
    groups=st.integers(1, 3),
    chunk=st.sampled_from((4, 8, 32)),
    block=st.sampled_from((1, 5, 16, 64, 256)),
    density=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_unpacking_gives_the_weight_back(
    rows: int, columns: int, groups: int, chunk: int, block: int, density: float, seed: int
) -> None:
    dense = weight(groups * rows, columns, density, seed)
    packed = QuadWeight.pack(dense, chunk=chunk, block=block, groups=groups)
    assert torch.equal(packed.unpack(), dense)


def test_a_quad_has_four_rows_of_its_chunk_and_every_row_once() -> None:
    packed = QuadWeight.pack(weight(30, 50, 0.3), chunk=8, block=20, groups=3)
    for chunk in range(6):
        size = 8 if chunk % 2 == 0 else 2
        for block in range(3):
            at = chunk * 3 + block
            rows = packed.quads[packed.starts[at] : packed.starts[at + 1], 4:].ravel()
            assert sorted(rows[rows < 8].tolist()) == list(range(size))
            assert np.all(rows[rows >= size] == 8)


def test_words_that_are_loaded_ahead_of_the_last_quad_are_there() -> None:
    packed = QuadWeight.pack(weight(12, 20, 0.3), chunk=8, block=8)
    last = packed.quads[-1]
    assert last[1] + -(-last[2] // 2) + -(-last[3] // 2) + WORDS_AHEAD == len(packed.words)
    assert not packed.words[-WORDS_AHEAD:].any()


def test_rows_that_share_columns_load_them_once() -> None:
    kept = torch.rand(8, 64, generator=torch.Generator().manual_seed(1)) < 0.3
    pairs = torch.randn(16, 64) * kept.repeat_interleave(2, 0)
    packed = QuadWeight.pack(pairs, chunk=16, block=64)
    words, slots = len(packed.words), int(pairs.count_nonzero())
    assert 8 * words < 0.75 * slots
    assert torch.equal(packed.unpack(), pairs)


def test_zeros_fill_up_little_of_a_random_weight() -> None:
    dense = weight(256, 128, 0.1)
    packed = QuadWeight.pack(dense, chunk=128, block=128)
    assert len(packed.values) < 1.1 * int(dense.count_nonzero())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk": 6, "block": 4}, "multiple of 4"),
        ({"chunk": 4, "block": 0}, "block 1 to 256"),
        ({"chunk": 4, "block": 4, "groups": 3}, "groups must divide the 8 rows"),
    ],
)
def test_bad_sizes_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuadWeight.pack(weight(8, 8, 0.5), **arguments)


def test_a_weight_that_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"given shape \(2, 2, 1, 1\)"):
        QuadWeight.pack(torch.zeros(2, 2, 1, 1), chunk=4, block=4)
