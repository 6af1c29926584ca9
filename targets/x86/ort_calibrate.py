"""What differs in ONNX Runtime, measured for the cost model: its dense products, and the library's own dense form."""

from __future__ import annotations

import datetime
import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsecomp.kernels import panel
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.runtime.launch import KernelSource, Launch, Weights, function_of
from sparsecomp.runtime.ort_timing import product_call
from sparsecomp.targets.base import DENSE, Problem, WeightFacts
from sparsecomp.targets.x86 import calibration, cost, schedules
from sparsecomp.targets.x86.calibrate import (
    MEMORY_SHAPES,
    SHAPES,
    Result,
    left_out_error,
    measure_fma_peak,
    median_seconds,
)
from sparsecomp.targets.x86.cpu import best_level, caches, cpu_name, level
from sparsecomp.targets.x86.ort_target import full_panel, full_quantities, full_tiles

_TOKENS = {"dense_one": (1,), "dense_few": (2, 3, 4, 6, 8, 12), "dense": (16, 24, 32, 64, 100, 128, 256)}
_FULL_TOKENS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
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
    for name, rows in _measure(chosen, start + seconds).items():
        counted, taken = [row for row, _ in rows], np.array([nanoseconds for _, nanoseconds in rows])
        prices[name] = cost.fit(counted, taken)
        result.points[name], result.errors[name] = len(rows), left_out_error(counted, taken)
    activations = calibration.load(chosen).coefficients["rows"]["activations"]
    for model in prices.values():
        model["activations"] = activations
    result.seconds = time.perf_counter() - start
    now = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    notes = {"errors": result.errors, "points": result.points}
    result.path = str(calibration.save(chosen, prices, now, notes, "ort"))
    return result


def _measure(level_name: str, deadline: float) -> dict[str, list[Point]]:
    machine = cost.Machine(level(level_name), caches())
    outside = _outside()
    cases = {name: _grid(tokens) for name, tokens in _TOKENS.items()} | {"full": _grid(_FULL_TOKENS)}
    points: dict[str, list[Point]] = {name: [] for name in cases}
    for turn in itertools.count():
        for name, grid in cases.items():
            if turn >= _LEAST and time.perf_counter() > deadline:
                return points
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


def _outside() -> float:
    """Seconds of a call of a session beside its product."""
    return median_seconds(product_call(np.ones((1, 16), np.float32), np.ones((1, 16), np.float32), 1))


def full_call(
    level_name: str, weight: npt.NDArray[np.float32], x: npt.NDArray[np.float32]
) -> tuple[Callable[[], Any], Tensor]:
    """A product with a weight `[O, I]` in the library's dense form, without ONNX Runtime, and where its result goes."""
    machine = level(level_name)
    v, (tokens, inputs), outputs = full_panel(machine), x.shape, weight.shape[0]
    step = schedules.PANEL_STEP_COST
    tile = min(full_tiles(machine), key=lambda t: (-(-tokens // t) * (t + step), -t))
    schedule = schedules.panel_schedule(machine, v, tile)
    source = KernelSource(
        f"full{v}_{tile}", f"{schedule!r}", lambda: panel.build(schedule, Epilogue()), machine.tvm_target
    )
    panels = -(-outputs // v)
    values = np.zeros((panels * v, inputs), np.float32)
    values[:outputs] = weight
    arrays = [
        np.ascontiguousarray(values.reshape(panels, v, inputs).transpose(0, 2, 1)).reshape(-1),
        np.tile(np.arange(inputs, dtype=np.int32), panels),
        np.arange(panels + 1, dtype=np.int32) * np.int32(inputs),
    ]
    group = -(-tokens // tile) * tile
    dims = [tokens, inputs, outputs, group, 1]
    launch = Launch(function_of(source), Weights(arrays), dims, 1, 1, panel.SCRATCH_FLOATS)
    given, bias, out = torch.from_numpy(x), torch.zeros(outputs), torch.empty(tokens, outputs)
    return lambda: launch.run(given, bias, None, out), out
