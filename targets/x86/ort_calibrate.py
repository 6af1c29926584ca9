"""What differs in ONNX Runtime, measured for the cost model: its dense products, and the library's own dense form."""

from __future__ import annotations

import datetime
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsecomp.kernels import panel
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.patterns import PanelWeight
from sparsecomp.runtime.launch import KernelSource, Launch, Weights, function_of
from sparsecomp.runtime.ort_timing import conv_chain_call, product_call
from sparsecomp.targets.base import DENSE, Problem, WeightFacts
from sparsecomp.targets.cpu import schedules
from sparsecomp.targets.cpu.timing import median_seconds
from sparsecomp.targets.x86 import calibration, conv_cost, cost
from sparsecomp.targets.x86.calibrate import (
    MEMORY_SHAPES,
    SHAPES,
    Result,
    left_out_error,
    measure_fma_peak,
)
from sparsecomp.targets.x86.cpu import best_level, caches, cpu_name, level
from sparsecomp.targets.x86.ort_target import full_panel, full_quantities, full_tile
from sparsecomp.window import Maps, Window

_TOKENS = {"dense_one": (1,), "dense_few": (2, 3, 4, 6, 8, 12), "dense": (16, 24, 32, 64, 100, 128, 256)}
_FULL_TOKENS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
CHANNELS, MAPS = (32, 64, 128, 256, 512), (7, 14, 28, 56)
_MOST_PRODUCTS = 6e7
_MORE = 3
_SECONDS = 20.0
_LEAST = 12

Point = tuple[cost.Quantities, float]


def calibrate(seconds: float = _SECONDS, level_name: str | None = None) -> Result:
    """Measure, fit and write the prices of ONNX Runtime on this machine, with one thread.

    Args:
        seconds: for measurements.
        level_name: instruction set level of the kernels; the machine's highest if None.

    Returns:
        What was found.
    """
    chosen = level_name or best_level()
    start = time.perf_counter()
    result = Result(cpu_name(), chosen, measure_fma_peak(chosen))
    prices = {}
    points, reorder = _measure(chosen, start + seconds)
    for name, rows in points.items():
        counted, taken = [row for row, _ in rows], np.array([nanoseconds for _, nanoseconds in rows])
        prices[name] = cost.fit(counted, taken)
        result.points[name], result.errors[name] = len(rows), left_out_error(counted, taken)
    activations = calibration.load(chosen).coefficients["rows"]["activations"]
    for model in prices.values():
        model["activations"] = activations
    prices["reorder"] = {"value": reorder}
    result.seconds = time.perf_counter() - start
    now = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    notes = {"errors": result.errors, "points": result.points}
    result.path = str(calibration.save(chosen, prices, now, notes, "ort"))
    return result


def _measure(level_name: str, deadline: float) -> tuple[dict[str, list[Point]], float]:
    """Measurements by model, and nanoseconds of a value whose layout changes."""
    machine = cost.Machine(level(level_name), caches())
    outside = _outside()
    cases = {name: _grid(tokens) for name, tokens in _TOKENS.items()} | {"full": _grid(_FULL_TOKENS)}
    convs = _conv_grid()
    reorders: list[float] = []
    points: dict[str, list[Point]] = {name: [] for name in (*cases, "dense_conv")}
    for turn in itertools.count():
        if turn >= _LEAST and time.perf_counter() > deadline:
            return points, statistics.median(reorders)
        point, moved = _conv_point(machine, *next(convs))
        points["dense_conv"].append(point)
        reorders.append(moved)
        for name, grid in cases.items():
            (outputs, inputs), tokens = next(grid)
            weight = np.random.default_rng(0).standard_normal((outputs, inputs)).astype(np.float32)
            x = np.random.default_rng(1).standard_normal((tokens, inputs)).astype(np.float32)
            problem = Problem(WeightFacts.of(torch.from_numpy(weight)), tokens, 1)
            if name == "full":
                counted = full_quantities(machine, problem)
                taken = median_seconds(full_call(level_name, weight, x)[0])
            else:
                _, counted = cost.quantities(machine, DENSE, problem)
                taken = max(median_seconds(product_call(weight, x, 1)) - outside, 1e-7)
            points[name].append((counted, 1e9 * taken))
    raise AssertionError("unreachable")


def _grid(tokens: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], int]]:
    """The shapes with each number of tokens in a fixed random order, again and again."""
    order, cases = random.Random(0), list(itertools.product((*SHAPES, *MEMORY_SHAPES), tokens))
    while True:
        order.shuffle(cases)
        yield from cases


def _conv_grid() -> Iterator[tuple[int, int, int]]:
    """Channels, sizes of the kernel and of the maps, in a fixed random order, again and again."""
    order = random.Random(0)
    cases = [
        (channels, kernel, size)
        for channels, kernel, size in itertools.product(CHANNELS, (1, 3), MAPS)
        if channels * channels * kernel * kernel * size * size < _MOST_PRODUCTS
    ]
    while True:
        order.shuffle(cases)
        yield from cases


def _conv_point(machine: cost.Machine, channels: int, kernel: int, size: int) -> tuple[Point, float]:
    """A convolution among others, as what more of them in a chain take, and nanoseconds of a value in another layout.

    At the ends of the chain the layout is changed.
    """
    window, maps = Window((kernel, kernel), padding=(kernel // 2, kernel // 2)), Maps(1, size, size)
    facts = WeightFacts(channels, channels * kernel * kernel, channels * channels * kernel * kernel, {}, ())
    problem = Problem(facts, maps.positions(window), 1, window=window, maps=maps)
    _, counted = conv_cost.quantities(machine, DENSE, problem)
    one, several = (median_seconds(conv_chain_call(channels, kernel, size, length)) for length in (1, 1 + _MORE))
    among = max((several - one) / _MORE, 1e-7)
    values = 2 * channels * size * size
    return (counted, 1e9 * among), 1e9 * max(one - among, 0.0) / values


def _outside() -> float:
    """Seconds of a call of a session beside its product."""
    return median_seconds(product_call(np.ones((1, 16), np.float32), np.ones((1, 16), np.float32), 1))


def full_call(
    level_name: str, weight: npt.NDArray[np.float32], x: npt.NDArray[np.float32]
) -> tuple[Callable[[], Any], Tensor]:
    """A product with a weight `[O, I]` in the library's dense form, without ONNX Runtime, and where its result goes."""
    machine = level(level_name)
    v, (tokens, inputs), outputs = full_panel(machine), x.shape, weight.shape[0]
    tile = full_tile(machine, tokens)
    schedule = schedules.panel_schedule(machine, v, tile)
    source = KernelSource(
        f"full{v}_{tile}", f"{schedule!r}", lambda: panel.build(schedule, Epilogue()), machine.tvm_target
    )
    arrays = panel.weights(PanelWeight.full(torch.from_numpy(weight), v), schedule.width)
    group = -(-tokens // tile) * tile
    dims = [tokens, inputs, outputs, group, 1]
    launch = Launch(function_of(source), Weights(arrays), dims, 1, 1, panel.SCRATCH_FLOATS)
    given, bias, out = torch.from_numpy(x), torch.zeros(outputs), torch.empty(tokens, outputs)
    return lambda: launch.run(given, bias, None, out), out
