"""A kernel that does nothing but multiply-adds in registers: it measures the peak that fractions are given of."""

from __future__ import annotations

from sparsecomp.kernels import tir

DIMS = ("rounds",)
CHAINS = 12
"""Independent chains: more than latency x throughput of any x86 core's multiply-add, and they fit 16 registers."""


def flops(lanes: int, rounds: int) -> int:
    """Floating-point operations of one item."""
    return 2 * CHAINS * lanes * rounds


def build(lanes: int) -> tir.Expr:
    """The kernel in TIR: `CHAINS` vectors, each multiplied by x[0] and added x[1], `rounds` times."""
    builder = tir.KernelBuilder("peak", ())
    with builder.build() as args:
        (rounds,) = args.sizes(*DIMS)
        total = tir.registers(CHAINS * lanes)
        factor = tir.bind(tir.splat(args["x"][0], lanes))
        addend = tir.bind(tir.splat(args["x"][1], lanes))
        for chain in range(CHAINS):
            tir.store(total, chain * lanes, tir.const(float(chain), lanes=lanes), lanes)
        with tir.loop(rounds):
            for chain in range(CHAINS):
                slot = chain * lanes
                tir.store(total, slot, tir.load(total, slot, lanes) * factor + addend, lanes)
        joined = tir.load(total, 0, lanes)
        for chain in range(1, CHAINS):
            joined = joined + tir.load(total, chain * lanes, lanes)
        tir.store(args["y"], 0, joined, lanes)
    return builder.function
