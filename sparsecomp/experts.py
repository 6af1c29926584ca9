"""Experts of mixtures as linears of one operation, so that they are sites like any other and leave a graph whole."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.log import log
from sparsecomp.runtime.experts_site import DENSE_EXPERTS
from sparsecomp.runtime.weight_site import ACTIVATIONS

_FIRST = ("gate_up_proj", "up_proj")
_DOWN = "down_proj"


class SplitExpert(nn.Module):
    """One expert: `down_proj(act_fn(gate) * up)`, gate and up in one linear, or `down_proj(act_fn(up_proj(x)))`."""

    def __init__(self, first: str, weights: tuple[nn.Parameter, nn.Parameter], act_fn: nn.Module) -> None:
        """Make an expert that takes its parameters as they are: of first `[O, I]` and of down."""
        super().__init__()
        for name, weight in zip((first, _DOWN), weights, strict=True):
            outputs, inputs = weight.shape
            linear = nn.Linear(inputs, outputs, bias=False, device="meta")
            linear.weight = weight
            self.add_module(name, linear)
        self.act_fn = act_fn
        self._first = first

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, I]` to `[rows, I]`."""
        hidden = self.get_submodule(self._first)(x)
        if self._first == "gate_up_proj":
            gate, up = hidden.chunk(2, dim=-1)
            hidden = self.act_fn(gate) * up
        else:
            hidden = self.act_fn(hidden)
        result: Tensor = self.get_submodule(_DOWN)(hidden)
        return result


class SplitExperts(nn.ModuleList):
    """The experts of one layer, called as those of transformers are.

    Its `state_dict` has the weights of all experts in one tensor, `[experts, O, I]`, as they were before, and shares
    memory with the model; `load_state_dict` takes the same.
    """

    def __init__(self, experts: list[SplitExpert], first: str, activation: str) -> None:
        """Hold experts.

        Args:
            experts: of the layer.
            first: name of their first linear.
            activation: of all, by its name in `ACTIVATIONS`.
        """
        super().__init__(experts)
        self.first, self.activation = first, activation
        self.register_state_dict_post_hook(_join)
        self.register_load_state_dict_pre_hook(_part)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The picked experts of every token, weighted and summed.

        Args:
            hidden_states: `[tokens, I]`.
            top_k_index: numbers of experts, `[tokens, picked]`.
            top_k_weights: `[tokens, picked]`.
        """
        kind = _Kind(self.first, _DOWN, self.activation)
        return _mixture(kind, list(self), hidden_states, top_k_index, top_k_weights)


class MaskedExperts(nn.ModuleDict):
    """The experts of Switch Transformers, which are linears of their own and are picked by masks.

    As transformers writes it, their number of tokens decides what is called, which is a break in the graph.
    """

    def __init__(self, experts: Mapping[str, nn.Module], activation: str) -> None:
        """Hold the experts `wo(act(wi(x)))` under their names."""
        super().__init__(experts)
        self.activation = activation

    def forward(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        """The picked expert of every token, weighted; 0 for a token without one.

        Args:
            hidden_states: `[tokens, I]`.
            selected_experts: `[tokens, 1, experts]`, 1 for the one that was picked.
            routing_weights: `[tokens, 1]`.
        """
        mask = selected_experts.reshape(hidden_states.shape[0], len(self)).bool()
        # A token beyond the capacity of its expert has none.
        index = torch.where(mask.any(dim=-1), mask.int().argmax(dim=-1), len(self)).unsqueeze(1)
        kind = _Kind("wi", "wo", self.activation)
        return _mixture(kind, list(self.values()), hidden_states, index, routing_weights)


@dataclass(frozen=True)
class _Kind:
    """The names of the linears of an expert, and its activation."""

    first: str
    down: str
    activation: str


def _mixture(kind: _Kind, experts: Sequence[nn.Module], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts that `index [T, K]` picks of x `[T, I]`, each times its weight."""
    if torch.compiler.is_compiling() and not torch.is_grad_enabled() and not experts[0].training:
        first, down = (
            [expert.get_submodule(part).get_parameter("weight") for expert in experts]
            for part in (kind.first, kind.down)
        )
        gated = kind.first == "gate_up_proj"
        arguments = (x, index, weights, first, down, gated, kind.activation, DENSE_EXPERTS)
        found: Tensor = torch.ops.sparsecomp.experts.default(*arguments)
        return found
    out = torch.zeros_like(x)
    # All of them, also those that no token picked: hooks that collect inputs then see every linear run.
    for number, expert in enumerate(experts):
        token, place = torch.where(index == number)
        out = out.index_add(0, token, (expert(x[token]) * weights[token, place, None]).to(out.dtype))
    return out


