"""Small models for the tests of skipping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn


def llama(layers: int = 4, seed: int = 0) -> Any:
    """LLaMA of width 32 with random weights, large enough that its layers matter."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def opt() -> Any:
    """OPT of width 32 with random weights: fc1 and fc2 in the layer itself, ReLU, biases."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    return transformers.OPTForCausalLM(config).eval()


def texts(count: int = 4, tokens: int = 48, seed: int = 0) -> list[Tensor]:
    """Random token numbers, int64 `[1, tokens]` each."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (1, tokens), generator=random) for _ in range(count)]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Of a causal language model."""
    with torch.no_grad():
        result: Tensor = model(ids, use_cache=False).logits
    return result
