"""The cost model of x86: for every kernel family a few counted quantities, and nanoseconds per unit of each.

A prediction is a roofline in the sense that compute, cache traffic and memory traffic are counted from the shapes, and
that what one unit of each costs was measured (`sparsecomp calibrate`), not typed. The quantities are linear in the
unknowns, so calibration is a non-negative least squares fit, and a coefficient can be read: it is a time per unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sparsecomp.kernels.panel import PanelSchedule
from sparsecomp.targets.base import Candidate, Problem, WeightFacts
from sparsecomp.targets.cpu import schedules
from sparsecomp.targets.cpu.counts import ACTIVATION_COST, shared_loads
from sparsecomp.targets.cpu.level import Caches, Level

Quantities = dict[str, float]
# Tokens up to which a dense product is a stream of its weight rather than a product of matrices.
DENSE_FEW = 12


@dataclass(frozen=True)
class Machine:
    """What the counting needs: the schedules' level, the caches, and whether all weights come from memory."""

    level: Level
    caches: Caches
    streamed: bool = False


def quantities(machine: Machine, candidate: Candidate, problem: Problem) -> tuple[str, Quantities]:
    """The model's name for a candidate on a problem, and what it counts there.

    The counts are those of the thread that has most to do; traffic to memory is shared by all.
    """
    counter, model = _COUNTERS[candidate.kernel]
    name = model(problem)
    counted = counter(machine, candidate, problem)
    facts = problem.facts
    # The epilogue of a dense linear runs in Inductor's code, which costs about the same per value.
    values = problem.tokens * facts.out_features * ACTIVATION_COST[problem.activation] / problem.threads
    counted["activations"] = values
    return name, counted


def _rows(machine: Machine, candidate: Candidate, problem: Problem) -> Quantities:
    facts, level = problem.facts, machine.level
    shape = (facts.out_features, facts.in_features)
    call = schedules.row_call(level, problem.tokens, shape, problem.threads)
    packing = schedules.row_packing(level, shape, machine.caches.l1, facts.nonzeros)
    blocks = math.ceil(shape[1] / packing["block"])
    share = call.share(problem.threads)
    # Passes over the weight: one for every tile.
    passes = call.tiles * share
    nonzeros, vectors = facts.nonzeros, call.variant
    loads = nonzeros - shared_loads(facts)
    quads = math.ceil(shape[0] / 4) * blocks
    tile = vectors * level.lanes
    return {
        "multiply": passes * nonzeros * vectors,
        "load": passes * loads * vectors,
        "step": passes * loads,
        "quad": passes * quads,
        "sums": passes * quads * vectors,
        "transpose_in": passes * schedules.gathers(level, call, shape[0], machine.caches.l2) * shape[1] * tile,
        "transpose_out": passes * shape[0] * tile,
        **traffic(machine, 4 * nonzeros + loads + 32 * quads, passes, problem.threads),
        "call": 1.0,
    }


