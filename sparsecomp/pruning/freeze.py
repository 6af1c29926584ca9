"""Masks that survive training: pruned entries stay zero through an optimiser and any loop around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from sparsecomp.log import log
from sparsecomp.pruning.sites import prunable_modules


class FrozenMasks:
    """What `freeze_masks` gives back: `remove()` ends it. As a context manager it ends with the block."""

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        # Weak keys: the hook on the optimisers is global and would else keep every frozen model alive.
        self._zeros = WeakTensorKeyDictionary()
        self._hooks: list[RemovableHandle] = []
        for weight in weights.values():
            self._zeros[weight] = weight.detach() == 0
            # Gradients too, not only weights: momentum does not gather for pruned entries, and clipping by the norm
            # does not count them. This alone serves a loop that updates without an optimiser.
            if weight.requires_grad:
                self._hooks.append(weight.register_post_accumulate_grad_hook(self._clear_gradient))
        self._hooks.append(register_optimizer_step_post_hook(self._clear_weights))
        self.names = list(weights)

    def remove(self) -> None:
        """Let the pruned entries train again. Calling it twice does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._zeros.clear()

    def __enter__(self) -> FrozenMasks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _zeros_of(self, weight: Tensor) -> Tensor:
        zeros: Tensor = self._zeros[weight]
        if zeros.device != weight.device:  # the model moved
            zeros = self._zeros[weight] = zeros.to(weight.device)
        return zeros

    def _clear_gradient(self, weight: Tensor) -> None:
        if weight.grad is not None:
            with torch.no_grad():
                weight.grad.masked_fill_(self._zeros_of(weight), 0)

    def _clear_weights(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    if weight in self._zeros:
                        weight.masked_fill_(self._zeros_of(weight), 0)


def freeze_masks(model: nn.Module) -> FrozenMasks:
    """Keep the entries of a model's weights that are zero now at zero while it trains.

    Their gradients are cleared as they arrive, and after every step of a `torch.optim` optimiser the entries are set to
    zero again, whatever its momentum from before, weight decay or noise made of them. Parameters, `state_dict`, module
    hooks and the compiled model stay as they are. It takes a byte for every entry of a frozen weight.

    A weight without any nonzero entry is left free: it was not pruned but set up to begin at zero, such as half of a
    low-rank adapter. Copies of weights that a training library makes for itself (sharded, or in another precision) are
    not seen: freeze after the library prepared the model. Loading a `state_dict` with other zeros needs a new call.

    Args:
        model: a pruned model; the weights of its modules that can be pruned are looked at.

    Returns:
        A handle with `remove()` and the `names` of the modules whose zeros are kept; also a context manager.

    Raises:
        ValueError: no weight holds zeros.
    """
    weights: dict[str, nn.Parameter] = {}
    for name, module, kind in prunable_modules(model):
        weight = dict(module.named_parameters(recurse=False)).get(kind.parameter)
        if weight is None or any(weight is known for known in weights.values()):
            continue
        nonzeros = int(torch.count_nonzero(weight.detach()))
        if nonzeros == 0 and weight.numel():
            log.info("freeze_masks: %s holds no nonzero weight and is left free", name or "the model")
        elif nonzeros < weight.numel():
            weights[name] = weight
    if not weights:
        raise ValueError(
            "no weight of the model holds zeros, so there is no mask to keep: prune it first (sparsecomp.sparsify_)"
        )
    return FrozenMasks(weights)
