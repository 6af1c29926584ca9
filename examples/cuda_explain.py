"""What 2:4 is predicted to bring on NVIDIA cards, on a machine without one.

`python examples/cuda_explain.py [CARD ...]`: layers of a transformer in float16, dense against 2:4, at few and at many
tokens. The weights lie on PyTorch's meta device: only their shapes count. Nothing is measured.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import sparsecomp

DEFAULT = ("cuda:h100", "cuda:rtx-4090")


def main() -> None:
    """Print the table of each card for one token and for 4096."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 11008), nn.SiLU(), nn.Linear(11008, 4096)).half().eval()
        inputs = {tokens: torch.empty(tokens, 4096, dtype=torch.half) for tokens in (1, 4096)}
    for card in sys.argv[1:] or DEFAULT:
        for tokens, x in inputs.items():
            print(f"{card}, {tokens} tokens")
            with torch.no_grad():
                print(sparsecomp.explain(model, x, target=card, assume="2:4"))


if __name__ == "__main__":
    main()
