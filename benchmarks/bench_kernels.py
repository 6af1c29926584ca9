"""Kernels by themselves: their share of the machine's peak, and their speed over `F.linear`.

`python benchmarks/bench_kernels.py [--quick] [--threads 1]`; `make bench` runs it. The peak is measured
before and after every case, so that a machine that is slowed for a while does not make a kernel look bad.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timing import Results, Row, interleave, measure_peak, rounds_of, timed_parser
from torch.nn import functional

from sparsecomp import Pattern
from sparsecomp.targets import get_target
from sparsecomp.targets.base import Candidate, Kernel, Problem, Target, WeightFacts


@dataclass(frozen=True)
class Case:
    """A linear layer with a pruned weight.

    Attributes:
        pattern: that the weight is pruned to.
        tokens: rows of x.
        in_features: I.
        out_features: O.
        goal: of the share of peak, or of the speed over `F.linear` where `of_peak` is false.
        of_peak: which of the two counts.
    """

    pattern: str
    tokens: int
    in_features: int
    out_features: int
    goal: float | None = None
    of_peak: bool = True

    def __str__(self) -> str:
        tokens = f"{self.tokens} token{'s' if self.tokens > 1 else ''}"
        return f"{self.pattern}, {self.in_features} to {self.out_features}, {tokens}"


CASES = (
    Case("32:2:4", 1024, 768, 3072, 0.88),
    Case("unstructured@0.5", 1024, 768, 3072, 0.70),
    Case("unstructured@0.8", 1024, 768, 3072, 0.64),
    Case("unstructured@0.9", 1024, 768, 3072, 0.56),
    Case("2:4", 1024, 768, 3072),
    Case("16x1@0.75", 1024, 768, 3072),
    Case("unstructured@0.8", 128, 768, 768),
    Case("unstructured@0.8", 128, 3072, 768),
    Case("unstructured@0.5", 1, 4096, 4096, 1.4, of_peak=False),
    Case("unstructured@0.8", 1, 4096, 4096, 2.7, of_peak=False),
    Case("unstructured@0.9", 1, 4096, 4096, 4.5, of_peak=False),
    Case("32:2:4", 1, 4096, 4096, of_peak=False),
)


def prepare(target: Target, case: Case, threads: int, seed: int = 0) -> tuple[Candidate, float, Kernel, torch.Tensor]:
    """The sparse candidate of the lowest predicted time, that time in microseconds, its kernel, and the weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(case.out_features, case.in_features, generator=generator)
    weight = Pattern.parse(case.pattern).project(weight)
    facts = WeightFacts.of(weight)
    problem = Problem(facts, case.tokens, threads)
    offered = [candidate for candidate in target.candidates(facts) if not candidate.is_dense]
    if not offered:
        raise ValueError(f"target {target.name} offers no sparse kernel for {case}")
    candidate = min(offered, key=lambda item: target.predict(item, problem))
    return candidate, target.predict(candidate, problem), target.prepare(candidate, weight), weight


def run_case(target: Target, case: Case, threads: int, rounds: int) -> Row:
    """Measure one case."""
    candidate, predicted, kernel, weight = prepare(target, case, threads)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.tokens, case.in_features, generator=generator)
    bias = torch.randn(case.out_features, generator=generator)
    out = torch.empty(case.tokens, case.out_features)

    def sparse() -> None:
        kernel.run(x, bias, None, "none", out)

    def dense() -> torch.Tensor:
        return functional.linear(x, weight, bias)

    sparse()
    want = dense()
    error = float((out - want).abs().max() / want.abs().max())
    if not error <= 1e-4:
        raise AssertionError(f"{case}: {candidate} differs from F.linear by {error:.2g} of the largest value")
    before = measure_peak()
    timings = interleave({"sparse": sparse, "dense": dense}, rounds=rounds)
    peak = (before + measure_peak()) / 2 * threads
    us = timings.median("sparse")
    gflops = 2 * int(torch.count_nonzero(weight)) * case.tokens / us / 1e3
    speedup = timings.speedup("sparse", over="dense")
    details = {
        "kernel": str(candidate),
        "us": us,
        "dense us": timings.median("dense"),
        "predicted us": predicted,
        "spread": timings.spread("sparse"),
        "peak GFLOP/s": peak,
    }
    if case.of_peak:
        return Row(str(case), gflops / peak, "of peak", case.goal, details={"speed over F.linear": speedup, **details})
    return Row(str(case), speedup, "x F.linear", case.goal, details={"of peak": gflops / peak, **details})


def main() -> None:
    """Run every case, print the table and write the results."""
    arguments = timed_parser(__doc__).parse_args()
    rounds = rounds_of(arguments)
    target = get_target()
    results = Results(
        "kernels",
        notes=[
            f"target {target.name}: {target.description}",
            f"{arguments.threads} thread(s), {rounds} rounds in turn; medians; transposes of the input are included",
            "peak: float32 multiply-adds in registers, measured before and after each case; kept products count alone",
        ],
    )
    with torch.inference_mode():
        for case in CASES:
            results.add(run_case(target, case, arguments.threads, rounds))
    results.finish()


if __name__ == "__main__":
    main()
