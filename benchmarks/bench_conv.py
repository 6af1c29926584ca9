"""Convolutions: kernels by themselves, and ResNet-50, EfficientNet-Lite0 and OpenNSFW against Inductor.

`python benchmarks/bench_conv.py [--quick] [--threads 1]`; `make bench` runs it. The baseline of a model is the better
of Inductor and Inductor with freezing, both on the pruned model.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor_config
from timing import Results, Row, interleave, measure_peak, rounds_of, timed_parser
from torch import Tensor, nn

import sparsecomp
from sparsecomp.targets import get_target
from sparsecomp.targets.base import ConvEpilogue, Problem, Target, WeightFacts
from sparsecomp.window import Maps, Window, convolve

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import models  # the tests' loaders of real models

DIFFERENCE = 1e-4
"""The most that outputs may differ from dense, relative to the largest."""


@dataclass(frozen=True)
class KernelCase:
    """A convolution with an unstructured weight on one image, and the share of the peak that it should reach."""

    channels: tuple[int, int]
    size: int
    taps: int
    sparsity: float
    goal: float | None = None

    def __str__(self) -> str:
        inputs, outputs = self.channels
        return f"{self.taps}x{self.taps}, {inputs} to {outputs}, {self.size}x{self.size}, {self.sparsity:.0%} zeros"


KERNELS = (
    KernelCase((256, 256), 28, 1, 0.5, 0.68),
    KernelCase((256, 256), 28, 1, 0.8, 0.62),
    KernelCase((256, 256), 28, 1, 0.9, 0.55),
    KernelCase((128, 128), 28, 3, 0.5, 0.60),
    KernelCase((128, 128), 28, 3, 0.8, 0.55),
    KernelCase((128, 128), 28, 3, 0.9, 0.48),
    KernelCase((64, 64), 56, 3, 0.8),
    KernelCase((512, 2048), 7, 1, 0.8),
)


@dataclass(frozen=True)
class ModelCase:
    """A model, what is pruned in it, and the speed over the baseline that it should reach."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    sparsity: float
    goal: float
    pointwise: bool = False


MODELS = (
    ModelCase("ResNet-50", models.resnet50, (1, 3, 224, 224), 0.8, 2.2),
    ModelCase("ResNet-50", models.resnet50, (1, 3, 224, 224), 0.9, 3.2),
    ModelCase("EfficientNet-Lite0, 1x1", models.efficientnet_lite0, (1, 3, 224, 224), 0.8, 1.5, pointwise=True),
    ModelCase("OpenNSFW", lambda: models.OpenNsfw(models.open_nsfw_path()).eval(), (1, 224, 224, 3), 0.85, 2.0),
)


def run_kernel(target: Target, case: KernelCase, threads: int, rounds: int) -> Row:
    """Measure one convolution."""
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = case.channels
    weight = torch.randn(outputs, inputs, case.taps, case.taps, generator=generator)
    weight *= torch.rand(weight.shape, generator=generator) >= case.sparsity
    window, maps = Window((case.taps, case.taps), padding=(case.taps // 2,) * 2), Maps(1, case.size, case.size)
    facts = WeightFacts.of(weight.flatten(1))
    problem = Problem(facts, maps.positions(window), threads, window=window, maps=maps)
    offered = [candidate for candidate in target.conv_candidates(facts, window) if not candidate.is_dense]
    candidate = min(offered, key=lambda item: target.predict(item, problem))
    kernel = target.prepare_conv(candidate, weight, window)
    x, terms = torch.randn(1, inputs, case.size, case.size, generator=generator), torch.ones(2 * outputs)
    out = torch.empty(1, outputs, case.size, case.size)
    calls: dict[str, Callable[[], object]] = {
        "sparse": lambda: kernel.run(x, terms, None, ConvEpilogue("relu"), out),
        "dense": lambda: convolve(x, weight, window),
    }
    before = measure_peak()
    timings = interleave(calls, rounds=rounds)
    peak = (before + measure_peak()) / 2 * threads
    us = timings.median("sparse")
    gflops = 2 * facts.nonzeros * problem.tokens / us / 1e3
    details = {
        "kernel": f"{candidate} {dict(candidate.params)}",
        "us": us,
        "predicted us": target.predict(candidate, problem),
        "F.conv2d us": timings.median("dense"),
        "spread": timings.spread("sparse"),
    }
    return Row(str(case), gflops / peak, "of peak", case.goal, details=details)


def run_model(case: ModelCase, rounds: int) -> Row:
    """Measure one model."""
    model = case.make()

    def chosen(module: nn.Module, _: str) -> bool:
        # The first layer sees three channels only and is left dense, as is usual.
        return (
            isinstance(module, nn.Conv2d)
            and module.in_channels > 3
            and (module.kernel_size == (1, 1) or not case.pointwise)
        )

    sparsecomp.sparsify_(model, f"unstructured@{case.sparsity}", filter_fn=chosen)
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    compile_model: Any = torch.compile  # whose overloads do not know all of its arguments

    def compiled(backend: str) -> Callable[[], Any]:
        # Each is compiled on its own: Dynamo would else run one's code for the other.
        function = compile_model(copy.deepcopy(model), backend=backend, isolate_recompiles=True)
        function(x)
        return lambda: function(x)

    with torch.no_grad():
        calls = {"sparse": compiled("sparse"), "inductor": compiled("inductor")}
        with inductor_config.patch(freezing=True):
            calls["frozen"] = compiled("inductor")
        expected, given = _tensor(model(x)), _tensor(calls["sparse"]())
        error = float((given - expected).abs().max() / expected.abs().max())
        if not error <= DIFFERENCE:
            raise AssertionError(f"{case.name} differs from dense by {error:.2g} of the largest value")
        timings = interleave(calls, rounds=rounds)
    best = min(("inductor", "frozen"), key=timings.median)
    details = {f"{name} ms": timings.median(name) / 1e3 for name in calls}
    details |= {"difference": error, "spread": timings.spread("sparse")}
    name = f"{case.name}, {case.sparsity:.0%} zeros"
    return Row(name, timings.speedup("sparse", over=best), "x baseline", case.goal, details=details)


def _tensor(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output.logits
    return tensor


def main() -> None:
    """Run every case, print the table and write the results."""
    arguments = timed_parser(__doc__).parse_args()
    rounds = rounds_of(arguments)
    target = get_target()
    results = Results(
        "conv",
        notes=[
            f"target {target.name}: {target.description}",
            f"{arguments.threads} thread(s), {rounds} rounds in turn; medians; packing of the input is included",
            "kernels: share of the float32 peak on kept products; models: over Inductor or its freezing, the better",
        ],
    )
    with torch.inference_mode():
        for kernel_case in KERNELS:
            results.add(run_kernel(target, kernel_case, arguments.threads, rounds))
    for model_case in MODELS:
        results.add(run_model(model_case, rounds))
    results.finish()


if __name__ == "__main__":
    main()
