"""The emulator finds the mistakes that a card would hide."""

import functools

import pytest
import torch
from cuda_emulation import compile_source

from sparsecomp.cuda.library import Launch

# One mistake by number in each branch; 0 has none.
SOURCE = """
#include <device.cuh>
extern "C" __global__ void faulty(Global<const float> x, Global<float> y, int fault) {
    SHARED(float, tile, 64);
    const int i = threadIdx.x, lane = i % 32, other = i ^ 32;
    if (blockIdx.x == 1) {
        if (fault == 10) y[0] = 1;
        if (fault == 11) y[70] = 1;
        return;
    }
    tile[i] = x[i];
    if (fault == 1) y[i] = tile[other];
    if (fault == 2) { __syncwarp(); y[i] = tile[other]; }
    if (fault == 3) y[i] = tile[i ^ 1];
    if (fault == 4) { __shfl_sync(ALL_LANES, i, 0); y[i] = tile[i ^ 1]; }
    if (fault == 5 && i == 63) y[i] = tile[i + 1];
    if (fault == 6) y[i + 64] = 1;
    if (fault == 7 && lane < 31) __syncwarp();
    if (fault == 8 && i < 32) __syncthreads();
    if (fault == 9) { if (lane < 16) warp_sum(1); else __ballot_sync(ALL_LANES, true); }
    if (fault == 12) y[0] = 1;
    if (fault == 13) { float pair[2]; load_pair(tile + (i | 1), pair); }
    if (fault == 14) { copy_async(tile + i / 16 * 16, x, false); }
    if (fault == 15) { __syncthreads(); if (i == 0) copy_async(tile + 4, x, false); y[i] = tile[i]; }
    if (fault == 16) { if (i == 0) { Words<1> w = load<1>(x + 64); y[0] = w[0]; } }
    if (fault == 17) { SHARED(float, other_tile, 4); if (i == 0) y[0] = other_tile[0]; }
    if (fault == 18) { __syncthreads(); float v = tile[other]; __syncwarp(); tile[i] = v; }
    __syncwarp();
    const float neighbour = tile[i ^ 1];
    __syncthreads();
    y[i] = tile[other] + neighbour;
}
"""
EXPECTED = {
    1: "race", 2: "race", 3: "race", 4: "race", 5: "bounds", 6: "bounds", 7: "deadlock", 8: "deadlock",
    9: "divergence", 10: "race", 11: "bounds", 12: "race", 13: "alignment", 14: "race", 15: "race", 16: "bounds",
    17: "unknown", 18: "race",
}  # fmt: skip


@functools.cache
def faulty():
    return compile_source(SOURCE, "faulty", ("F32",))


def run(fault, seed=0, blocks=1):
    x, y = torch.arange(64.0), torch.zeros(64)
    failure = faulty().run(Launch((blocks, 1, 1), (64, 1, 1)), [x, y, fault], seed)
    return x, y, failure


@pytest.mark.parametrize("seed", range(3))
def test_barriers_of_warps_and_blocks_order_memory(seed):
    x, y, failure = run(0, seed, 2)
    assert failure == ""
    i = torch.arange(64)
    assert torch.equal(y, x[i ^ 32] + x[i ^ 1])


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_mistake_fails_in_every_order_of_threads(fault):
    for seed in range(3):
        failure = run(fault, seed, 2)[2]
        # Which of two threads comes first decides whether a race is a value that was not written yet.
        expected = {"race", "unknown"} if EXPECTED[fault] == "race" else {EXPECTED[fault]}
        assert failure.split(":")[0] in expected, failure


@pytest.mark.parametrize("site", ["__syncwarp", "__syncthreads"])
def test_a_barrier_that_is_left_out_is_missed(site):
    run(0)
    found = [name for name in faulty().sites() if name.endswith(site)]
    x, y = torch.arange(64.0), torch.zeros(64)
    failures = [faulty().run(Launch((1, 1, 1), (64, 1, 1)), [x, y, 0], 0, name) for name in found]
    assert sum(failure.startswith(("race", "unknown")) for failure in failures) == 1  # the others were not reached
