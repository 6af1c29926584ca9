"""The cost model of ARM CPUs: cycles of the generated loops by llvm-mca, and bytes that come from memory.

No board is at hand when a model is exported, so a prediction is counted: rounds of each inner loop times its cycles
(`cycles.json`), what surrounds the loops (estimates, below), and the time that memory takes for weights beyond the
caches. `sparsecomp calibrate --from results.json` scales each family by what a board measured.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import Any

from sparsecomp.kernels.conv_geometry import Geometry
from sparsecomp.kernels.depthwise import Layout
from sparsecomp.kernels.dot import STEP
from sparsecomp.targets.arm.cpu import LANES, ROW_VECTORS, ArmCpu
from sparsecomp.targets.arm.dot import INT8, dot_tile, loop_name, packed_bytes, steps
from sparsecomp.targets.arm.kernels import (
    CONV_HALF,
    DENSE_V,
    HALF,
    PANEL_TILES,
    ROW_KERNELS,
    panel_schedule,
    panel_tile,
    row_level,
)
from sparsecomp.targets.base import DENSE, Candidate, Problem, WeightFacts
from sparsecomp.targets.cpu import conv_schedules, schedules
from sparsecomp.targets.cpu.counts import ACTIVATION_COST, shared_loads

# Cycles of what is around the loops: from the instructions of whole calls less those of the loops (384 to 1536 at 64
# tokens, counted under QEMU), at three a cycle.
_QUAD = 14.0  # reading the fields of a quad, two branches that are often mispredicted
_TILE_SUM = 6.5  # a vector of sums of a panel's register tile: begun, finished and stored
_SUM = 1.5  # a vector of sums that leaves and returns
_TRANSPOSED = 0.6  # a value that is transposed in or out
_STORED = 0.5  # an output with its bias
_PACKED = 1.5  # a vector of a convolution's tile
_MASKED = 2.0  # the same with a mask
_OPENED = 1.0  # a value of a map that is taken apart
_ACTIVATION = 5.0  # a vector of SiLU
_LINE_MISS = 40.0  # a call


@dataclass(frozen=True)
class Cost:
    """Cycles of the thread that has most to do, and bytes that come from memory."""

    cycles: float
    nbytes: float


@functools.cache
def _table() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(resources.files(__package__).joinpath("cycles.json").read_text())
    return content


def llvm_mca_version() -> str:
    """The version that gave the cycles."""
    version: str = _table()["llvm_mca"]
    return version


def loop_cycles(cpu: ArmCpu, loop: str) -> float:
    """Cycles of one round of an inner loop, see `sparsecomp.targets.arm.mca.loops_of`."""
    return float(_table()["cpus"][cpu.name][loop][2])


def fmla_share(cpu: ArmCpu, loop: str) -> float:
    """Multiply-adds of an inner loop, of 128 bits each, as a share of those that the CPU could start in its cycles."""
    fmla, _, cycles = _table()["cpus"][cpu.name][loop]
    return float(fmla / (cpu.fmla * cycles))


def predict_us(cpu: ArmCpu, candidate: Candidate, problem: Problem) -> float:
    """Microseconds of one call."""
    cost = _count(cpu, candidate, problem)
    values = problem.tokens * problem.facts.out_features / problem.threads
    cycles = cost.cycles + values / LANES * ACTIVATION_COST[problem.activation] * _ACTIVATION + _LINE_MISS
    # Weights are read in order, far ahead of their use: memory and arithmetic overlap.
    return max(cycles / cpu.ghz, cost.nbytes / cpu.bandwidth) / 1e3


def _count(cpu: ArmCpu, candidate: Candidate, problem: Problem) -> Cost:
    if problem.window is not None:
        if problem.window.is_depthwise(problem.facts.in_features):
            return _depthwise(cpu, problem)
        return _conv(cpu, candidate, problem)
    if candidate.kernel in ROW_KERNELS:
        return _rows(cpu, problem, candidate.kernel)
    if candidate.kernel == INT8:
        return _dot(cpu, problem, **dict(candidate.params))
    return _panel(cpu, candidate, problem)


def _rows(cpu: ArmCpu, problem: Problem, kernel: str) -> Cost:
    facts, level, half = problem.facts, row_level(cpu.level, kernel), kernel == HALF
    shape = (facts.out_features, facts.in_features)
    call = schedules.row_call(level, problem.tokens, shape, problem.threads)
    block = schedules.row_packing(level, shape, cpu.caches.l1, facts.nonzeros)["block"]
    quads = math.ceil(shape[0] / 4) * math.ceil(shape[1] / block)
    passes = call.tiles * call.share(problem.threads)
    tile = call.variant * level.lanes
    gathers = schedules.gathers(level, call, shape[0], cpu.caches.l2)
    # Sums of float16 leave as two vectors of float32, which are added to those that wait.
    sums = 4 * call.variant * _SUM * (4 if half else 1)
    cycles = _entries(cpu, facts, call.variant, kernel) + quads * (_QUAD + sums)
    cycles += (gathers * shape[1] + shape[0]) * tile * _TRANSPOSED + shape[0] * tile * _STORED
    nbytes = (3 if half else 5) * facts.nonzeros + 32 * quads
    return Cost(passes * cycles, _memory(cpu, nbytes, passes))


def _entries(cpu: ArmCpu, facts: WeightFacts, vectors: int, kernel: str = "rows") -> float:
    """Cycles of the kept entries of a weight, once over all of it."""
    # Entries that are in pairs, one load for both.
    together = min(2 * shared_loads(facts), facts.nonzeros)
    shared, own = (loop_cycles(cpu, f"{kernel}_{vectors}.{kind}") for kind in ("shared", "own"))
    return together / 8 * shared + (facts.nonzeros - together) / 4 * own


def _panel(cpu: ArmCpu, candidate: Candidate, problem: Problem) -> Cost:
    facts = problem.facts
    v = DENSE_V if candidate.is_dense else dict(candidate.params)["v"]
    tile = panel_tile(v, problem.tokens)
    parts = v // (panel_schedule(v, tile).vectors * LANES)
    panels = math.ceil(facts.out_features / v)
    columns = panels * facts.in_features if candidate.is_dense else facts.panels[v]
    tiles = math.ceil(problem.tokens / tile)
    share = 1 / problem.threads
    sums = tile * panel_schedule(v, tile).vectors
    loop = loop_cycles(cpu, f"panel_{v}_{tile}")
    if candidate.is_dense and tile == max(PANEL_TILES[v]):
        # Its loop has fewer loads for a multiply-add than that of rows that share their columns. A model that calls it
        # slower (that of apple-m1, an older core's) is not to be believed: sparse kernels would win for no reason.
        loop = min(loop, sums * loop_cycles(cpu, f"rows_{ROW_VECTORS}.shared") / (8 * ROW_VECTORS))
    cycles = tiles * (columns * parts * loop + panels * parts * sums * _TILE_SUM)
    groups = math.ceil(problem.tokens / schedules.GROUP_TOKENS)
    return Cost(cycles * share, _memory(cpu, columns * 4 * (v + 1), groups))


def _dot(cpu: ArmCpu, problem: Problem, v: int, window: int, fours: int = 0) -> Cost:
    facts, tile = problem.facts, dot_tile(v, problem.tokens)
    panels, tiles = math.ceil(facts.out_features / v), math.ceil(problem.tokens / tile)
    loop, sums = loop_cycles(cpu, loop_name(v, tile, window, own=fours > 0)), tile * v / LANES
    cycles = tiles * (steps(facts, v, window, fours) * loop + panels * sums * _TILE_SUM)
    cut = schedules.panel_cut(tile, problem.tokens, panels, problem.threads)
    # Every split of the panels makes the levels of its tokens.
    levels = problem.tokens * facts.in_features / STEP * loop_cycles(cpu, "levels") * cut.splits
    cycles = (cycles + levels) / problem.threads
    groups = math.ceil(problem.tokens / schedules.GROUP_TOKENS)
    return Cost(cycles, _memory(cpu, packed_bytes(facts, v, window, fours), groups))


def _conv(cpu: ArmCpu, candidate: Candidate, problem: Problem) -> Cost:
    facts, window, maps = problem.facts, problem.window, problem.maps
    half = candidate.kernel == CONV_HALF
    kernel = HALF if half else "rows"
    level = row_level(cpu.level, kernel)
    if window is None or maps is None:
        raise ValueError("a convolution is priced for a window and maps, and the problem has none")
    shape = (facts.out_features, facts.in_features)
    if candidate.pattern == DENSE.pattern:
        entries = shape[0] * shape[1]
        facts = WeightFacts(*shape, entries, {**facts.panels, 2: entries // 2}, ())
    geometry = Geometry.of(window, maps)
    rows = (shape[0] // window.groups, window.groups)
    uses = conv_schedules.uses(shape, window.groups, facts.nonzeros)
    block = conv_schedules.packing(level, shape, window.groups, ROW_VECTORS, cpu.caches.l1, facts.nonzeros)["block"]
    packed_for = (ROW_VECTORS, block, uses)
    call = conv_schedules.call(level, geometry, maps.images, rows, packed_for, problem.threads, cpu.caches)
    blocks = math.ceil(shape[1] / block)
    passes = call.tiles * call.share(problem.threads)
    quads = math.ceil(rows[0] / 4) * window.groups * blocks
    units = 2 if half else 1  # vectors of float32 that one of float16 is made of, and becomes
    packed = 0 if call.direct and not half else call.splits * window.groups * shape[1] * call.vectors * units
    sums = 4 * call.vectors * _SUM * (4 if half else 1)
    cycles = _entries(cpu, facts, call.vectors, kernel) + quads * (_QUAD + sums)
    cycles += packed * (_MASKED if geometry.masked else _PACKED) + shape[0] * call.vectors * level.lanes * _STORED
    planes = maps.images * shape[1] // window.taps * window.groups * len(geometry.phases)
    opened = planes * geometry.rows * geometry.pitch * _OPENED / problem.threads if geometry.opened else 0.0
    return Cost(passes * cycles + opened, _memory(cpu, (4 if half else 6) * facts.nonzeros, passes))


def _depthwise(cpu: ArmCpu, problem: Problem) -> Cost:
    window, maps = problem.window, problem.maps
    if window is None or maps is None:
        raise ValueError("a convolution is priced for a window and maps, and the problem has none")
    layout = Layout.of(window, maps)
    height, width = window.output(maps.height, maps.width)
    schedule = conv_schedules.depthwise_schedule(cpu.level, layout, window, maps)
    outputs = maps.images * problem.facts.out_features / problem.threads
    tiles = math.ceil(layout.positions(height, width) / schedule.tile)
    loops = tiles * window.taps * loop_cycles(cpu, f"depthwise_{schedule.vectors}")
    copied = maps.height * maps.width / LANES * _PACKED + height * width * _STORED
    return Cost(outputs * (loops + copied), 0.0)


def _memory(cpu: ArmCpu, nbytes: float, passes: float) -> float:
    """Bytes from memory of a weight that is read so many times: all of what half of the last cache does not hold.

    An L3 cache keeps up: a round of the row kernel takes its bytes in more cycles than the cache needs to give them.
    """
    return nbytes * passes if nbytes > cpu.caches.l3 / 2 else 0.0
