"""What is known of ARM without a board: errors and instructions under QEMU, loops by llvm-mca, where sparse wins.

`python benchmarks/bench_arm.py`. Needs qemu-aarch64 (Debian's qemu-user), a C compiler here for the plugin that counts,
and ziglang or aarch64-linux-gnu-gcc.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from timing import Results, Row

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import arm_cases  # building and running packages, as the tests do
import arm_tools
import onnx_cases

import sparsecomp
from sparsecomp.frontends.onnx_load import load
from sparsecomp.hls.quantise import quantise
from sparsecomp.patterns import Pattern
from sparsecomp.planner.choose import MARGIN
from sparsecomp.targets.arm import cost
from sparsecomp.targets.arm.cpu import cpu, cpu_names
from sparsecomp.targets.arm.target import ArmTarget
from sparsecomp.targets.base import DENSE, Problem, WeightFacts
from sparsecomp.window import Maps, Window

PATTERNS = ("dense", "unstructured@0.5", "unstructured@0.75", "unstructured@0.9", "2:4", "4:2:4", "8:2:4", "16:2:4")
INPUTS, OUTPUTS, TOKENS = 384, 1536, 64
INTEGERS = ("dense", "unstructured@0.9", "2:4", "1:4", "4:2:4", "8:2:4", "16:2:4", "16:1:4")
LOOPS = ("panel_16_4", "panel_16_6", "panel_8_8", "rows_4.shared", "rows_4.own", "int8_16_4_1", "int8_16_4_2")


def instructions(pattern: str, folder: Path, *, integers: bool = False) -> tuple[int, str]:
    """Instructions of one call, and the kernel that was chosen; of a float model or of that model quantised to int8."""
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0))
    if pattern != "dense":
        weight = Pattern.parse(pattern).project(weight)
    model = onnx_cases.linear_model(weight.t().contiguous().numpy(), np.zeros(OUTPUTS, np.float32))
    if integers:
        samples = np.random.default_rng(0).standard_normal((TOKENS, INPUTS), np.float32)
        model = ir.to_proto(quantise(load(model), pattern, {"x": samples}))
    report = sparsecomp.export(model, output=folder, shapes={"x": [TOKENS, INPUTS]})
    program = arm_tools.build(folder, arm_tools.cross_compiler())
    chosen = next(iter(report.plan)).chosen
    return arm_tools.instructions(program, [np.ones((TOKENS, INPUTS), np.float32)]), str(chosen)


CONV = (Window((1, 1)), Maps(1, 56, 56))


def wins_from(target: ArmTarget, shape: tuple[int, int], tokens: int, window: Window | None, maps: Maps | None) -> str:
    """The least share of zeros from which a weight is predicted to be chosen, before any board was measured."""
    for percent in range(2, 100):
        facts = WeightFacts.assumed(*shape, Pattern.parse(f"unstructured@{percent / 100}"))
        problem = Problem(facts, tokens, 1, window=window, maps=maps)
        offered = target.candidates(facts) if window is None else target.conv_candidates(facts, window)
        if any(target.predict(c, problem) * MARGIN <= target.predict(DENSE, problem) for c in offered[1:]):
            return f"{percent} %"
    return "never"


GOALS = {"unstructured@0.5": 0.60, "unstructured@0.75": 0.33, "unstructured@0.9": 0.17, "8:2:4": 0.56}
SHARES = {"panel_16_4": 0.80, "panel_8_8": 0.80, "rows_4.shared": 0.70, "rows_4.own": 0.70}
MODELS: dict[str, tuple[Callable[[], arm_cases.Case], str]] = {
    "MiniLM, 70 % zeros": (arm_cases.minilm, "float32"),
    "EfficientNet-Lite0, 70 % zeros": (arm_cases.efficientnet, "float32"),
    "paraphrase model, 80 % zeros": (arm_cases.paraphrase, "float32"),
    "paraphrase model, QDQ": (arm_cases.quantised_paraphrase, "float32"),
    "EfficientNet-Lite0, 70 % zeros, float16": (arm_cases.efficientnet, "float16"),
}


def error(case: arm_cases.Case, dtype: str, folder: Path) -> tuple[float, dict[str, int]]:
    """The largest error of an output against ONNX Runtime, of the largest value, and sites by kernel."""
    model, feeds = case
    shapes = {name: value.shape for name, value in feeds.items()}
    report = sparsecomp.export(model, output=folder, shapes=shapes, dtype=dtype)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
    program = arm_tools.build(folder, arm_tools.cross_compiler())
    found = arm_tools.run(program, list(feeds.values()), expected, arm_tools.emulator())
    worst = max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in zip(found, expected, strict=True))
    return float(worst), dict(Counter(choice.chosen.kernel for choice in report.plan))


def main() -> None:
    results = Results("arm")
    results.notes.append(
        f"Linear {INPUTS} to {OUTPUTS}, {TOKENS} tokens, one thread, code for cortex-a76: instructions of one call "
        f"under QEMU, over those of dense float32; QDQ models with the quantisation of their output. Inner loops by "
        f"llvm-mca {cost.llvm_mca_version()}. No board was measured."
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, (make, dtype) in MODELS.items():
            worst, chosen = error(make(), dtype, Path(folder))
            goal = 1e-4 if dtype == "float32" else None
            results.add(Row(f"error, {name}", worst, "of the largest value", goal, at_most=True, details=chosen))
        dense = 0
        for integers, patterns in ((False, PATTERNS), (True, INTEGERS)):
            for pattern in patterns:
                count, kernel = instructions(pattern, Path(folder), integers=integers)
                dense = dense or count
                goal = None if integers else GOALS.get(pattern)
                details = {"kernel": kernel, "million instructions": count / 1e6}
                case = f"instructions, {pattern}{', QDQ' * integers}"
                results.add(Row(case, count / dense, "of dense", goal, at_most=True, details=details))
    for loop, goal in SHARES.items():
        share = cost.fmla_share(cpu("neoverse-n1"), loop)
        results.add(Row(f"multiply-adds on neoverse-n1, {loop}", share, "of issue slots", goal))
    print(f"\nMultiply-adds started, of those that the CPU could start, by llvm-mca {cost.llvm_mca_version()}")
    print(f"  {'':12} " + " ".join(f"{loop:>14}" for loop in LOOPS))
    for name in cpu_names():
        have = [loop for loop in LOOPS if cpu(name).dotprod or not loop.startswith("int8")]
        print(f"  {name:12} " + " ".join(f"{cost.fmla_share(cpu(name), loop):14.2f}" for loop in have))
    cases = {
        f"{INPUTS} to {OUTPUTS}, {TOKENS}": ((OUTPUTS, INPUTS), TOKENS, None, None),
        "96 to 96, 3136": ((96, 96), 3136, None, None),
        "conv 96 to 96, 56 x 56": ((96, 96), 3136, *CONV),
    }
    print("\nZeros from which a weight is predicted to run sparse; the cost of an entry in a pair over one alone")
    print(f"  {'':12} " + " ".join(f"{case:>24}" for case in (*cases, "in a pair / alone")))
    for name in cpu_names():
        found = [wins_from(ArmTarget(cpu(name)), *case) for case in cases.values()]
        paired, alone = (cost.loop_cycles(cpu(name), f"rows_4.{kind}") for kind in ("shared", "own"))
        print(f"  {name:12} " + " ".join(f"{text:>24}" for text in (*found, f"{paired / 2 / alone:.2f}")))
    results.finish()


if __name__ == "__main__":
    main()
