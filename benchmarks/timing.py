"""Timing that survives a noisy machine, and the writing of results.

What is compared takes turns in one process: in every round each candidate runs once, and the order rotates, so that a
change of clock speed or a neighbour's load meets all of them. A ratio is the median of the ratios within rounds, not
the ratio of medians taken minutes apart.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"

Call = Callable[[], object]


@dataclass(frozen=True)
class Timings:
    """Microseconds of one call, a sample for every round and candidate.

    Attributes:
        samples: by name of the candidate, one number for each round; rounds are the same for all.
    """

    samples: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median microseconds of a candidate."""
        return statistics.median(self.samples[name])

    def speedup(self, name: str, over: str) -> float:
        """How many times as fast as another candidate: the median over rounds of the ratio within the round."""
        return statistics.median(b / a for a, b in zip(self.samples[name], self.samples[over], strict=True))

    def rounds_where(self, kept: Sequence[bool]) -> Timings:
        """The rounds for which it says so."""
        return Timings({name: list(compress(values, kept)) for name, values in self.samples.items()})

    def spread(self, name: str) -> float:
        """Distance of the quartiles over the median: how far to trust the numbers."""
        low, middle, high = statistics.quantiles(self.samples[name], n=4)
        return (high - low) / middle


def interleave(
    candidates: Mapping[str, Call], *, rounds: int = 21, warmup: int = 2, sample_us: float = 20_000.0
) -> Timings:
    """Time candidates in turn.

    Args:
        candidates: what to call, by name.
        rounds: samples of each.
        warmup: calls of each before the first sample.
        sample_us: a sample repeats a call until it has taken about this long.

    Returns:
        Microseconds per call.

    Raises:
        ValueError: there is nothing to time, or fewer than two rounds.
    """
    if not candidates or rounds < 2:
        raise ValueError(f"expected candidates and at least 2 rounds, given {len(candidates)} and {rounds}")
    repeats: dict[str, int] = {}
    for name, call in candidates.items():
        for _ in range(warmup):
            call()
        repeats[name] = max(1, round(sample_us / max(_sample(call, 1), 0.1)))
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(_sample(candidates[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return Timings(samples)


def _sample(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) * 1e6 / repeats


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    from sparsecomp.targets.x86.cpu import cpu_name, flags

    extensions = [flag for flag in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags()]
    return {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "extensions": extensions,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tvm": version("apache-tvm"),
        "sparsecomp": version("sparsecomp"),
        "date": time.strftime("%Y-%m-%d"),
    }


def measure_peak() -> float:
    """GFLOP/s of fused multiply-adds in float32 of one thread, as the machine gives them now."""
    from sparsecomp.targets.x86.calibrate import measure_fma_peak

    return float(measure_fma_peak())


@dataclass
class Row:
    """One measured case.

    Attributes:
        case: what was measured.
        value: the number that the goal is about.
        unit: of the value, such as `share of peak`, `x` or `%`.
        goal: what it has to reach; None if there is no goal.
        at_most: whether the goal is a bound from above.
        details: other numbers of the case.
    """

    case: str
    value: float
    unit: str
    goal: float | None = None
    at_most: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """`reached`, `missed` or nothing."""
        if self.goal is None:
            return ""
        return "reached" if (self.value <= self.goal if self.at_most else self.value >= self.goal) else "missed"

    @property
    def goal_text(self) -> str:
        """The goal for people."""
        return "" if self.goal is None else f"{'<=' if self.at_most else '>='} {self.goal:g}"


@dataclass
class Results:
    """The rows of one benchmark.

    Attributes:
        name: of the benchmark; also of its file.
        rows: in the order that they were measured.
        notes: how it was measured.
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Keep a row and print it, since a long run should show where it is."""
        self.rows.append(row)
        goal = f" (goal {row.goal_text}: {row.verdict})" if row.goal is not None else ""
        print(f"{row.case}: {row.value:.3g} {row.unit}{goal}", flush=True)

    def finish(self, folder: Path = RESULTS) -> Path:
        """Print the table and write `NAME.json`.

        Returns:
            The file.
        """
        table = Table(title=self.name)
        for heading in ("case", "value", "unit", "goal", "verdict", "details"):
            table.add_column(heading, justify="right" if heading in ("value", "goal") else "left", overflow="fold")
        for row in self.rows:
            details = ", ".join(f"{key} {_short(value)}" for key, value in row.details.items())
            table.add_row(row.case, _short(row.value), row.unit, row.goal_text, row.verdict, details)
        Console().print(table)
        path = self.write(folder)
        print(f"written to {path}")
        return path

    def write(self, folder: Path = RESULTS) -> Path:
        """Write `NAME.json`.

        Returns:
            The file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        content = {
            "name": self.name,
            "machine": machine(),
            "notes": self.notes,
            "rows": [{**asdict(row), "verdict": row.verdict} for row in self.rows],
        }
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path


def _short(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else str(value if isinstance(value, (str, int)) else round(value))
    )


def timed_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks of speed have: `--quick` and `--threads`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, for a first look")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    return parser


def rounds_of(arguments: argparse.Namespace) -> int:
    """Set PyTorch's threads as the options of `timed_parser` say; returns the rounds to measure."""
    torch.set_num_threads(arguments.threads)
    return 7 if arguments.quick else 31
