"""How calls are cut: every token and row is covered, and every thread has work where there is some."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecomp.kernels.conv_geometry import Geometry
from sparsecomp.targets.cpu import conv_schedules, schedules
from sparsecomp.targets.cpu.level import Level
from sparsecomp.targets.cpu.schedules import Call
from sparsecomp.targets.x86 import cpu
from sparsecomp.window import Maps, Window

LEVELS = st.sampled_from([cpu.level(name) for name in cpu.LEVELS])
TOKENS = st.integers(1, 3000)
SHAPES = st.tuples(st.integers(1, 6000), st.integers(1, 70000))
THREADS = st.integers(1, 96)
PANELS = st.sampled_from([8, 16, 32])


def check_call(call: Call, threads: int) -> None:
    assert call.items >= 1
    assert call.splits >= 1
    assert 1 / threads <= call.share(threads) <= 1
    assert call.share(1) == 1


@given(LEVELS, TOKENS, SHAPES, THREADS)
def test_row_calls(level: Level, tokens: int, shape: tuple[int, int], threads: int) -> None:
    call = schedules.row_call(level, tokens, shape, threads)
    check_call(call, threads)
    tile = call.variant * level.lanes
    assert 1 <= call.variant <= level.vectors
    assert (call.tiles - 1) * tile < tokens <= call.tiles * tile
    assert call.items == call.tiles * call.splits
    assert call.splits <= min(threads, call.parts)


@given(LEVELS, TOKENS, SHAPES)
def test_one_thread_never_splits(level: Level, tokens: int, shape: tuple[int, int]) -> None:
    assert schedules.row_call(level, tokens, shape, 1).splits == 1
    assert schedules.panel_call(level, 8, tokens, shape, 1).splits == 1


@given(LEVELS, SHAPES, st.sampled_from([16384, 32768, 49152, 131072]))
def test_blocks_of_rows_fit_the_first_cache(level: Level, shape: tuple[int, int], l1: int) -> None:
    few = shape[0] * shape[1] // 8
    packing = schedules.row_packing(level, shape, l1, 4 * few + 3)
    assert packing["chunk"] % level.lanes == 0
    assert packing["chunk"] <= level.chunk
    assert math.ceil(shape[0] / packing["chunk"]) == schedules.row_call(level, 1, shape, 1).parts
    assert 16 <= packing["block"] <= 256
    assert packing["block"] % 16 == 0
    assert packing["block"] * 4 * level.lanes * level.vectors <= level.l1_share * l1
    assert schedules.row_packing(level, shape, l1, few)["block"] >= packing["block"]
    blocks = math.ceil(shape[1] / packing["block"])
    assert blocks * packing["block"] - shape[1] < 16 * blocks


@given(LEVELS, TOKENS, SHAPES, THREADS, st.sampled_from([1 << 18, 1 << 20]))
def test_every_block_of_a_tile_is_gathered_for_as_many_chunks_as_the_second_cache_holds(
    level: Level, tokens: int, shape: tuple[int, int], threads: int, l2: int
) -> None:
    call = schedules.row_call(level, tokens, shape, threads)
    gathers = schedules.gathers(level, call, shape[0], l2)
    assert call.splits <= gathers <= max(call.splits, call.parts + call.splits)
    assert schedules.gathers(level, call, shape[0], 1 << 30) == call.splits
    chunk = schedules.row_packing(level, shape, 32768, 0)["chunk"]
    count = schedules.together(chunk, call.variant * level.lanes, l2)
    assert count == 1 or count * (chunk + 1) * call.variant * level.lanes * 4 <= l2 / 2


@given(LEVELS, PANELS, TOKENS, SHAPES, THREADS)
def test_panel_calls(level: Level, v: int, tokens: int, shape: tuple[int, int], threads: int) -> None:
    call = schedules.panel_call(level, v, tokens, shape, threads)
    check_call(call, threads)
    groups = call.items // call.splits
    assert call.items == groups * call.splits
    assert call.group % call.variant == 0
    assert (groups - 1) * call.group < tokens <= groups * call.group
    assert (call.tiles - 1) * call.variant < tokens <= call.tiles * call.variant
    assert call.splits <= max(1, math.ceil(shape[0] / v))
    # The schedule exists: it checks that panel, stored part and register tile divide each other.
    schedule = schedules.panel_schedule(level, v, call.variant)
    assert schedule.tokens == call.variant
    assert schedule.width % schedule.lanes == 0


@pytest.mark.parametrize("name", cpu.LEVELS)
def test_register_tiles_fit_the_registers(name: str) -> None:
    level = cpu.level(name)
    registers = 32 if name == "avx512" else 16
    # Sums of both rows of a pair, a broadcast weight for each, one vector of activations.
    assert 2 * level.vectors + 2 + 1 <= registers
    for v in (8, 16, 32):
        for tokens in (1, 2, 4, level.panel_tokens):
            schedule = schedules.panel_schedule(level, v, tokens)
            # With one token a weight is used once, straight from memory.
            weights = schedule.vectors if tokens > 1 else 1
            assert schedule.tokens * schedule.vectors + weights + 1 <= registers


@pytest.mark.parametrize("name", cpu.LEVELS)
def test_full_tiles_take_the_widest_variant(name: str) -> None:
    level = cpu.level(name)
    tile = level.lanes * level.vectors
    assert schedules.row_call(level, 4 * tile, (256, 256), 1).variant == level.vectors
    assert schedules.row_call(level, 1, (256, 256), 1).variant == 1
    assert schedules.panel_call(level, 8, 1, (256, 256), 1).variant == 1
    assert schedules.panel_call(level, 8, 4 * level.panel_tokens, (256, 256), 1).variant == level.panel_tokens


def test_threads_without_tokens_of_their_own_get_rows() -> None:
    level = cpu.level("avx2")
    assert schedules.row_call(level, 8, (8 * level.chunk, 256), 4).splits == 4
    assert schedules.panel_call(level, 8, 4, (256, 256), 4).splits == 4


def test_three_chunks_are_made_four_for_two_threads() -> None:
    level = cpu.level("avx512")
    call = schedules.row_call(level, 128, (3 * level.chunk, 768), 2)
    assert call.parts == 4
    assert call.share(2) == 0.5


def test_one_tile_and_one_chunk_are_cut_finer_for_two_threads() -> None:
    level = cpu.level("avx512")
    tile = level.lanes * level.vectors
    assert schedules.row_call(level, tile, (level.chunk, 256), 1).items == 1
    assert schedules.row_call(level, tile, (level.chunk, 256), 2).items == 2


@pytest.mark.parametrize("name", cpu.LEVELS)
def test_gather_steps_read_whole_words(name: str) -> None:
    schedule = schedules.gather_schedule(cpu.level(name))
    assert schedule.group == 16
    assert schedule.lanes <= 8


class TestMapsInPlace:
    """When a convolution uses its input where it lies, on a level of 16 lanes with an L1 cache of 48 KB."""

    def used(
        self, size: int, vectors: int = 7, block: int = 86, kernel: int = 1, padding: int = 0, uses: float = 1
    ) -> bool:
        window = Window((kernel, kernel), padding=(padding, padding))
        geometry = Geometry.of(window, Maps(1, size, size))
        return conv_schedules.reads_in_place(cpu.level("avx512"), geometry, vectors, (block, uses), 49152)

    def test_planes_that_begin_anywhere_are_used(self) -> None:
        assert self.used(28)
        assert self.used(56)

    def test_not_where_planes_are_not_whole_vectors(self) -> None:
        assert not self.used(14)

    def test_not_where_a_block_falls_into_few_sets_of_the_cache(self) -> None:
        assert not self.used(32)
        assert self.used(32, block=12)

    def test_not_where_each_value_is_used_often(self) -> None:
        assert self.used(28, vectors=4, uses=20)
        assert not self.used(28, vectors=2, uses=20)

    def test_not_with_other_windows(self) -> None:
        assert not self.used(28, kernel=3, padding=1)
        assert not self.used(28, padding=1)


def test_a_sparse_weight_of_a_convolution_gets_larger_blocks() -> None:
    def block(vectors: int, nonzeros: int) -> int:
        return conv_schedules.packing(cpu.level("avx512"), (256, 256), 1, vectors, 32768, nonzeros)["block"]

    assert block(4, 256 * 256 // 2) == 86  # of three, for four fifths of the cache
    assert block(4, 256 * 256 // 5) == 128
    assert block(2, 256 * 256 // 5) == 256  # then no sums return
