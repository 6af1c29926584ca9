"""What pruning costs EfficientNet-Lite0 and OpenNSFW, real weights, one-shot: patterns by criteria.

`python benchmarks/bench_conv_quality.py [--model efficientnet,opennsfw] [--threads 1]`. Pictures: crops of the 20 of
ImageNet that foolbox carries, ten pictures for calibration and the other ten for the score: with so few, how near the
pruned model stays to the dense one, not an accuracy. Compiled outputs are compared with dense-with-zeros.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import Results, Row
from torch import Tensor, nn
from torch.nn import functional

import sparsecomp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import models  # the tests' loaders of real models

PATTERNS = ("unstructured@0.5", "unstructured@0.7", "unstructured@0.8", "unstructured@0.9", "2:4")
METHODS = ("magnitude", "wanda", "ria", "sparsegpt")
CROPS = 5
"""Of each picture."""
DIFFERENCE = 1e-4
"""The most that compiled outputs may differ from dense-with-zeros, relative to the largest."""


@dataclass(frozen=True)
class Case:
    """A model, how it sees a picture, and what it is scored by.

    Attributes:
        name: in the table.
        make: the dense model.
        prepare: pictures `[N, 3, 224, 224]`, RGB from 0 to 255, to its input.
        score: `(dense outputs, pruned outputs)` to a number that is 1 for equal ones.
        unit: of the score.
        shown: further numbers.
    """

    name: str
    make: Callable[[], nn.Module]
    prepare: Callable[[Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    unit: str
    shown: Callable[[Tensor, Tensor], dict[str, float]]


def cosine(dense: Tensor, pruned: Tensor) -> float:
    """Mean cosine of the logits."""
    return float(functional.cosine_similarity(dense, pruned, dim=1).mean())


def agreement(dense: Tensor, pruned: Tensor) -> dict[str, float]:
    """Share of crops whose class stays."""
    return {"same class": float((dense.argmax(1) == pruned.argmax(1)).float().mean())}


def log_odds(dense: Tensor, pruned: Tensor) -> float:
    """Correlation of the log odds over the crops; 0 where the pruned model says the same of all."""
    odds = torch.stack([(output[:, 1].clamp_min(1e-12) / output[:, 0]).log() for output in (dense, pruned)])
    return float(torch.corrcoef(odds)[0, 1]) if float(odds[1].std()) > 1e-6 else 0.0


def distance(dense: Tensor, pruned: Tensor) -> dict[str, float]:
    """How far the probability moves."""
    return {"mean change of the probability": float((dense - pruned).abs().mean())}


def to_bgr(pictures: Tensor) -> Tensor:
    """OpenNSFW's input `[N, 224, 224, 3]`."""
    return pictures.flip(1).permute(0, 2, 3, 1) - torch.tensor([104.0, 117.0, 123.0])


CASES = {
    "efficientnet": Case(
        "EfficientNet-Lite0",
        models.efficientnet_lite0,
        lambda pictures: (pictures - 127) / 128,
        cosine,
        "mean cosine of the logits with those of the dense model",
        agreement,
    ),
    "opennsfw": Case(
        "OpenNSFW",
        lambda: models.OpenNsfw(models.open_nsfw_path()).eval(),
        to_bgr,
        log_odds,
        "correlation of the log odds with those of the dense model",
        distance,
    ),
}


def is_pruned(module: nn.Module, _: str) -> bool:
    """All convolutions but the first; depthwise ones are left out in any case."""
    return isinstance(module, nn.Conv2d) and module.in_channels > 3


def outputs_of(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Outputs for all batches."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in batches])


def difference(model: nn.Module, batch: Tensor, dense: Tensor) -> float:
    """Of compiled outputs from dense-with-zeros, relative to the largest.

    Raises:
        AssertionError: it is too large.
    """
    compile_model: Any = torch.compile  # whose overloads do not know all of its arguments
    torch._dynamo.reset()
    with torch.no_grad():
        given = compile_model(model, backend="sparse")(batch)
    error = float((given - dense).abs().max() / dense.abs().max())
    if not error <= DIFFERENCE:
        raise AssertionError(f"compiled outputs differ from dense-with-zeros by {error:.2g} of the largest value")
    return error


def run(case: Case, results: Results, methods: Iterable[str], patterns: Iterable[str]) -> None:
    """Prune one model to every pattern by every criterion."""
    original = case.make().requires_grad_(False)
    files = models.pictures()
    used = list(case.prepare(models.crops(files[:10], CROPS, seed=0)).split(10))
    held = list(case.prepare(models.crops(files[10:], CROPS, seed=1)).split(10))
    dense = outputs_of(original, held)
    for pattern in patterns:
        for method in methods:
            model = copy.deepcopy(original)
            sparsecomp.sparsify_(model, pattern, criterion=method, calibration=used, filter_fn=is_pruned)
            given = outputs_of(model, held)
            details: dict[str, Any] = {"pattern": pattern, "method": method, **case.shown(dense, given)}
            if method == "sparsegpt":
                details["difference of compiled"] = difference(model, held[0][:1], outputs_of(model, [held[0][:1]]))
            name = f"{case.name}, {pattern}, {method}"
            results.add(Row(name, case.score(dense, given), case.unit, details=details))
            results.write()


def main() -> None:
    """Run the models, each case written as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=",".join(CASES), help="some of: " + ", ".join(CASES))
    parser.add_argument("--method", default=",".join(METHODS), help="some of: " + ", ".join(METHODS))
    parser.add_argument("--pattern", default=",".join(PATTERNS), help="patterns")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = Results(
        "conv_quality",
        notes=[
            "all convolutions but the first and depthwise ones pruned, one-shot; batch norms follow the weights",
            f"calibration: {CROPS} crops each of 10 pictures of ImageNet; score: {CROPS} crops each of 10 others",
            f"compiled outputs were compared with dense-with-zeros: within {DIFFERENCE} of the largest",
        ],
    )
    for name in arguments.model.split(","):
        run(CASES[name], results, arguments.method.split(","), arguments.pattern.split(","))
    results.finish()


if __name__ == "__main__":
    main()
