"""The cost model against the clock: predicted and measured latency of layers of different shape, pattern and density.

`python benchmarks/bench_cost_model.py [--quick]`; `make bench` runs it. It uses the calibration that is in force
(`sparsecomp info`).
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics

import torch
from bench_kernels import Case, prepare
from timing import Results, Row, interleave
from torch.nn import functional

from sparsecomp.targets import get_target
from sparsecomp.targets.base import DENSE, Problem, Target, WeightFacts

# None of these shapes, and of the token counts only the single token, is among those that calibration measures: on the
# calibration's own shapes the error would say how well a fit fits.
SHAPES = ((320, 960), (512, 512), (640, 2560), (1024, 1024), (1280, 640), (1000, 520), (2560, 1920), (896, 2304))
TOKENS = (1, 3, 24, 48, 96, 200, 1000)
PATTERNS = ("unstructured@0.5", "unstructured@0.7", "unstructured@0.8", "unstructured@0.9", "unstructured@0.95")
PATTERNS += ("2:4", "1:4", "4:16", "32:2:4", "16:2:8", "8:1:4", "16x1@0.75", "32x1@0.9")


def grid(size: int) -> list[Case]:
    """The cases: drawn once from all combinations, the same in every run."""
    every = list(itertools.product(PATTERNS, TOKENS, SHAPES))
    return [Case(pattern, tokens, *shape) for pattern, tokens, shape in random.Random(0).sample(every, size)]


def run_case(target: Target, case: Case, threads: int, rounds: int) -> tuple[Row, float]:
    """Measure one case: the error of the sparse prediction in percent, and that of the dense one."""
    candidate, predicted, kernel, weight = prepare(target, case, threads)
    x = torch.randn(case.tokens, case.in_features)
    bias = torch.randn(case.out_features)
    out = torch.empty(case.tokens, case.out_features)
    timings = interleave(
        {
            "sparse": lambda: kernel.run(x, bias, None, "none", out),
            "dense": lambda: functional.linear(x, weight, bias),
        },
        rounds=rounds,
        sample_us=5_000,
    )
    measured, dense_measured = timings.median("sparse"), timings.median("dense")
    dense_predicted = target.predict(DENSE, Problem(WeightFacts.of(weight), case.tokens, threads))
    error = 100 * abs(predicted - measured) / measured
    details = {
        "kernel": str(candidate),
        "us": measured,
        "predicted us": predicted,
        "dense us": dense_measured,
        "dense predicted us": dense_predicted,
        # The planner's question: would it have picked the faster of the two?
        "right choice": (predicted < dense_predicted) == (measured < dense_measured),
    }
    return Row(str(case), error, "% error", details=details), 100 * abs(
        dense_predicted - dense_measured
    ) / dense_measured


def main() -> None:
    """Run the grid, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 layers and few rounds, for a first look")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    target = get_target()
    cases = grid(20 if arguments.quick else 60)
    rounds = 5 if arguments.quick else 15
    results = Results(
        "cost_model", notes=[f"target {target.name}: {target.description}", f"{arguments.threads} thread(s)"]
    )
    dense_errors = []
    with torch.inference_mode():
        for case in cases:
            row, dense_error = run_case(target, case, arguments.threads, rounds)
            results.add(row)
            dense_errors.append(dense_error)
    errors = [row.value for row in results.rows]
    right = sum(bool(row.details["right choice"]) for row in results.rows)
    details = {
        "90th percentile": statistics.quantiles(errors, n=10)[-1],
        "largest": max(errors),
        "dense median": statistics.median(dense_errors),
        "right choices": f"{right}/{len(cases)}",
    }
    median = statistics.median(errors)
    results.add(Row(f"median of {len(cases)} layers", median, "% error", 20, at_most=True, details=details))
    results.finish()


if __name__ == "__main__":
    main()
