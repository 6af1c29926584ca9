"""ResNet-50 with random weights at 80 % zeros: what each convolution becomes, and the latency beside Inductor's.

`python examples/resnet_demo.py [--sparsity 0.8]`. Random weights tell the speed, not the quality: prune a trained model
with training, or with a calibrated criterion of `sparsify_`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import sparsecomp


def milliseconds(calls: dict[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """Median time of each call, in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Prune, explain, compile, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.8, help="share of zeros (default: 0.8)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(num_labels=1000)).eval()
    x = torch.randn(1, 3, 224, 224)

    def chosen(module: nn.Module, _: str) -> bool:
        return isinstance(module, nn.Conv2d) and module.in_channels > 3

    sparsecomp.sparsify_(model, f"unstructured@{arguments.sparsity}", filter_fn=chosen)
    compile_model: Any = torch.compile  # whose overloads do not know all of its arguments
    with torch.no_grad():
        print(sparsecomp.explain(model, x))
        sparse = compile_model(model, backend="sparse", isolate_recompiles=True)
        dense = compile_model(model, backend="inductor", isolate_recompiles=True)
        given, expected = sparse(x).logits, dense(x).logits
        print(f"largest difference: {(given - expected).abs().max() / expected.abs().max():.1e} of the largest logit")
        for name, value in milliseconds({"sparse": lambda: sparse(x), "inductor": lambda: dense(x)}).items():
            print(f"{name}: {value:.1f} ms")


if __name__ == "__main__":
    main()
