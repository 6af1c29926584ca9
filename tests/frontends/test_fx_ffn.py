"""Feed-forward blocks as libraries write them, from the graphs that Dynamo gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sparsecomp.blocks import FfnSite, MoeBlock
from sparsecomp.frontends.fx import build
from sparsecomp.frontends.fx_expand import expand
from sparsecomp.passes import default_passes, run_passes

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(12).reshape(2, 6)
SIZES = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS = {"intermediate_size": 64, "num_key_value_heads": 1}


def blocks_of(model: nn.Module, *inputs: Any, dynamic: bool | None = None, **kwargs: Any) -> tuple[Any, ...]:
    """The feed-forward blocks and the mixtures of experts of all graphs of a model."""
    ffns: list[FfnSite] = []
    moes: list[MoeBlock] = []

    def backend(gm: fx.GraphModule, examples: list[Any]) -> Any:
        expand(gm)
        graph = build(gm, examples)
        run_passes(graph, default_passes())
        ffns.extend(graph.ffns)
        moes.extend(graph.moes)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model.eval(), backend=backend, dynamic=dynamic)(*inputs, **kwargs)
    return ffns, moes


def small(name: str, **options: Any) -> nn.Module:
    model: nn.Module = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**(SIZES | options))
    )
    return model


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("name", "options", "block", "activation", "gated"),
    [
        ("Llama", HEADS, "layers.0.mlp", "silu", True),
        ("Mistral", HEADS, "layers.0.mlp", "silu", True),
        ("Gemma", HEADS | {"head_dim": 16}, "layers.0.mlp", "gelu_tanh", True),
        ("Phi3", HEADS | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, "layers.0.mlp", "silu", True),
        ("Nemotron", HEADS, "layers.0.mlp", "relu2", False),
        ("Bert", {"intermediate_size": 64}, "encoder.layer.0", "gelu", False),
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}, "decoder.layers.0", "relu", False),
    ],
)
def test_models(
    name: str, options: dict[str, Any], block: str, activation: str, gated: bool, dynamic: bool | None
) -> None:
    extra = {} if name == "Bert" else {"use_cache": False}
    (ffn,), moes = blocks_of(small(name, **options), TOKENS, dynamic=dynamic, **extra)
    assert (ffn.declined, ffn.name, ffn.activation, ffn.gated) == (None, block, activation, gated)
    assert ffn.fused == ("gate" if name == "Phi3" else "")
    assert ffn.hidden == 64
    assert moes == []


def test_gpt2() -> None:
    """Weights stored by input, views around every product, and a GELU written out."""
    config = transformers.GPT2Config(vocab_size=20, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    (ffn,), _ = blocks_of(transformers.GPT2Model(config), TOKENS, use_cache=False)
    assert (ffn.declined, ffn.name, ffn.activation, ffn.hidden) == (None, "h.0.mlp", "gelu_tanh", 128)
    assert all(linear.transposed for linear in ffn.linears)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_of_torch(activation: str, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation=activation, norm_first=norm_first)
    (ffn,), _ = blocks_of(layer, torch.randn(2, 5, 32))
    assert (ffn.declined, ffn.name, ffn.activation, ffn.residual is not None) == (None, "ffn", activation, True)


class Written(nn.Module):
    """A gated block whose halves lie in one weight, up first."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(32, 96), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.both(x).split(48, dim=-1)
        return self.down(nn.functional.gelu(gate) * up)


def test_halves_in_the_other_order() -> None:
    (ffn,), _ = blocks_of(Written(), torch.randn(3, 32))
    assert (ffn.declined, ffn.fused, ffn.hidden) == (None, "up", 48)


def test_thresholded_relu() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(nn.functional.threshold(self.up(x), 0.3, 0.0))

    (ffn,), _ = blocks_of(Cut(), torch.randn(3, 32))
    assert (ffn.activation, ffn.floor, ffn.exact_zeros) == ("relu", 0.3, True)


@pytest.mark.parametrize(
    ("name", "count", "picked"), [("Mixtral", "num_local_experts", 2), ("Qwen2Moe", "num_experts", 3)]
)
def test_mixtures_of_experts(name: str, count: str, picked: int) -> None:
    experts = {count: 4, "num_experts_per_tok": picked, "moe_intermediate_size": 24}
    ffns, (block,) = blocks_of(small(name, **HEADS, **experts), TOKENS, use_cache=False)
    assert (block.name, block.experts, block.picked) == ("layers.0.mlp", 4, picked)
    assert block.router == "layers.0.mlp.gate"
    # Transformers 5 holds all experts in one weight; older versions in linears, which are sites.
    parts = [f"layers.0.mlp.experts.{part}_proj" for part in ("gate_up", "down")]
    assert list(block.stacked) == parts or any(".experts." in site for site in block.sites)
    assert ("known only at run time" in str(block)) == bool(block.stacked)
    if name == "Qwen2Moe":  # beside the experts there is one that every token takes
        assert [ffn.name for ffn in ffns] == ["layers.0.mlp.shared_expert"]
        assert "layers.0.mlp.shared_expert.down_proj" in block.sites
