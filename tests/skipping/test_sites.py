"""Which modules are FFN blocks, as different libraries write them."""

from __future__ import annotations

import pytest
import tiny_models as tiny
import torch
from torch import nn

from sparsecomp.pruning.calibration import Call
from sparsecomp.skipping.sites import find_ffns, find_input_groups


def test_llama_blocks_are_its_mlps() -> None:
    found = find_ffns(tiny.llama(2))
    assert [ffn.name for ffn in found] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert all(ffn.gated and ffn.linears[-1] == f"{ffn.name}.down_proj" for ffn in found)


def test_blocks_without_a_module_of_their_own_are_named_by_their_layer() -> None:
    found = find_ffns(tiny.opt())
    assert [ffn.name for ffn in found] == ["model.decoder.layers.0", "model.decoder.layers.1"]
    assert not found[0].gated
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert [(ffn.name, ffn.linears[-1]) for ffn in find_ffns(nn.Sequential(layer))] == [("0", "0.linear2")]


@pytest.mark.parametrize("kind", ["Bert", "GPT2", "Phi3", "Nemotron"])
def test_other_families(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "Nemotron":
        sizes["num_key_value_heads"] = 2
    if kind == "GPT2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    config = getattr(transformers, f"{kind}Config")(vocab_size=50, pad_token_id=0, **sizes)
    found = find_ffns(getattr(transformers, f"{kind}Model")(config))
    assert len(found) == 2
    hidden = 128 if kind == "GPT2" else 64
    assert found[0].down_matrix().shape == (32, hidden)
    assert found[0].gated == (kind == "Phi3")


def test_filter_and_models_without_blocks() -> None:
    assert [f.name for f in find_ffns(tiny.llama(2), lambda _, name: ".1." in name)] == ["model.layers.1.mlp"]
    assert find_ffns(nn.Linear(3, 3)) == []


def test_linears_of_one_input_are_one_group_and_the_head_is_left_out() -> None:
    model = tiny.llama(2)
    with torch.no_grad():
        groups = find_input_groups(model, Call((tiny.texts(1)[0],), {}))
    parts = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [[name.rpartition(".")[2] for name in group.names] for group in groups] == parts * 2