def _panel(machine: Machine, candidate: Candidate, problem: Problem) -> Quantities:
    facts, level = problem.facts, machine.level
    v = dict(candidate.params)["v"]
    shape = (facts.out_features, facts.in_features)
    call = schedules.panel_call(level, v, problem.tokens, shape, problem.threads)
    schedule: PanelSchedule = schedules.panel_schedule(level, v, call.variant)
    share = call.share(problem.threads)
    columns = facts.panels[v] * (v // (schedule.lanes * schedule.vectors))
    passes = call.tiles * share
    parts = math.ceil(shape[0] / v) * (v // (schedule.lanes * schedule.vectors))
    nbytes = facts.panels[v] * 4 * (v + 1)
    # The latency of a multiply-add bounds a small register tile.
    chain = max(schedule.tokens * schedule.vectors, _LATENCY)
    return {
        "multiply": passes * columns * chain,
        "broadcast": passes * columns * schedule.tokens,
        "step": passes * columns * schedule.vectors,
        "tile": passes * parts,
        "store": passes * schedule.tokens * shape[0],
        **traffic(machine, nbytes, call.items / call.splits * share, problem.threads),
        "call": 1.0,
    }


# Multiply-adds in flight that keep the units busy: latency x throughput.
_LATENCY = 5


def _gather(machine: Machine, candidate: Candidate, problem: Problem) -> Quantities:
    facts = problem.facts
    group = schedules.gather_schedule(machine.level).group
    share = 1 / min(problem.threads, max(facts.out_features, 1))
    # On average half a group of padding for every row.
    slots = facts.nonzeros + facts.out_features * group / 2
    return {
        "entry": problem.tokens * slots * share,
        "row": problem.tokens * facts.out_features * share,
        **traffic(machine, 6 * slots, problem.tokens * share, problem.threads),
        "call": 1.0,
    }


def _mask(machine: Machine, candidate: Candidate, problem: Problem) -> Quantities:
    facts = problem.facts
    share = 1 / min(problem.threads, max(facts.out_features, 1))
    words = facts.out_features * math.ceil(facts.in_features / 16)
    return {
        "word": problem.tokens * words * share,
        "row": problem.tokens * facts.out_features * share,
        **traffic(machine, 4 * facts.nonzeros + 2 * words, problem.tokens * share, problem.threads),
        "call": 1.0,
    }


def skip_quantities(machine: Machine, facts: WeightFacts, kept: float, tokens: int, threads: int) -> Quantities:
    """What a linear counts of which a share of the units or inputs stays, for one token."""
    union = 1 - (1 - kept) ** tokens
    nbytes = 4.0 * facts.out_features * facts.in_features
    return {
        "unit": float(tokens * facts.in_features),
        "multiply": tokens * union * nbytes / 4 / threads,
        **traffic(machine, nbytes, union / threads, threads),
        "call": 1.0,
    }


def masked_skip_quantities(machine: Machine, facts: WeightFacts, kept: float, tokens: int, threads: int) -> Quantities:
    """As `skip_quantities`, for rows that are packed with a bit mask, by the names of the kernel `mask`."""
    union = 1 - (1 - kept) ** tokens
    words = facts.out_features * math.ceil(facts.in_features / 16)
    return {
        "word": tokens * union * words / threads,
        "row": tokens * union * facts.in_features / threads,
        **traffic(machine, 4 * facts.nonzeros + 2 * words, union / threads, threads),
        "call": 1.0,
    }


def _dense(machine: Machine, candidate: Candidate, problem: Problem) -> Quantities:
    facts, tokens = problem.facts, problem.tokens
    entries = facts.out_features * facts.in_features
    # A single row is a product with a vector, for which MKL takes one thread (PyTorch 2.13, measured on a Zen 5).
    threads = 1 if tokens == 1 and problem.dtype == torch.float32 else problem.threads
    share = 1 / threads
    # A library pads small matrices to its register tiles.
    rows = math.ceil(tokens / 4) * 4 if tokens > DENSE_FEW else tokens
    return {
        "multiply": rows * entries * share,
        "weight": entries * share,
        "activation": tokens * (facts.in_features + facts.out_features) * share,
        **traffic(machine, 4 * entries, share, threads),
        "call": 1.0,
    }


def traffic(machine: Machine, nbytes: float, passes: float, threads: int) -> Quantities:
    """Bytes that come from the L3 cache or from memory: of a weight that is read `passes` times.

    What fits the L2 cache costs nothing beside the loads that are counted anyway; of what is larger than the L3 cache
    all comes from memory, which the threads share.
    """
    if machine.streamed:
        return {"l3_bytes": 0.0, "memory_bytes": nbytes * passes * (1 + 0.5 * (threads - 1))}
    if nbytes <= machine.caches.l2 / 2:
        return {"l3_bytes": 0.0, "memory_bytes": 0.0}
    # A weight of about the size of the cache keeps a part of itself there.
    missing = min(1.0, max(0.0, nbytes / machine.caches.l3 - 0.5))
    moved = nbytes * passes
    return {"l3_bytes": moved * (1 - missing), "memory_bytes": moved * missing * (1 + 0.5 * (threads - 1))}


_COUNTERS: dict[str, tuple[Callable[[Machine, Candidate, Problem], Quantities], Callable[[Problem], str]]] = {
    "rows": (_rows, lambda problem: "rows"),
    "panel": (_panel, lambda problem: "panel_one" if problem.tokens == 1 else "panel"),
    "gather": (_gather, lambda problem: "gather"),
    "mask": (_mask, lambda problem: "mask"),
    "dense": (_dense, lambda problem: _dense_regime(problem.tokens)),
}


def _dense_regime(tokens: int) -> str:
    if tokens == 1:
        return "dense_one"
    return "dense_few" if tokens <= DENSE_FEW else "dense"


Coefficients = Mapping[str, Mapping[str, float]]


def price(coefficients: Coefficients, name: str, counted: Quantities) -> float:
    """Microseconds of one call, from what a model counts for it."""
    prices = coefficients[name]
    return sum(prices.get(quantity, 0.0) * amount for quantity, amount in counted.items()) / 1e3


def fit(rows: list[Quantities], nanoseconds: npt.NDArray[np.float64]) -> dict[str, float]:
    """Prices that minimise the squared relative error, none negative (Lawson and Hanson's NNLS).

    Args:
        rows: the quantities of each measurement, all with the same names.
        nanoseconds: what each took.

    Returns:
        Nanoseconds per unit.
    """
    from scipy.optimize import nnls

    names = list(rows[0])
    matrix = np.array([[row[name] for name in names] for row in rows]) / nanoseconds[:, None]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    prices, _ = nnls(matrix / scale, np.ones(len(rows)))
    return dict(zip(names, (prices / scale).tolist(), strict=True))
