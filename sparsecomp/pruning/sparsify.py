"""Pruning of a model in place: dense tensors that hold zeros, which any other tool can take over.

All modules are examined and all masks computed before the first weight changes, so a call completes or changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsecomp.patterns import Pattern
from sparsecomp.pruning.magnitude import magnitude

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

FilterFn = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Prunable:
    """A type of module that can be pruned.

    Attributes:
        module_type: the type; its subclasses are meant too.
        parameter: name of the parameter that holds the weight.
        to_matrix: view of the weight (or of its scores) as the `[O, I]` that patterns describe.
        from_matrix: the way back for a mask: `(mask [O, I], weight) -> mask` in the weight's shape.
    """

    module_type: type[nn.Module]
    parameter: str
    to_matrix: Callable[[Tensor], Tensor]
    from_matrix: Callable[[Tensor, Tensor], Tensor]


PRUNABLE: tuple[Prunable, ...] = (
    Prunable(nn.Linear, "weight", to_matrix=lambda weight: weight, from_matrix=lambda mask, _: mask),
)


def sparsify_(model: nn.Module, pattern: str | Pattern, *, filter_fn: FilterFn | None = None) -> list[str]:
    """Prune the weights of a model in place, by magnitude.

    A weight that several modules share is pruned once, also where the other module is no linear (a tied embedding
    changes too: leave its head out with `filter_fn` if that is not wanted). Gradients, hooks and the `requires_grad` of
    the parameters stay; their version counters advance, so a compiled model notices.

    Args:
        model: any module; its `nn.Linear` modules are pruned (the model itself, if it is one).
        pattern: what to prune to, such as `"unstructured@0.8"`, `"2:4"`, `"32:2:4"` or `"16x1@0.5"`; `"dense"` drops
            nothing.
        filter_fn: `(module, qualified_name) -> bool`, called for every module that can be pruned; all of them if None.

    Returns:
        Qualified names of the modules whose weights were pruned, in the order of `model.named_modules()`; a shared
        weight gives every accepted module that holds it, the empty name is the model itself. Empty for `"dense"`.

    Raises:
        ValueError: the pattern is wrong or has no share, no module can be pruned, `filter_fn` rejects all of them, or a
            weight cannot be pruned. The model is then as it was.
    """
    pattern = Pattern.parse(pattern)
    if pattern.kind in ("unstructured", "block") and pattern.sparsity is None:
        raise ValueError(
            f"pattern '{pattern}' does not say how much to prune: give the share of zeros, such as '{pattern}@0.8'"
        )
    chosen = _choose(model, filter_fn)
    weights: dict[str, Tensor] = {name: _weight_of(module, name, kind) for name, module, kind in chosen}
    if pattern.kind == "dense":
        return []

    drops: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for name, _, kind in chosen:
            weight = weights[name]
            if id(weight) not in drops:
                drops[id(weight)] = (weight, _entries_to_drop(weight, pattern, kind, name))
        for weight, drop in drops.values():
            weight.masked_fill_(drop, 0)
    return [name for name, _, _ in chosen]


def _prunable(model: nn.Module) -> Iterator[tuple[str, nn.Module, Prunable]]:
    # Duplicates are kept, so that a filter sees a shared module under each of its names.
    for name, module in model.named_modules(remove_duplicate=False):
        for kind in PRUNABLE:
            if isinstance(module, kind.module_type):
                yield name, module, kind
                break


def _choose(model: nn.Module, filter_fn: FilterFn | None) -> list[tuple[str, nn.Module, Prunable]]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, given {type(model).__name__}")
    candidates = list(_prunable(model))
    types = ", ".join(f"nn.{kind.module_type.__name__}" for kind in PRUNABLE)
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no module that can be pruned ({types})")
    chosen = [item for item in candidates if filter_fn is None or filter_fn(item[1], item[0])]
    if not chosen:
        names = ", ".join(repr(name) for name, _, _ in candidates[:3])
        more = f" and {len(candidates) - 3} more" if len(candidates) > 3 else ""
        raise ValueError(f"filter_fn rejected every module that can be pruned ({types}): {names}{more}")
    return chosen


def _where(name: str) -> str:
    return f"module {name!r}" if name else "the model"


def _weight_of(module: nn.Module, name: str, kind: Prunable) -> nn.Parameter:
    """The parameter to prune; ValueError with the module's name if it cannot be changed in place."""
    weight = dict(module.named_parameters(recurse=False)).get(kind.parameter)
    problem = (
        "is computed from other tensors (a parametrization, or torch.nn.utils.prune): make it permanent first "
        "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove)"
    )
    if weight is not None:
        problem = _problem(weight)
        if not problem:
            return weight
    raise ValueError(f"{_where(name)} ({type(module).__name__}) cannot be pruned: its {kind.parameter} {problem}")


def _problem(weight: nn.Parameter) -> str:
    """What keeps a weight from being pruned in place; empty if nothing does."""
    lazy: bool = is_lazy(weight)
    if lazy:
        return "is not initialised yet: run the model once"
    if weight.is_meta:
        return "is on the meta device and has no values: load the model first"
    if type(weight.data) is not Tensor or weight.layout != torch.strided:
        return f"is a {type(weight.data).__name__} of layout {weight.layout}, not a plain dense tensor"
    if weight.dtype not in _DTYPES:
        return f"is {weight.dtype}, not a float of 16, 32 or 64 bits: prune before quantising"
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        return "was made under torch.inference_mode and cannot change outside it: call sparsify_ under it too"
    if any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
        return "is an expanded view, whose entries share memory: clone it first"
    return ""


def _entries_to_drop(weight: Tensor, pattern: Pattern, kind: Prunable, name: str) -> Tensor:
    try:
        keep = pattern.mask(kind.to_matrix(magnitude(weight)))
    except ValueError as error:
        raise ValueError(f"{_where(name)} cannot be pruned to {pattern}: {error}") from error
    return ~kind.from_matrix(keep, weight)
