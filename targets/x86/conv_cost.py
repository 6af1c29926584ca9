"""The cost model of convolutions on x86: what the sparse kernel and the dense one count; see `targets.x86.cost`."""

from __future__ import annotations

import math

from sparsecomp.kernels import conv_strips
from sparsecomp.kernels.conv_geometry import Geometry
from sparsecomp.targets.base import Candidate, Problem, WeightFacts
from sparsecomp.targets.cpu import conv_schedules as schedules
from sparsecomp.targets.cpu import strip_schedules
from sparsecomp.targets.cpu.counts import ACTIVATION_COST, shared_loads
from sparsecomp.targets.x86.cost import Machine, Quantities, traffic


def quantities(machine: Machine, candidate: Candidate, problem: Problem) -> tuple[str, Quantities]:
    """The model's name for a candidate on a convolution, and what it counts for the thread that has most to do."""
    window = problem.window
    if window is not None and window.is_depthwise(problem.facts.in_features):
        name = "dense_depthwise" if candidate.is_dense else "depthwise"
        counted = _dense_depthwise(problem) if candidate.is_dense else _depthwise(machine, problem)
    elif candidate.is_dense:
        name, counted = "dense_conv", _dense(machine, problem)
    else:
        name, counter = candidate.kernel, _strips if candidate.kernel == "conv_strips" else _sparse
        counted = counter(machine, candidate, problem)
    values = problem.tokens * problem.facts.out_features * ACTIVATION_COST[problem.activation] / problem.threads
    counted["activations"] = values
    if candidate.is_dense and (problem.activation != "none" or problem.residual):
        # What follows a dense convolution is a pass of its own over its output.
        counted["output"] *= 2
    return name, counted