def split_experts_(model: nn.Module) -> list[str]:
    """Give every expert of a mixture linears of its own, in place, so that it can be pruned, skip and be compiled.

    Transformers 5 keeps the experts of a layer in one weight `[experts, O, I]`, and its products gather from it or sort
    tokens by expert. Afterwards `experts.3.down_proj` is an `nn.Linear` whose weight shares memory with what was there,
    and under `torch.compile` a layer's experts are one operation. `state_dict` is as before, so checkpoints are too.
    Experts of Switch Transformers are linears already; these become one operation. Call it before compiling, and before
    an optimiser is made.

    Args:
        model: any module; a model without such experts stays as it is.

    Returns:
        Qualified names of the modules that were taken apart. Experts of another form (biases, weights `[I, O]`, a gate
        of its own kind, other activations than the kernels have) are left and named in the log.
    """
    return list(_split(model))


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[None]:
    """Take experts apart for the time of a `with`: weights that change inside of it have changed afterwards."""
    whole = _split(model)
    try:
        yield
    finally:
        for name, module in whole.items():
            _replace(model, name, module)


def warn_of_whole_experts(model: nn.Module) -> None:
    """Say that the experts of a model are no sites as they are."""
    names = [name for name, module in _modules(model) if _stacked(module) is not None]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        log.warning(
            "the experts of %s%s are in one weight and left out: call sparsecomp.split_experts_(model) first",
            names[0],
            more,
        )


def _split(model: nn.Module) -> dict[str, nn.Module]:
    """What was replaced, by its name."""
    found = {}
    for name, module in _modules(model):
        if (masked := _masked(module)) is not None:
            _replace(model, name, masked)
            found[name] = module
        weights = _stacked(module)
        if weights is None:
            continue
        if (reason := _unfit(module, weights)) is not None:
            log.warning("the experts of %s stay in one weight: %s", name, reason)
            continue
        _replace(model, name, _apart(module, weights))
        found[name] = module
    return found


def _modules(model: object) -> list[tuple[str, nn.Module]]:
    """All below a model; what is no model is for others to refuse."""
    return [item for item in model.named_modules() if item[0]] if isinstance(model, nn.Module) else []


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _masked(module: nn.Module) -> MaskedExperts | None:
    """What takes the place of the experts of Switch Transformers, None for any other module."""
    if not isinstance(module, nn.ModuleDict) or isinstance(module, MaskedExperts) or not len(module):
        return None
    if list(inspect.signature(module.forward).parameters) != ["hidden_states", "selected_experts", "routing_weights"]:
        return None
    linears = [getattr(expert, part, None) for expert in module.values() for part in ("wi", "wo")]
    activation = _activation(getattr(next(iter(module.values())), "act", None))
    if activation is None or not all(isinstance(linear, nn.Linear) and linear.bias is None for linear in linears):
        return None
    result = MaskedExperts(dict(module.items()), activation)
    result.train(module.training)
    return result


