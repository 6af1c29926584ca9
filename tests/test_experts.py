"""Experts of mixtures are sites like any other: pruned, explained, compiled in one graph, and they may skip."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsecomp
from sparsecomp.backend import compilations
from sparsecomp.skipping import SkipChoice, SkipForm, SkipPlan, emulate

transformers = pytest.importorskip("transformers")

IDS = torch.arange(24).reshape(2, 12)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
}
KINDS = {
    "Mixtral": {"intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {"moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2},
}
EXPERTS = "model.layers.0.mlp.experts"


def mixture(kind: str = "Mixtral", **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | KINDS[kind] | options), initializer_range=0.1)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, use_cache=False).logits
    return found


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="sparse", fullgraph=True, options=options)


def is_close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() <= 1e-4 * want.abs().max())


def of_experts(_: nn.Module, name: str) -> bool:
    return "experts." in name


@pytest.mark.parametrize("kind", KINDS)
def test_split_experts_compute_what_they_did(kind: str) -> None:
    model = mixture(kind)
    want = logits(model)
    assert sparsecomp.split_experts_(model) == [EXPERTS]
    assert sparsecomp.split_experts_(model) == []
    assert is_close(logits(model), want)
    assert isinstance(model.get_submodule(f"{EXPERTS}.3.down_proj"), nn.Linear)


def test_split_experts_have_the_state_of_whole_ones(tmp_path: Path) -> None:
    model, other = mixture(), mixture()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparsecomp.split_experts_(model)
    after = model.state_dict()
    assert list(before) == sorted(before, key=list(before).index)
    assert set(after) == set(before)
    assert all(after[name].equal(value) for name, value in before.items())
    weight = model.get_submodule(f"{EXPERTS}.1.down_proj").get_parameter("weight")
    after[f"{EXPERTS}.down_proj"][1].fill_(3.0)
    assert bool((weight == 3.0).all())
    model.load_state_dict(other.state_dict())
    assert is_close(logits(model), logits(other))
    sparsecomp.save_checkpoint(model, tmp_path)
    assert is_close(logits(type(model).from_pretrained(tmp_path)), logits(other))


def test_state_of_a_copy_shares_memory_with_the_copy() -> None:
    model = mixture()
    sparsecomp.split_experts_(model)
    twin = copy.deepcopy(model).double()
    state = twin.state_dict()[f"{EXPERTS}.down_proj"]
    state.zero_()
    assert state.dtype == torch.float64
    assert not twin.get_submodule(f"{EXPERTS}.2.down_proj").get_parameter("weight").any()
    assert model.get_submodule(f"{EXPERTS}.2.down_proj").get_parameter("weight").any()


def test_gradients_reach_split_experts() -> None:
    model, whole = mixture(), mixture()
    sparsecomp.split_experts_(model)
    for each in (model, whole):
        each(IDS, labels=IDS).loss.backward()
    stacked = whole.get_submodule(EXPERTS).get_parameter("down_proj").grad
    own = model.get_submodule(f"{EXPERTS}.2.down_proj").get_parameter("weight").grad
    torch.testing.assert_close(own, stacked[2], rtol=1e-4, atol=1e-6)


class Whole(nn.Module):
    """Experts as transformers keeps them, with something of their own."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        sizes = {"gate_up_proj": (4, 64, 16), "down_proj": (4, 16, 32)} | changes.pop("sizes", {})
        for name, shape in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))
        self.act_fn = nn.SiLU()
        for name, value in changes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sizes": {"down_proj_bias": (4, 16)}}, "also have down_proj_bias"),
        ({"is_transposed": True}, "a norm follows"),
        ({"sizes": {"down_proj": (4, 32, 16)}}, "are not those of"),
        ({"act_fn": nn.Softplus()}, "Softplus is not known"),
    ],
)
def test_experts_of_another_form_are_left_with_the_reason(
    changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(Whole(**changes))
    assert sparsecomp.split_experts_(model) == []
    assert reason in caplog.text
    assert isinstance(model[0], Whole)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_experts_are_pruned_in_the_weight_that_holds_them(criterion: str) -> None:
    model = mixture()
    experts = model.get_submodule(EXPERTS)
    version = experts.down_proj._version
    calibration = [IDS] if criterion == "wanda" else None
    names = sparsecomp.sparsify_(
        model, "unstructured@0.75", criterion=criterion, calibration=calibration, filter_fn=of_experts
    )
    assert names == [f"{EXPERTS}.{number}.{part}" for number in range(4) for part in ("gate_up_proj", "down_proj")]
    assert model.get_submodule(EXPERTS) is experts
    assert experts.down_proj._version > version
    for weight in (experts.gate_up_proj, experts.down_proj):
        zeros = weight.eq(0).float().mean(dim=(1, 2))
        torch.testing.assert_close(zeros, torch.full((4,), 0.75), rtol=0, atol=0.01)


def test_whole_experts_are_named_where_they_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    mlp, x = mixture().model.layers[0].mlp, torch.randn(1, 12, 64)
    model = nn.Sequential(mlp, nn.Linear(64, 64))
    sparsecomp.calibrate_skips(model, [x], "input:0.4", layerwise=False)
    assert "0.experts are in one weight and left out" in caplog.text
    assert "split_experts_(model)" in str(sparsecomp.explain(model, x).notes)


def block(**options: Any) -> tuple[nn.Module, Tensor]:
    """A mixture alone, which compiles sooner than a model, and an input of twelve tokens."""
    model = mixture(**options)
    sparsecomp.split_experts_(model)
    mlp: nn.Module = model.model.layers[0].mlp
    return mlp, torch.randn(1, 12, model.config.hidden_size)


def output(module: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(x)
    return found


def test_sparse_experts_run_in_one_graph() -> None:
    mlp, x = block(hidden_size=128, intermediate_size=512)
    sparsecomp.sparsify_(mlp, "unstructured@0.9", filter_fn=of_experts)
    fast = compiled(mlp)
    assert is_close(output(fast, x), output(mlp, x))
    inside = [choice for choice in sparsecomp.explain(mlp, x).plan if choice.name.startswith("experts.")]
    assert len(inside) == 8
    assert all(choice.density < 0.11 and not choice.declined for choice in inside)
    done = compilations()[-1]
    assert done.rewritten == [choice.name for choice in inside if not choice.chosen.is_dense]
    assert done.rewritten
    before = output(mlp, x)
    with torch.no_grad():
        for number in range(4):
            mlp.get_submodule(f"experts.{number}.down_proj").get_parameter("weight").mul_(-2)
    assert is_close(output(fast, x), output(mlp, x))
    assert is_close(output(mlp, x), -2 * before)


@pytest.mark.parametrize("form", ["input:0.5", "threshold:0.5"])
def test_experts_skip_as_emulated(form: str) -> None:
    mlp, x = block()
    # Of other tokens: of the same ones, sizes would lie on the thresholds.
    other = torch.randn(1, 200, x.shape[-1])
    skips = sparsecomp.calibrate_skips(mlp, [other], form, filter_fn=of_experts, layerwise=False)
    one = x[:, :1]
    with emulate(mlp, skips):
        want = output(mlp, one)
    fast = compiled(mlp, skip=skips)
    assert is_close(output(fast, one), want)
    assert not is_close(want, output(mlp, one))
    seen = [choice.reason for choice in sparsecomp.explain(fast, one).plan if choice.name.startswith("experts.")]
    assert all(f"skips {form} of experts." in reason for reason in seen)
    # Two of the four experts ran.
    assert sum("not run yet" in reason for reason in seen) == 4
    assert len(seen) == 8


def switch() -> tuple[nn.Module, Tensor]:
    """A layer of Switch Transformers whose experts take at most three tokens, and an input."""
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(d_model=64, d_ff=512, num_experts=4, expert_capacity=3)
    module = transformers.models.switch_transformers.modeling_switch_transformers.SwitchTransformersSparseMLP(config)
    model = nn.ModuleDict({"mlp": module}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model, torch.randn(1, 12, 64)


def test_experts_of_switch_transformers_are_one_operation_and_skip_zeros() -> None:
    model, x = switch()
    state = list(model.state_dict())
    want = output(model["mlp"], x)
    assert (want == 0).all(dim=-1).any()
    assert sparsecomp.split_experts_(model) == ["mlp.experts"]
    assert list(model.state_dict()) == state
    assert is_close(output(model["mlp"], x), want)
    relu = SkipPlan.of(SkipChoice(f"experts.expert_{number}", SkipForm("relu")) for number in range(4))
    fast = compiled(model["mlp"], skip=relu)
    assert is_close(output(fast, x), want)
    assert is_close(output(fast, x[:, :1]), output(model["mlp"], x[:, :1]))
    reasons = [choice.reason for choice in sparsecomp.explain(fast, x[:, :1]).plan]
    assert sum("skips relu of experts.expert_" in reason and "skipped so far" in reason for reason in reasons) >= 2


def test_dense_experts_are_left_to_one_op() -> None:
    mlp, x = block()
    assert is_close(output(compiled(mlp), x), output(mlp, x))
    assert compilations()[-1].rewritten == []


@pytest.mark.slow
def test_a_model_with_experts_is_one_graph() -> None:
    model = mixture("Qwen2Moe", num_hidden_layers=2)
    sparsecomp.split_experts_(model)
    skips = sparsecomp.calibrate_skips(model, [IDS + 40], "input:0.5", layerwise=False)
    fast = compiled(model, skip=skips)
    with emulate(model, skips):
        want = logits(model, IDS[:1, :1])
    assert is_close(logits(fast, IDS[:1, :1]), want)
