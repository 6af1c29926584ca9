"""Every linear of models as people write them: found under its name, with the epilogue that its block has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fx_cases import capture, ensure_op
from torch import nn

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(12).reshape(2, 6)


@pytest.fixture(autouse=True)
def _op() -> Iterator[None]:
    library = ensure_op()
    yield
    if library is not None:
        library._destroy()


def sites_of(model: nn.Module, dynamic: bool | None = None, **inputs: Any) -> dict[str, tuple[bool, str, bool]]:
    """Name to (bias, activation, residual) of every site of every graph, none of them declined."""

    def call(tokens: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = model(tokens, **inputs)[0]
        return output

    with torch.no_grad():
        expected = call(TOKENS)
    graphs, result = capture(call, TOKENS, dynamic=dynamic)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    sites = [site for captured in graphs for site in captured.sites]
    assert [site.declined for site in sites] == [None] * len(sites)
    return {site.name: (site.bias is not None, site.activation, site.residual is not None) for site in sites}


def small(name: str, **options: Any) -> nn.Module:
    sizes = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(**(sizes | options))
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("mask", [False, True])
def test_bert(mask: bool, dynamic: bool | None) -> None:
    inputs = {"attention_mask": torch.ones_like(TOKENS).index_fill(1, torch.tensor([5]), 0)} if mask else {}
    sites = sites_of(small("Bert", intermediate_size=64), dynamic, **inputs)
    expected = {}
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        for part in ("query", "key", "value"):
            expected[f"{layer}.attention.self.{part}"] = (True, "none", False)
        expected[f"{layer}.attention.output.dense"] = (True, "none", True)
        expected[f"{layer}.intermediate.dense"] = (True, "gelu", False)
        expected[f"{layer}.output.dense"] = (True, "none", True)
    found = {name: form for name, form in sites.items() if name != "pooler.dense"}
    assert found == expected


def test_llama() -> None:
    sites = sites_of(small("Llama", intermediate_size=64, num_key_value_heads=1), use_cache=False)
    expected = {}
    for layer in ("layers.0", "layers.1"):
        for part in ("q_proj", "k_proj", "v_proj"):
            expected[f"{layer}.self_attn.{part}"] = (False, "none", False)
        expected[f"{layer}.self_attn.o_proj"] = (False, "none", True)
        expected[f"{layer}.mlp.gate_proj"] = (False, "silu", False)
        expected[f"{layer}.mlp.up_proj"] = (False, "none", False)
        expected[f"{layer}.mlp.down_proj"] = (False, "none", True)
    assert sites == expected


def test_gpt2_stores_its_weights_by_input() -> None:
    config = transformers.GPT2Config(vocab_size=20, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2Model(config).eval()
    sites = sites_of(model, use_cache=False)
    assert sites == {
        f"h.0.{name}": (True, "none", False) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