def _sparse(machine: Machine, candidate: Candidate, problem: Problem) -> Quantities:
    facts, level, window, maps = problem.facts, machine.level, problem.window, problem.maps
    if window is None or maps is None:
        raise ValueError("a convolution is priced for a window and maps, and the problem has none")
    widest = dict(candidate.params)["vectors"]
    shape = (facts.out_features, facts.in_features)
    geometry = Geometry.of(window, maps)
    rows = (shape[0] // window.groups, window.groups)
    packing = schedules.packing(level, shape, window.groups, widest, machine.caches.l1, facts.nonzeros)
    packed_for = (widest, packing["block"], schedules.uses(shape, window.groups, facts.nonzeros))
    call = schedules.call(level, geometry, maps.images, rows, packed_for, problem.threads, machine.caches, tails=True)
    blocks = math.ceil(shape[1] / packing["block"])
    quads = math.ceil(rows[0] / 4) * window.groups * blocks
    planes = maps.images * shape[1] // window.taps * window.groups * len(geometry.phases)
    total: Quantities = {
        "open": planes * geometry.rows * geometry.pitch / problem.threads if geometry.opened else 0.0,
        "call": float(len(call.parts)),
    }
    for part in call.parts:
        # Passes over the whole weight that the busiest thread makes.
        passes = part.tiles * part.share(problem.threads)
        packed = passes * part.splits * window.groups * shape[1]
        counted = {
            **_inner_loop(facts, part.vectors, passes, quads, blocks),
            "pack_row": 0.0 if part.direct else packed,
            "pack": 0.0 if part.direct else packed * part.vectors,
            "direct": packed * part.vectors if part.direct else 0.0,
            "masked": packed * part.vectors if geometry.masked else 0.0,
            "runs": 0.0 if part.whole else passes * shape[0] * part.vectors,
            **traffic(machine, 5 * facts.nonzeros + 32 * quads, passes, problem.threads),
        }
        for name, amount in counted.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _inner_loop(facts: WeightFacts, vectors: int, passes: float, quads: int, blocks: int) -> Quantities:
    """What the loop over quads does in so many passes over a weight, which both kernels share."""
    loads = facts.nonzeros - shared_loads(facts)
    return {
        "multiply": passes * facts.nonzeros * vectors,
        # Tiles of more vectors leave no registers for words that are loaded ahead.
        "wide": passes * facts.nonzeros * vectors if vectors > 4 else 0.0,
        "load": passes * loads * vectors,
        "step": passes * loads,
        "quad": passes * quads,
        "sums": passes * facts.out_features * blocks * vectors,
    }


def _strips(machine: Machine, candidate: Candidate, problem: Problem) -> Quantities:
    facts, level, window, maps = problem.facts, machine.level, problem.window, problem.maps
    if window is None or maps is None:
        raise ValueError("a convolution is priced for a window and maps, and the problem has none")
    widest = dict(candidate.params)["vectors"]
    shape = (facts.out_features, facts.in_features)
    packing = strip_schedules.packing(level, shape, window, widest, machine.caches.l1, facts.nonzeros)
    if packing is None:
        raise ValueError(f"there is no kernel in strips for a window {window}")
    rows = shape[0] // window.groups
    call = strip_schedules.call(level, window, maps, rows, widest, problem.threads, machine.caches)
    blocks = math.ceil(shape[1] // window.taps / packing.block)
    passes = call.tiles * call.share(problem.threads)
    channels = passes * call.splits * window.groups * shape[1] // window.taps
    packed = channels * window.kernel[1] * conv_strips.rows_read(window, call.vectors)
    quads = math.ceil(rows / 4) * window.groups * blocks
    narrow = window.output(maps.height, maps.width)[1] < level.lanes
    return {
        **_inner_loop(facts, call.vectors, passes, quads, blocks),
        "channel": channels,
        "pack": packed,
        "pack_step": packed if window.stride[1] > 1 else 0.0,
        "pieces": passes * shape[0] * call.vectors if narrow else 0.0,
        **traffic(machine, 5 * facts.nonzeros + 32 * quads, passes, problem.threads),
        "call": 1.0,
    }


def _dense(machine: Machine, problem: Problem) -> Quantities:
    facts, window, maps = problem.facts, problem.window, problem.maps
    if window is None or maps is None:
        raise ValueError("a convolution is priced for a window and maps, and the problem has none")
    entries = facts.out_features * facts.in_features
    share = 1 / problem.threads
    inputs = maps.images * facts.in_features // window.taps * window.groups * maps.height * maps.width
    # A library pads few channels of a group to its vectors.
    width = 16
    rows = facts.out_features // window.groups
    padded = entries * math.ceil(rows / width) * width / max(rows, 1)
    return {
        "multiply": problem.tokens * padded * share if window.taps == 1 else 0.0,
        "multiply_taps": problem.tokens * padded * share if window.taps > 1 else 0.0,
        "weight": entries * share,
        "input": inputs * share,
        "output": problem.tokens * facts.out_features * share,
        **traffic(machine, 4 * entries, share, problem.threads),
        "call": 1.0,
    }


def _dense_depthwise(problem: Problem) -> Quantities:
    window, maps, share = problem.window, problem.maps, 1 / problem.threads
    if window is None or maps is None:
        raise ValueError("a convolution is priced for a window and maps, and the problem has none")
    height, width = window.output(maps.height, maps.width)
    outputs = maps.images * problem.facts.out_features * share
    return {
        "multiply": outputs * height * width * window.taps,
        "input": outputs * maps.height * maps.width,
        "output": outputs * height * width,
        "row": outputs * (height + maps.height),
        "channel": outputs,
        "call": 1.0,
    }


def _depthwise(machine: Machine, problem: Problem) -> Quantities:
    window, maps = problem.window, problem.maps
    if window is None or maps is None:
        raise ValueError("a convolution is priced for a window and maps, and the problem has none")
    height, width = window.output(maps.height, maps.width)
    schedule = strip_schedules.depthwise(machine.level, window, maps)
    outputs = maps.images * problem.facts.out_features / problem.threads
    tiles = outputs * math.ceil(height / schedule.rows) * math.ceil(width / schedule.lanes)
    loads = tiles * window.kernel[1] * len(schedule.loads)
    return {
        "multiply": tiles * schedule.rows * window.taps,
        "load": loads,
        "load_step": loads if window.stride[1] > 1 else 0.0,
        "store": tiles * schedule.rows,
        "pieces": tiles * schedule.rows if schedule.piece < schedule.lanes else 0.0,
        "tile": tiles,
        "input": outputs * maps.height * maps.width,
        "call": 1.0,
    }
