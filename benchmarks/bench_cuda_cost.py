"""The prices of NVIDIA cards against published times, dense and 2:4; needs no GPU.

`python benchmarks/bench_cuda_cost.py` compares all rows of `cuda_published.json`, which names their sources. No row was
used to fit the constants of the cost model; those of source 0 are of a model that was held out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import Results, Row

from sparsecomp.patterns import Pattern
from sparsecomp.targets import get_target
from sparsecomp.targets.base import DENSE, Problem, WeightFacts
from sparsecomp.targets.cuda.target import SEMI

PUBLISHED = Path(__file__).resolve().parent / "cuda_published.json"
TIE = 1.05
"""Speed-ups nearer to 1 than this have no winner: repeated measurements of libraries differ by as much."""


@dataclass(frozen=True)
class Comparison:
    """A published pair of times and what the model says of it.

    Attributes:
        group: number of its source in the file.
        case: card, type and size.
        measured: published speed-up of 2:4 over dense.
        predicted: the model's.
        dense_error: of the time of dense, percent.
        sparse_error: of the time of 2:4, percent.
    """

    group: int
    case: str
    measured: float
    predicted: float
    dense_error: float
    sparse_error: float

    @property
    def error(self) -> float:
        """Of the speed-up, percent."""
        return 100 * abs(self.predicted - self.measured) / self.measured

    @property
    def right(self) -> bool:
        """Whether the model names the winner, or there is none."""
        return max(self.measured, 1 / self.measured) < TIE or (self.predicted > 1) == (self.measured > 1)


def compare() -> list[Comparison]:
    """All rows of the file."""
    found = []
    for number, group in enumerate(json.loads(PUBLISHED.read_text(encoding="utf-8"))["groups"]):
        for card, dtype, tokens, outputs, inputs, dense, sparse in group["rows"]:
            target = get_target(f"cuda:{card}")
            facts = WeightFacts.assumed(outputs, inputs, Pattern.parse("2:4"))
            problem = Problem(facts, tokens, threads=1, dtype=getattr(torch, dtype))
            ours, semi = target.predict(DENSE, problem), target.predict(SEMI, problem)
            case = f"{card} {dtype}, {tokens} tokens, {inputs} to {outputs}"
            errors = (100 * abs(ours - dense) / dense, 100 * abs(semi - sparse) / sparse)
            found.append(Comparison(number, case, dense / sparse, ours / semi, *errors))
    return found


def summary(name: str, compared: list[Comparison]) -> list[Row]:
    """Two rows: the share of the speed-ups that are within 25 %, and how many winners are wrong."""
    within = sum(item.error <= 25 for item in compared)
    wrong = [item.case for item in compared if not item.right]
    details = {
        "median error %": statistics.median(item.error for item in compared),
        "dense time, median error %": statistics.median(item.dense_error for item in compared),
        "2:4 time, median error %": statistics.median(item.sparse_error for item in compared),
        "times within 25 %": sum(item.dense_error <= 25 and item.sparse_error <= 25 for item in compared),
    }
    return [
        Row(f"{name}: speed-ups within 25 %", within, f"of {len(compared)}", details=details),
        Row(f"{name}: wrong winners", len(wrong), f"of {len(compared)}", details={"cases": "; ".join(wrong) or "none"}),
    ]


def main() -> None:
    """Compare, print the table and write the results."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    content = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    results = Results("cuda_cost", notes=["predictions; nothing was measured here"])
    results.notes += [f"source {number}: {group['source']}" for number, group in enumerate(content["groups"])]
    results.notes += [f"not compared: {text}" for text in content["left_out"]]
    compared = compare()
    for item in compared:
        details = {"published": item.measured, "predicted": item.predicted, "right winner": item.right}
        details |= {"dense time error %": item.dense_error, "2:4 time error %": item.sparse_error}
        results.add(Row(item.case, item.error, "% error of the speed-up", 25, at_most=True, details=details))
    groups = ("layers of the source that was fitted to", (0,)), ("all other sources", range(1, 6)), ("all", range(6))
    for name, group in groups:
        within, wrong = summary(name, [item for item in compared if item.group in group])
        within.goal, wrong.goal, wrong.at_most = 12, 1, True
        results.add(within)
        results.add(wrong)
    results.finish()


if __name__ == "__main__":
    main()
