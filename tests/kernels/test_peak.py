"""The kernel that measures the peak: it computes what it says, so that what is timed is that many multiply-adds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_cases import HERE, assembly, close, needs_x86

from sparsecomp.kernels import peak
from sparsecomp.runtime.launch import KernelSource, Launch, Weights, function_of


@needs_x86
@pytest.mark.parametrize("rounds", [0, 1, 7])
@pytest.mark.parametrize("lanes", [4, 8])
def test_every_chain_is_multiplied_and_added(lanes: int, rounds: int) -> None:
    source = KernelSource("peak", repr(lanes), lambda: peak.build(lanes), HERE)
    factor, addend = 0.5, 1.25
    out = torch.empty(lanes)
    call = Launch(function_of(source), Weights([]), [rounds], 1, 1, 0)
    call.run(torch.tensor([factor, addend]), torch.zeros(1), None, out)
    chains = np.arange(peak.CHAINS, dtype=np.float64)
    for _ in range(rounds):
        chains = chains * factor + addend
    close(out, torch.full((lanes,), float(chains.sum())))


def test_operations_are_counted() -> None:
    assert peak.flops(8, 10) == 2 * 12 * 8 * 10


@pytest.mark.parametrize(("level", "lanes", "register"), [("avx512", 16, "zmm"), ("avx2", 8, "ymm")])
def test_all_chains_are_fused_in_registers(level: str, lanes: int, register: str) -> None:
    text = assembly(peak.build(lanes), level)
    fused = [line for line in text.splitlines() if "vfmadd" in line]
    assert len(fused) >= peak.CHAINS
    assert all(register in line and "(" not in line for line in fused)
