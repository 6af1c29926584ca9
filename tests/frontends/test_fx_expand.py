from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fx_cases import Captured, ensure_op, replace
from torch import Tensor, fx, nn

from sparsecomp.frontends.fx_expand import Expansion, expand, settle
from sparsecomp.ir import LinearSite


@pytest.fixture(autouse=True)
def _op() -> Iterator[None]:
    library = ensure_op()
    yield
    if library is not None:
        library._destroy()


def layer(**options: Any) -> nn.Module:
    defaults: dict[str, Any] = {"batch_first": True, "dropout": 0.1}
    return nn.TransformerEncoderLayer(16, 2, 32, **(defaults | options)).eval()


def run(
    model: nn.Module, *args: Any, keep: bool = True, grad: bool = False, dynamic: bool | None = None, **kwargs: Any
) -> tuple[list[LinearSite], list[Expansion], fx.GraphModule]:
    """Expand, settle and replace inside a compiled call whose result is compared with the model's own."""
    seen: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        expansions = expand(gm)
        sites = Captured(gm, inputs).sites
        settle(gm, expansions, {expansion.name for expansion in expansions} if keep else set())
        replace(gm, [site for site in sites if site.declined is None and (keep or not site.composite)])
        seen.append((sites, expansions, gm))
        return gm.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        expected = model(*args, **kwargs)
        result = torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 1
    return seen[0]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"batch_first": False}, {"bias": False}]
)
def test_encoder_layer(options: dict[str, Any], grad: bool, dynamic: bool | None) -> None:
    sites, _, _ = run(layer(**options), torch.randn(2, 5, 16), grad=grad, dynamic=dynamic)
    assert [site.name for site in sites] == ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"]
    assert [site.declined for site in sites] == [None] * 4
    assert sites[2].activation == options.get("activation", "relu")
    assert sites[3].residual is not None
    if not grad and options.get("batch_first", True) and options.get("bias", True):  # else PyTorch transposes after it
        assert sites[1].residual is not None


@pytest.mark.parametrize("grad", [False, True])
def test_restored_as_it_was(grad: bool) -> None:
    model, x = layer(), torch.randn(2, 5, 16)
    codes: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        codes.append(gm.code)
        expansions = expand(gm)
        assert len(expansions) == 1
        settle(gm, expansions)
        codes.append(gm.code)
        return gm.forward

    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=backend)(x)
    assert codes[0] == codes[1]


def test_composites_are_decided_one_by_one() -> None:
    model = nn.Sequential(layer(), layer())
    x = torch.randn(2, 5, 16)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        expansions = expand(gm)
        sites = Captured(gm, inputs).sites
        chosen = [site for site in sites if site.name.startswith("1.")]
        assert len(chosen) == 4
        settle(gm, expansions, {site.composite for site in chosen}, sites)
        replace(gm, chosen)
        assert gm.code.count("_transformer_encoder_layer_fwd") == 1
        return gm.forward

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["causal", "float", "bool"])
def test_masks(form: str) -> None:
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    if form == "bool":
        mask = mask == float("-inf")
    elif form == "float":
        mask = mask.clamp(min=-2) + 0.3
    sites, expansions, _ = run(layer(), torch.randn(2, 5, 16), src_mask=mask, is_causal=form == "causal", grad=True)
    assert len(expansions) == 1
    assert [site.declined for site in sites] == [None] * 4


class Cross(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **options)

    def forward(self, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        return self.attention(x, y, y, **options)[0]


@pytest.mark.parametrize(
    ("options", "call", "names"),
    [
        ({}, {"need_weights": False}, ["in_proj_weight", "out_proj"]),
        ({"kdim": 16, "vdim": 8}, {"need_weights": False}, ["out_proj", "q_proj", "k_proj", "v_proj"]),
        ({}, {"need_weights": True}, ["in_proj_weight", "out_proj"]),
        ({"add_zero_attn": True}, {"need_weights": False}, ["in_proj_weight", "out_proj"]),
    ],
)
def test_other_forms_stay_and_are_reported(options: dict[str, Any], call: dict[str, Any], names: list[str]) -> None:
    model = Cross(**options).eval()
    y = torch.randn(2, 7, options.get("vdim", 16))
    if "vdim" in options:
        y = torch.randn(2, 7, 16)
        model.attention.v_proj_weight = nn.Parameter(torch.randn(16, 16))
        model.attention.vdim = 16
    sites, expansions, _ = run(model, torch.randn(2, 5, 16), y, grad=True, **call)
    assert expansions == []
    assert [site.name.removeprefix("attention.").removesuffix("_weight") for site in sites] == [
        name.removesuffix("_weight") for name in names
    ]
    assert all("inside multi_head_attention_forward" in str(site.declined) for site in sites)
    assert all(site.composite for site in sites)


def test_padding_masks_stay() -> None:
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    sites, expansions, _ = run(layer(), torch.randn(2, 5, 16), src_key_padding_mask=padding, grad=True)
    assert expansions == []
    assert [site.declined is None for site in sites] == [False, False, True, True]


def test_settle_knows_its_names() -> None:
    gm = fx.symbolic_trace(lambda x: x + 1)
    assert expand(gm) == []
    with pytest.raises(ValueError, match="other was not expanded"):
        settle(gm, [], {"other"})
