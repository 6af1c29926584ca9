"""Whole models: `backend="sparse"` over `backend="inductor"`, two threads over one, and the time to compile.

`python benchmarks/bench_models.py [--quick] [--only bert,minilm,dense,threads,compile]`; `make bench` runs it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Results, Row, Timings, interleave, rounds_of, timed_parser
from torch import Tensor, nn

import sparsecomp
from sparsecomp.targets.x86.calibrate import fma_call

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import models  # noqa: E402 -- lies with the tests, which use it more

PARTS = ("bert", "minilm", "dense", "threads", "compile")
BERT_GOALS = {"dense": 0.97, "unstructured@0.5": 1.7, "unstructured@0.8": 3.3, "unstructured@0.9": 5.0, "32:2:4": 2.0}
MINILM_GOALS = {"dense": 0.97, "unstructured@0.5": None, "unstructured@0.8": None, "unstructured@0.9": None}
TOLERANCE = 1e-4

_APART = 1.8
"""What multiply-adds in registers gain by a second thread where it has a core of its own: nearly 2; on the same, 1."""
_ENOUGH = 10
"""Rounds that a median needs."""


def compiled(model: nn.Module, backend: str) -> Callable[..., Any]:
    """The model under a backend, with compilations of its own: models of one class would share them."""
    compile_model: Any = torch.compile
    result: Callable[..., Any] = compile_model(model, backend=backend, isolate_recompiles=True)
    return result


def pruned(model: nn.Module, pattern: str) -> nn.Module:
    """A copy whose encoder is pruned to a pattern."""
    # Tensors made in inference mode have no version counter, and their layers stay dense for that reason.
    with torch.inference_mode(False):
        model = copy.deepcopy(model)
        if pattern != "dense":
            sparsecomp.sparsify_(model, pattern, filter_fn=models.is_encoder_linear)
    return model


def check(call: Callable[..., Any], model: nn.Module, ids: Tensor, case: str) -> float:
    """Largest difference from the eager model, relative to its largest value."""
    want = model(ids).last_hidden_state
    error = float((call(ids).last_hidden_state - want).abs().max() / want.abs().max())
    if not error <= TOLERANCE:
        raise AssertionError(f"{case}: differs from the eager model by {error:.2g} of the largest value")
    return error


def compare(
    name: str, model: nn.Module, goals: dict[str, float | None], ids: Tensor, rounds: int, results: Results
) -> None:
    """Every pattern beside Inductor on the dense model, all in turn."""
    calls = {"inductor": compiled(model, "inductor")}
    calls["inductor"](ids)
    errors = {}
    for pattern in goals:
        copy_of_model = pruned(model, pattern)
        calls[pattern] = compiled(copy_of_model, "sparse")
        errors[pattern] = check(calls[pattern], copy_of_model, ids, f"{name}, {pattern}")
    bound = {key: (lambda call=call: call(ids)) for key, call in calls.items()}
    timings = interleave(bound, rounds=rounds)
    for pattern, goal in goals.items():
        details = {
            "ms": timings.median(pattern) / 1e3,
            "inductor ms": timings.median("inductor") / 1e3,
            "spread": timings.spread(pattern),
            "error": errors[pattern],
        }
        speedup = timings.speedup(pattern, over="inductor")
        results.add(Row(f"{name}, {pattern}, {ids.shape[1]} tokens", speedup, "x Inductor", goal, details=details))


def dense_models(rounds: int, results: Results) -> None:
    """The other models of the tests as they are: nothing is pruned, so that the most that can be lost is seen."""
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    cases: list[tuple[str, Callable[[], nn.Module], Tensor]] = [
        ("SmolLM2-135M, 128 tokens", lambda: models.smollm2()[0], models.token_ids(1, 128)),
        ("EfficientNet-Lite0", models.efficientnet_lite0, image),
        ("OpenNSFW", lambda: models.OpenNsfw(models.open_nsfw_path()).eval(), image.permute(0, 2, 3, 1).contiguous()),
        ("ResNet-50", models.resnet50, image),
    ]
    for name, build, given in cases:
        with torch.inference_mode(False):
            model = build()
        calls = {backend: compiled(model, backend) for backend in ("inductor", "sparse")}
        for call in calls.values():
            call(given)
        timings = interleave({key: (lambda call=call, x=given: call(x)) for key, call in calls.items()}, rounds=rounds)
        zeros = sum(int((p == 0).sum()) for p in model.parameters()) / sum(p.numel() for p in model.parameters())
        details = {
            "ms": timings.median("sparse") / 1e3,
            "inductor ms": timings.median("inductor") / 1e3,
            "spread": timings.spread("sparse"),
            "zeros": zeros,
        }
        speedup = timings.speedup("sparse", over="inductor")
        results.add(Row(f"{name}, dense", speedup, "x Inductor", 0.97, details=details))


def two_threads(model: nn.Module, ids: Tensor, rounds: int, results: Results) -> None:
    """Two threads over one for BERT at 90 % zeros; Inductor's own gain beside it."""
    before = torch.get_num_threads()
    # A model is compared with itself: between calls of the other one its weights would leave the caches.
    sparse, apart = _one_and_two(pruned(model, "unstructured@0.9"), "sparse", ids, rounds)
    dense, _ = _one_and_two(model, "inductor", ids, rounds)
    torch.set_num_threads(before)
    details = {
        "ms of two": sparse.median("two") / 1e3,
        "ms of one": sparse.median("one") / 1e3,
        "Inductor's gain": dense.speedup("two", over="one"),
        "gain of multiply-adds in registers": 2 * sparse.speedup("peak of two", over="peak of one"),
        "rounds with a core for each thread": apart,
    }
    gain = sparse.speedup("two", over="one")
    results.add(Row("BERT-base, 6 layers, unstructured@0.9, two threads", gain, "x one thread", 1.7, details=details))


