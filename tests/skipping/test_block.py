"""The cosines of FFN blocks, and what a threshold over them would skip."""

from __future__ import annotations

import pytest
import tiny_models as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecomp.pruning.calibration import Call
from sparsecomp.skipping import calibrate_skips, emulate
from sparsecomp.skipping.block import block_cosines, participants, simulate, threshold_for
from sparsecomp.skipping.sites import find_ffns


def test_cosines_are_those_of_the_stream_around_a_block() -> None:
    model = tiny.llama(2)
    (ids,) = tiny.texts(1)
    with torch.no_grad():
        hidden = model(ids, use_cache=False, output_hidden_states=True).hidden_states
        cosines = block_cosines(model, [Call((ids,), {"use_cache": False})], find_ffns(model))
        layer = model.model.layers[0]
        after = hidden[1]
        # The stream before the block is what is behind it less what it adds.
        position = model.model.rotary_emb(hidden[0], torch.arange(ids.shape[1])[None])
        before = hidden[0] + _attention(layer, hidden[0], position)
    assert cosines.shape == (ids.shape[1], 2)
    torch.testing.assert_close(cosines[:, 0], torch.cosine_similarity(before, after, dim=-1)[0])


def _attention(layer, hidden, position):
    length = hidden.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    return layer.self_attn(layer.input_layernorm(hidden), position_embeddings=position, attention_mask=mask)[0]


@given(st.integers(0, 5), st.floats(0.05, 0.35))
def test_the_threshold_for_a_share_skips_it(seed: int, share: float) -> None:
    # The mean grows with depth, as it does in models.
    cosines = torch.rand(200, 20, generator=torch.Generator().manual_seed(seed)) + torch.linspace(0, 0.2, 20)

    def skipped(threshold: float) -> float:
        blocks = participants(cosines, threshold)
        return float(simulate(cosines[:, blocks.start : blocks.stop], threshold).sum()) / 20 if blocks else 0.0

    found = threshold_for(cosines, share)
    assert skipped(found) >= share > skipped(found + 2**-29)


def test_no_more_than_every_second_block_can_be_skipped() -> None:
    with pytest.raises(ValueError, match=r"at most 0\.45"):
        threshold_for(torch.rand(10, 20), 0.5)


def test_the_first_and_last_blocks_take_no_part() -> None:
    model = tiny.llama(7)
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.mlp.down_proj.weight.mul_(0.01)
    plan = calibrate_skips(model, tiny.texts(), "block:0.99")
    assert list(plan) == [f"model.layers.{n}.mlp" for n in (2, 3, 4)]
    assert plan["model.layers.3.mlp"].expected > 0.9
    plan.warmup = 0
    with emulate(model, plan) as rates:
        tiny.logits(model, tiny.texts(1)[0])
    assert rates.rate("model.layers.3.mlp") > 0.9


def test_a_threshold_that_no_block_exceeds_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"block:0\.9999: no two FFN blocks"):
        calibrate_skips(tiny.llama(4), tiny.texts(2), "block:0.9999")