def _stacked(module: nn.Module) -> tuple[str, nn.Parameter, nn.Parameter] | None:
    """Name of the first weight of experts in one weight each, that weight and the one of down."""
    own = dict(module.named_parameters(recurse=False))
    first = next((name for name in _FIRST if name in own), "")
    if not first or _DOWN not in own or own[first].dim() != 3 or own[_DOWN].dim() != 3:
        return None
    return first, own[first], own[_DOWN]


def _unfit(module: Any, weights: tuple[str, nn.Parameter, nn.Parameter]) -> str | None:
    first, up, down = weights
    others = sorted(set(dict(module.named_parameters())) - {first, _DOWN})
    if others:
        return f"they also have {', '.join(others)}"
    if getattr(module, "is_transposed", False) or getattr(module, "has_post_expert_norm", False):
        return "their weights are [I, O], or a norm follows"
    if up.shape[1] != down.shape[2] * (2 if first == "gate_up_proj" else 1) or up.shape[2] != down.shape[1]:
        return f"shapes {list(up.shape)} and {list(down.shape)} are not those of [experts, O, I]"
    gate = getattr(type(module), "_apply_gate", None)
    if first == "gate_up_proj" and getattr(gate, "__name__", "_default_apply_gate") != "_default_apply_gate":
        return "they combine gate and up in a way of their own"
    if _activation(getattr(module, "act_fn", None)) is None:
        return f"their activation {type(getattr(module, 'act_fn', None)).__name__} is not known"
    return None


def _activation(act_fn: Callable[[Tensor], Tensor] | None) -> str | None:
    """The name of an activation, found by its values."""
    if act_fn is None:
        return None
    probe = torch.linspace(-8, 8, 257)
    with torch.no_grad():
        values = act_fn(probe)
        return next((name for name, known in ACTIVATIONS.items() if torch.allclose(known(probe), values)), None)


def _apart(module: Any, weights: tuple[str, nn.Parameter, nn.Parameter]) -> SplitExperts:
    first, up, down = weights
    experts = []
    for number in range(up.shape[0]):
        # `detach` and a view share memory and the count of changes with the whole, so that both see every change.
        one, other = (nn.Parameter(whole.detach()[number], requires_grad=whole.requires_grad) for whole in (up, down))
        # Of its own, since hooks tell the experts apart by it.
        experts.append(SplitExpert(first, (one, other), copy.deepcopy(module.act_fn)))
    activation = _activation(module.act_fn)
    assert activation is not None
    result = SplitExperts(experts, first, activation)
    result.train(module.training)
    return result


def _join(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put the weights of all experts into one tensor that shares their memory."""
    assert isinstance(module, SplitExperts)
    for part in (module.first, _DOWN):
        linears = [expert.get_submodule(part) for expert in module]
        state[prefix + part] = _whole([linear.get_parameter("weight") for linear in linears])
        for number in range(len(linears)):
            del state[f"{prefix}{number}.{part}.weight"]


def _whole(weights: list[nn.Parameter]) -> Tensor:
    first = weights[0].detach()
    size, step = first.element_size(), first.numel()
    storage = first.untyped_storage().data_ptr()
    together = all(
        weight.untyped_storage().data_ptr() == storage
        and weight.data_ptr() == first.data_ptr() + number * step * size
        and weight.is_contiguous()
        for number, weight in enumerate(weights)
    )
    if not together:
        # A copy of the model, or a conversion of its type, has put every weight in a place of its own.
        joined = torch.stack([weight.detach() for weight in weights])
        for weight, own in zip(weights, joined, strict=True):
            weight.data = own
        return joined
    return first.as_strided((len(weights), *first.shape), (step, *first.stride()))


def _part(
    module: nn.Module, state: dict[str, Any], prefix: str, _: Any, __: bool, ___: Any, ____: Any, _____: Any
) -> None:
    assert isinstance(module, SplitExperts)
    for part in (module.first, _DOWN):
        whole = state.pop(prefix + part, None)
        for number, own in enumerate(whole if isinstance(whole, Tensor) else ()):
            state[f"{prefix}{number}.{part}.weight"] = own
