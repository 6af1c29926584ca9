"""The emulation follows the rules of the forms, and leaves the model as it was."""

from __future__ import annotations

import pytest
import tiny_models as tiny
import torch
from torch import nn
from torch.nn import functional

from sparsecomp.skipping import SkipChoice, SkipForm, SkipPlan, emulate


def _threshold(site: str, value) -> SkipPlan:
    return SkipPlan.of([SkipChoice(site, SkipForm.parse("threshold:0.5"), value)])


def test_threshold_keeps_the_units_whose_activated_gate_is_larger() -> None:
    model = tiny.llama(1)
    mlp = model.model.layers[0].mlp
    x, limits = torch.randn(5, 32), torch.rand(64) * 0.2
    with torch.no_grad(), emulate(model, _threshold("model.layers.0.mlp", limits)) as rates:
        got = mlp(x)
    gate = functional.silu(mlp.gate_proj(x))
    kept = gate.abs() > limits
    assert 0 < int(kept.sum()) < kept.numel()
    torch.testing.assert_close(got, mlp.down_proj(gate * mlp.up_proj(x) * kept))
    assert rates.rate("model.layers.0.mlp") == pytest.approx(1 - float(kept.float().mean()))
    torch.testing.assert_close(mlp(x), mlp.down_proj(gate * mlp.up_proj(x)), rtol=0, atol=0)


def test_threshold_without_a_gate_is_about_the_hidden_layer() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True).eval()
    model = nn.Sequential(layer)
    x = torch.randn(2, 3, 8)
    seen = []
    layer.linear2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    # Under no_grad the layer would take a fused path without its modules.
    model(x)
    with emulate(model, _threshold("0", 0.1)):
        model(x)
    # The hook of the test was there first and sees the values as they come in.
    assert seen[0].equal(seen[1])
    assert layer.linear2._forward_pre_hooks.keys() == {next(iter(layer.linear2._forward_pre_hooks))}


def test_input_form_keeps_scaled_inputs_above_the_threshold() -> None:
    linear = nn.Linear(6, 4)
    model = nn.Sequential(linear)
    x, scale = torch.randn(9, 6), torch.rand(6)
    plan = SkipPlan.of([SkipChoice("0", SkipForm.parse("input:0.5"), 0.3, scale)])
    with emulate(model, plan):
        got = model(x)
    torch.testing.assert_close(got, linear(x * (x.abs() * scale > 0.3)))


def test_rsparse_adds_the_low_rank_part_of_what_is_dropped() -> None:
    linear = nn.Linear(6, 4)
    model = nn.Sequential(linear)
    x, a, b = torch.randn(9, 6), torch.randn(4, 2), torch.randn(2, 6)
    plan = SkipPlan.of([SkipChoice("0", SkipForm.parse("rsparse:0.5"), 0.7, low_rank=(a, b))])
    with emulate(model, plan):
        got = model(x)
    kept = x.abs() > 0.7
    torch.testing.assert_close(got, linear(x * kept) + (x * ~kept) @ b.T @ a.T)


def test_relu_changes_nothing() -> None:
    model = tiny.opt()
    (ids,) = tiny.texts(1)
    want = tiny.logits(model, ids)
    plan = SkipPlan.of([SkipChoice("model.decoder.layers.0", SkipForm("relu"))])
    with emulate(model, plan):
        assert tiny.logits(model, ids).equal(want)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (SkipChoice("model.nothing", SkipForm("relu")), "no FFN block of this model"),
        (SkipChoice("model.layers.0.mlp", SkipForm.parse("input:0.5")), "no nn.Linear"),
        (SkipChoice("model.layers.0.mlp", SkipForm.parse("threshold:0.5"), torch.zeros(3)), "expected 64"),
        (SkipChoice("model.layers.0.mlp.up_proj", SkipForm.parse("input:0.5"), 0.1, torch.zeros(3)), "expected 32"),
    ],
)
def test_plans_of_other_models_are_refused_before_anything_is_hooked(choice: SkipChoice, message: str) -> None:
    model = tiny.llama(1)
    good = SkipChoice("model.layers.0.mlp.down_proj", SkipForm.parse("input:0.5"), 0.1)
    with pytest.raises(ValueError, match=message), emulate(model, SkipPlan.of([good, choice])):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class TestBlock:
    """Whole blocks are skipped by the cosine of the one before."""

    def _plan(self, cosine: float, layers=(1, 2, 3), warmup: int = 0, span: int = 1) -> SkipPlan:
        form = SkipForm("block", 0.5)
        choices = [SkipChoice(f"model.layers.{n}.mlp", form, cosine) for n in layers]
        return SkipPlan.of(choices, warmup=warmup, span=span)

    def test_a_threshold_that_all_exceed_skips_every_second_block(self) -> None:
        model = tiny.llama(5)
        (ids,) = tiny.texts(1)
        with emulate(model, self._plan(-1.0, (1, 2, 3, 4))) as rates:
            tiny.logits(model, ids)
        assert [rates.rate(f"model.layers.{n}.mlp") for n in (1, 2, 3, 4)] == [0, 1, 0, 1]

    def test_span_and_blocks_that_do_not_take_part(self) -> None:
        model = tiny.llama(6)
        (ids,) = tiny.texts(1)
        with emulate(model, self._plan(-1.0, (0, 1, 2, 4), span=3)) as rates:
            tiny.logits(model, ids)
        # Block 3 takes no part: it is computed, and block 4 begins anew.
        assert [rates.rate(f"model.layers.{n}.mlp") for n in (0, 1, 2, 4)] == [0, 1, 1, 0]

    def test_a_skipped_block_adds_nothing(self) -> None:
        model = tiny.llama(3)
        (ids,) = tiny.texts(1)
        with emulate(model, self._plan(-1.0, (1, 2))):
            got = tiny.logits(model, ids)
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight.zero_()
        torch.testing.assert_close(got, tiny.logits(model, ids))

    def test_no_cosine_exceeds_one(self) -> None:
        model = tiny.llama(3)
        (ids,) = tiny.texts(1)
        want = tiny.logits(model, ids)
        with emulate(model, self._plan(1.0, (1, 2))) as rates:
            assert tiny.logits(model, ids).equal(want)
        assert rates.mean() == 0

    def test_first_tokens_are_not_skipped_and_rows_of_a_batch_are_on_their_own(self) -> None:
        model = tiny.llama(3)
        ids = torch.cat(tiny.texts(2, tokens=40))
        with emulate(model, self._plan(-1.0, (1, 2), warmup=30)) as rates:
            both = tiny.logits(model, ids)
        assert rates.rate("model.layers.2.mlp") == 10 / 40
        with emulate(model, self._plan(-1.0, (1, 2), warmup=30)):
            torch.testing.assert_close(both[1:], tiny.logits(model, ids[1:]))

    def test_tokens_one_by_one_skip_as_the_whole_text(self) -> None:
        model = tiny.llama(3)
        (ids,) = tiny.texts(1, tokens=12)
        plan = self._plan(0.2, (0, 1, 2), warmup=6)
        with emulate(model, plan):
            whole = tiny.logits(model, ids)
        with emulate(model, plan), torch.no_grad():
            out = model(ids[:, :4], use_cache=True)
            steps = [out.logits]
            for at in range(4, 12):
                out = model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
                steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
