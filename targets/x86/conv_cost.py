"""The cost model of convolutions on x86: what the sparse kernel and the dense one count; see `targets.x86.cost`."""

from __future__ import annotations

import math

from sparsecomp.kernels.conv_geometry import Geometry
from sparsecomp.kernels.depthwise import Layout
from sparsecomp.targets.base import Candidate, Problem
from sparsecomp.targets.cpu import conv_schedules as schedules
from sparsecomp.targets.cpu.counts import ACTIVATION_COST, shared_loads
from sparsecomp.targets.x86.cost import Machine, Quantities, traffic


def quantities(machine: Machine, candidate: Candidate, problem: Problem) -> tuple[str, Quantities]:
    """The model's name for a candidate on a convolution, and what it counts for the thread that has most to do."""
    window = problem.window
    if window is not None and window.is_depthwise(problem.facts.in_features):
        name = "dense_depthwise" if candidate.is_dense else "depthwise"
        counted = _depthwise(problem, candidate.is_dense)
    else:
        name = "dense_conv" if candidate.is_dense else "conv"
        counted = _dense(machine, problem) if candidate.is_dense else _sparse(machine, candidate, problem)
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
    packing = schedules.packing(level, shape, window.groups, widest, machine.caches.l1)
    packed_for = (widest, packing["block"])
    call = schedules.call(level, geometry, maps.images, rows, packed_for, problem.threads, machine.caches)
    blocks = math.ceil(shape[1] / packing["block"])
    # Passes over the whole weight that the busiest thread makes.
    passes = call.tiles * call.share(problem.threads)
    packed = passes * call.splits * window.groups * shape[1]
    loads = facts.nonzeros - shared_loads(facts)
    quads = math.ceil(rows[0] / 4) * window.groups * blocks
    planes = maps.images * shape[1] // window.taps * window.groups * len(geometry.phases)
    return {
        "multiply": passes * facts.nonzeros * call.vectors,
        "load": passes * loads * call.vectors,
        "step": passes * loads,
        "quad": passes * quads,
        "sums": passes * shape[0] * blocks * call.vectors,
        "pack_row": 0.0 if call.direct else packed,
        "pack": 0.0 if call.direct else packed * call.vectors,
        "direct": packed * call.vectors if call.direct else 0.0,
        "masked": packed * call.vectors if geometry.masked else 0.0,
        "runs": 0.0 if call.whole else passes * shape[0] * call.vectors,
        "open": planes * geometry.rows * geometry.pitch / problem.threads if geometry.opened else 0.0,
        **traffic(machine, 6 * facts.nonzeros + 32 * quads, passes, problem.threads),
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


def _depthwise(problem: Problem, dense: bool) -> Quantities:
    window, maps, share = problem.window, problem.maps, 1 / problem.threads
    if window is None or maps is None:
        raise ValueError("a convolution is priced for a window and maps, and the problem has none")
    height, width = window.output(maps.height, maps.width)
    outputs = maps.images * problem.facts.out_features * share
    # The library's form pads channels, ours the rows of a map.
    pitch = width if dense else Layout.of(window, maps).pitch
    return {
        "multiply": outputs * height * pitch * window.taps,
        "input": outputs * maps.height * maps.width,
        "output": outputs * height * width,
        "row": outputs * (height + maps.height),
        "channel": outputs,
        "call": 1.0,
    }
