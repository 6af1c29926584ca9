"""Calibration reaches the rate that was asked for, spends it where it costs least, and says what is wrong."""

from __future__ import annotations

import pytest
import tiny_models as tiny
import torch
from torch import Tensor, nn

from sparsecomp.planner.quality import mean_loss
from sparsecomp.pruning.calibration import Call
from sparsecomp.skipping import SkipPlan, calibrate_skips, emulate


def _loss(model: nn.Module, plan: SkipPlan, ids: list[Tensor]) -> float:
    calls = [Call((text,), {"use_cache": False}) for text in ids]
    with torch.no_grad():
        dense = [call.run(model) for call in calls]
        with emulate(model, plan):
            return mean_loss(model, calls, dense, None)


@pytest.mark.parametrize("form", ["threshold:0.4", "input:0.5"])
@pytest.mark.parametrize("layerwise", [True, False])
def test_the_share_of_weights_that_is_not_read_is_the_rate(form: str, layerwise: bool) -> None:
    model = tiny.llama()
    plan = calibrate_skips(model, tiny.texts(), form, layerwise=layerwise)
    with emulate(model, plan) as rates:
        for ids in tiny.texts():
            tiny.logits(model, ids)
    sizes = {s: model.get_submodule(s).weight.numel() if form.startswith("input") else 1 for s in plan}
    read = sum(rates.rate(site) * size for site, size in sizes.items()) / sum(sizes.values())
    assert read == pytest.approx(float(form[-3:]), abs=0.02)
    assert len({round(choice.expected, 1) for choice in plan.values()}) > 1 or not layerwise


def test_rates_of_layers_lose_less_than_one_rate() -> None:
    model = tiny.llama(3)
    with torch.no_grad():
        # What a layer gives counts or does not.
        model.model.layers[0].mlp.down_proj.weight.mul_(0.05)
        model.model.layers[1].mlp.down_proj.weight.mul_(2)
    plans = [calibrate_skips(model, tiny.texts(), "threshold:0.5", layerwise=how) for how in (True, False)]
    first, second = (plans[0][f"model.layers.{n}.mlp"].expected for n in (0, 1))
    assert first > second + 0.3
    others = tiny.texts(seed=1)
    assert _loss(model, plans[0], others) < 0.8 * _loss(model, plans[1], others)


def test_linears_of_one_input_skip_the_same() -> None:
    plan = calibrate_skips(tiny.llama(2), tiny.texts(), "input:0.5")
    gate, up = (plan[f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "up"))
    assert gate.threshold == up.threshold
    torch.testing.assert_close(gate.scale, up.scale, rtol=0, atol=0)


def test_filter_chooses_the_linears() -> None:
    plan = calibrate_skips(tiny.llama(2), tiny.texts(), "input:0.5", filter_fn=lambda _, name: "mlp" in name)
    assert {site.split(".")[-2] for site in plan} == {"mlp"}


def test_blocks_without_gates_and_relu() -> None:
    model = tiny.opt()
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.bias.fill_(-0.05)
            layer.fc1.weight.mul_(5)
    plan = calibrate_skips(model, tiny.texts(), "threshold:0.3", layerwise=False)
    # More than half of the hidden units are exactly zero: to skip 0.3 costs nothing.
    assert _loss(model, plan, tiny.texts(seed=1)) == pytest.approx(0, abs=1e-9)
    assert list(calibrate_skips(model, tiny.texts(1), "relu")) == ["model.decoder.layers.0", "model.decoder.layers.1"]


def test_the_model_is_as_before() -> None:
    model = tiny.llama(2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate_skips(model, tiny.texts(2), "threshold:0.5")
    assert model.training
    assert model.config.use_cache
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_models_without_blocks_and_blocks_that_do_not_run_are_errors() -> None:
    with pytest.raises(ValueError, match="no FFN block that is known by the names"):
        calibrate_skips(nn.Sequential(nn.Linear(4, 4)), [torch.randn(2, 4)], "threshold:0.5")
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "mlp": tiny.llama(1).model.layers[0].mlp})
    model.forward = lambda x: model["used"](x)
    with pytest.raises(ValueError, match="FFN block 'mlp' did not run"):
        calibrate_skips(model, [torch.randn(2, 4)], "threshold:0.5")
    with pytest.raises(ValueError, match="NaN or infinity"):
        calibrate_skips(nn.Sequential(nn.Linear(4, 4)), [torch.full((2, 4), torch.nan)], "input:0.5")
