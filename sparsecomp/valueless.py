"""Models without values: what has none becomes fake tensors of one mode, inside of which the model runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from sparsecomp.log import log

_Call = tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any]]


@contextmanager
def runnable(model: Callable[..., Any], inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[_Call]:
    """A call of a model that can run though tensors have no values: inside, all that the model makes is fake as well.

    Tensors on the meta device become fake ones of the CPU, in a copy of the module, since Dynamo does not follow all
    that models do on the meta device; so do fake ones of a GPU where PyTorch sees none and cannot even slice them.
    Tensors with values keep them, and a call all of whose tensors have values stays as it is.

    Args:
        model: a module, or a function, whose call keeps its devices, since what it refers to is not known.
        inputs: what it is called with.
        kwargs: what it is called with by name.
    """
    tensors = _tensors(model, inputs, kwargs)
    fakes = [value for value in tensors if isinstance(value, FakeTensor)]
    mode = fakes[0].fake_mode if fakes else FakeTensorMode()
    call = _on_cpu(model, inputs, kwargs, tensors, mode) if any(map(_is_elsewhere, tensors)) else None
    if call is None and not fakes:
        yield model, inputs, kwargs
        return
    before = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True  # tensors with values, and those that a function refers to
    try:
        with mode:
            yield call or (model, inputs, kwargs)
    finally:
        mode.allow_non_fake_inputs = before


def _is_elsewhere(value: Tensor) -> bool:
    if isinstance(value, FakeTensor):
        return value.device.type == "cuda" and not torch.cuda.is_available()
    return value.device.type == "meta"


def _tensors(model: Callable[..., Any], inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Of the inputs, and all that modules hold: also what is no parameter, as the weights that `nn.LSTM` lists."""
    held = [dict(vars(module)) for module in model.modules()] if isinstance(model, nn.Module) else []
    leaves = pytree.tree_leaves((list(inputs), dict(kwargs), held))
    return list({id(value): value for value in leaves if isinstance(value, Tensor)}.values())


def _on_cpu(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: Sequence[Tensor],
    mode: FakeTensorMode,
) -> _Call | None:
    """The call with fake tensors of the CPU for those that are elsewhere, None where that cannot be."""
    if not isinstance(model, nn.Module) or not all(map(_is_plain, filter(_is_elsewhere, tensors))):
        return None
    with mode:
        made = {id(value): _fake(value) if _is_elsewhere(value) else value for value in tensors}
    try:
        copied = copy.deepcopy(model, dict(made))
    except Exception:  # noqa: BLE001 -- a module may hold anything
        log.info("the model cannot be copied, so it runs on the devices that it is on", exc_info=True)
        return None
    args, named = pytree.tree_map_only(Tensor, lambda value: made[id(value)], (tuple(inputs), dict(kwargs)))
    return copied, args, named


def _is_plain(value: Tensor) -> bool:
    return type(value) in (Tensor, nn.Parameter, FakeTensor) and value.layout == torch.strided


def _fake(value: Tensor) -> Tensor:
    """A tensor of the CPU like one elsewhere; the fake mode is active."""
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(made, requires_grad=value.requires_grad)
    return made.requires_grad_(value.requires_grad)
