"""From a planned skip to the site that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from sparsecomp.blocks import FfnSite
from sparsecomp.ir import LinearSite
from sparsecomp.log import log
from sparsecomp.runtime.block_site import RuntimeBlock, state_of
from sparsecomp.runtime.device_ffn import DeviceSkip
from sparsecomp.runtime.device_site import DeviceSite
from sparsecomp.runtime.ffn_site import RuntimeSkip
from sparsecomp.runtime.site import RuntimeSite
from sparsecomp.runtime.weight_site import ACTIVATIONS
from sparsecomp.targets.base import Target

if TYPE_CHECKING:
    from sparsecomp.skip_planning import PlannedSkip

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""`verify`: the largest difference from the definition, relative to its largest value."""


def runtime_skip(
    skip: PlannedSkip, target: Target, verify: bool
) -> tuple[RuntimeSkip | DeviceSkip | RuntimeBlock | None, str]:
    """Make ready what skips; None and the reason if that fails or if `verify` finds a difference."""
    try:
        with _disable_current_modes(), torch.no_grad():
            # Packs and builds now, where a failure can still be answered with dense.
            runtime = _prepared(skip, target)
            found = _difference(skip, runtime, target) if verify else 0.0
    except Exception as error:  # noqa: BLE001 -- logged with its traceback
        log.warning("%s does not skip: preparing it failed", skip.site.name, exc_info=True)
        return None, f"preparing {skip.form} failed with {type(error).__name__}: {error}"
    # Written so that a NaN counts as a difference.
    if not found <= TOLERANCE[skip.linears[0].site.dtype]:
        reason = f"verify: {skip.form} differs from its definition by {found:.2g} of the largest value"
        log.error("%s does not skip: %s; please report this", skip.site.name, reason)
        return None, reason
    if skip.block is None or isinstance(runtime, DeviceSkip):
        return runtime, ""
    block = skip.block
    state = state_of(block.first.down.weight)
    first = skip.site is block.first
    return RuntimeBlock(runtime, state, block.number, first, block.threshold, block.warmup, block.span), ""


def _prepared(skip: PlannedSkip, target: Target) -> RuntimeSkip | DeviceSkip:
    of_linear, of_skip = (RuntimeSite, RuntimeSkip) if target.fuses else (DeviceSite, DeviceSkip)
    linears = []
    for planned in skip.linears:
        site, chooser = planned.site, planned.chooser
        assert isinstance(site, LinearSite)
        assert chooser is not None
        # The op of a block applies the activation itself; a linear has its own.
        activation = "none" if isinstance(skip.site, FfnSite) else site.activation
        linears.append(of_linear(site.name, site.weight, site.transposed, target, chooser, activation))
    runtime = of_skip(skip.site.name, linears, skip.forms, target)
    runtime.prepare(_tokens(skip), skip.site.residual is not None)
    return runtime


def _tokens(skip: PlannedSkip) -> int:
    """Tokens of the call that the graph was made for."""
    return skip.linears[0].site.tokens


def _difference(skip: PlannedSkip, runtime: RuntimeSkip | DeviceSkip, target: Target) -> float:
    """Of a call with random input at few tokens from the same in plain PyTorch."""
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = skip.forms.spec.sizes[0], skip.forms.spec.sizes[-1]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(skip.linears[0].site.weight)

    x = random(min(_tokens(skip), target.skip_tokens), inputs)
    biases = [random(planned.site.out_features) if _has_bias(planned.site) else None for planned in skip.linears]
    residual = random(x.shape[0], outputs) if skip.site.residual is not None else None
    up = biases[1] if len(biases) == 3 else None
    expected = _definition(skip, x.float(), [_wide(bias) for bias in biases], _wide(residual)).double()
    given = runtime.run(x, (biases[0], up, biases[-1] if len(biases) > 1 else None), residual).double()
    scale = expected.abs().max().item()
    largest = (given - expected).abs().max().item()
    return largest / scale if scale else largest


def _definition(skip: PlannedSkip, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None) -> Tensor:
    """What a site computes, in float32 by products with all of its weights."""
    spec, forms = skip.forms.spec, skip.forms
    linears = [planned.site for planned in skip.linears]
    held = [site.weight.detach().float() for site in linears]
    weights = [weight.t() if site.transposed else weight for site, weight in zip(linears, held, strict=True)]
    thresholds = spec.thresholds

    def product(place: int, value: Tensor) -> Tensor:
        return functional.linear(value, weights[place], biases[place])

    if not spec.is_ffn:
        value = product(0, _stays(x, thresholds[0]))
        if forms.low_rank is not None:
            a, b = forms.low_rank
            value = value + (x - _stays(x, thresholds[0])) @ b.T @ a.T
        value = ACTIVATIONS[forms.after](ACTIVATIONS[spec.activation](value))
        return value if residual is None else value + residual
    by_input = spec.kind == "inputs"
    gate = product(0, _stays(x, thresholds[0]) if by_input else x)
    up = product(1, _stays(x, thresholds[1]) if by_input else x) if len(linears) == 3 else None
    if spec.fused:
        first, second = gate.chunk(2, dim=-1)
        gate, up = (first, second) if spec.fused == "gate" else (second, first)
    hidden = ACTIVATIONS[spec.activation](gate)
    if not by_input:
        hidden = _stays(hidden, thresholds[0])
    if up is not None:
        hidden = hidden * up
    value = product(len(linears) - 1, _stays(hidden, thresholds[-1]) if by_input else hidden)
    return value if residual is None else value + residual


def _wide(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.float()


def _stays(value: Tensor, thresholds: Tensor) -> Tensor:
    return torch.where(value.abs() > thresholds.to(value.device), value, 0.0)


def _has_bias(site: object) -> bool:
    """Whether a linear has a bias."""
    return isinstance(site, LinearSite) and site.bias is not None