def _one_and_two(model: nn.Module, backend: str, ids: Tensor, rounds: int) -> tuple[Timings, float]:
    """A model with one thread and with two, in turns, and the share of the rounds that it is of.

    Virtual processors lie on the two threads of one core for seconds at a time, at the host's choice. Then even
    multiply-adds in registers gain nothing by a second thread. They are timed in each round, and those rounds are left
    out, unless they are nearly all.
    """
    calls: dict[str, Callable[[], object]] = {}
    for name, count in (("one", 1), ("two", 2)):
        torch.set_num_threads(count)
        call = compiled(model, backend)
        call(ids)
        calls[name] = _with_threads(partial(call, ids), count)
        calls[f"peak of {name}"] = _with_threads(fma_call(threads=count)[0], count)
    timings = interleave(calls, rounds=3 * rounds)
    gains = [
        2 * one / two for one, two in zip(timings.samples["peak of one"], timings.samples["peak of two"], strict=True)
    ]
    apart = [gain > _APART for gain in gains]
    share = sum(apart) / len(apart)
    return (timings.rounds_where(apart) if sum(apart) >= _ENOUGH else timings), share


def _with_threads(call: Callable[[], object], count: int) -> Callable[[], object]:
    def run() -> object:
        torch.set_num_threads(count)
        return call()

    return run


def compile_seconds(backend: str, kernel_cache: Path) -> float:
    """Seconds of `torch.compile` and the first call in a new process, whose Inductor cache is empty."""
    with tempfile.TemporaryDirectory() as inductor_cache:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": inductor_cache,
            "SPARSECOMP_CACHE_DIR": str(kernel_cache),
        }
        command = [sys.executable, __file__, "--compile-once", backend, "--threads", str(torch.get_num_threads())]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"compiling BERT with {backend} failed:\n{result.stderr}")
    return float(json.loads(result.stdout.splitlines()[-1])["seconds"])


def compile_once(backend: str) -> None:
    """What `compile_seconds` runs: print the seconds."""
    model = pruned(models.bert(), "unstructured@0.8")
    ids = models.token_ids(1, 128)
    with torch.inference_mode():
        # Dynamo and Inductor are imported by any first compilation, which is not what is measured.
        torch.compile(nn.Linear(4, 4), backend="inductor")(torch.randn(2, 4))
        start = time.perf_counter()
        torch.compile(model, backend=backend)(ids)
        print(json.dumps({"seconds": time.perf_counter() - start}))


def compile_times(tries: int, results: Results) -> None:
    """Compile time over Inductor's: with no kernel built before, and with all of them."""
    samples: dict[str, list[float]] = {"inductor": [], "cold": [], "warm": []}
    for _ in range(tries):
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder)
            samples["inductor"].append(compile_seconds("inductor", cache))
            samples["cold"].append(compile_seconds("sparse", cache))
            samples["warm"].append(compile_seconds("sparse", cache))
    for name, goal in (("cold", 1.5), ("warm", 1.15)):
        ratio = statistics.median(a / b for a, b in zip(samples[name], samples["inductor"], strict=True))
        details = {"s": statistics.median(samples[name]), "inductor s": statistics.median(samples["inductor"])}
        case = f"compile time, BERT-base, 6 layers, unstructured@0.8, kernel cache {name}"
        results.add(Row(case, ratio, "x Inductor", goal, at_most=True, details=details))


def main() -> None:
    """Run the parts, print the table and write the results."""
    parser = timed_parser(__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between (default: all)")
    parser.add_argument("--compile-once", metavar="BACKEND", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rounds = rounds_of(arguments)
    if arguments.compile_once:
        compile_once(arguments.compile_once)
        return
    parts = arguments.only.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    results = Results("models", notes=[f"{arguments.threads} thread(s), {rounds} rounds in turn; medians of ratios"])
    ids = models.token_ids(1, 128)
    bert, minilm = models.bert(), models.minilm()[0]
    with torch.inference_mode():
        if "bert" in parts:
            compare("BERT-base, 6 layers", bert, BERT_GOALS, ids, rounds, results)
        if "minilm" in parts:
            compare("MiniLM", minilm, MINILM_GOALS, ids, rounds, results)
        if "dense" in parts:
            dense_models(rounds, results)
        if "threads" in parts:
            two_threads(bert, ids, rounds, results)
        if "compile" in parts:
            compile_times(1 if arguments.quick else 3, results)
    results.finish()


if __name__ == "__main__":
    main()
