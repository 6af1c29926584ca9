"""What the sites of a model see on calibration inputs: a bounded sample of rows, drawn evenly from all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.pruning.calibration import Call
from sparsecomp.skipping.sites import FFN, InputGroup

ROWS = 512
"""Rows that are kept of every site: hundreds of thousands of values, whose quantiles are off by parts of 1 %."""


class Reservoir:
    """Keeps an even sample of the rows that went by: those of the smallest random keys.

    Args:
        rows: kept at most.
        seed: of the keys.
    """

    def __init__(self, rows: int = ROWS, seed: int = 0) -> None:
        self._rows = rows
        self._random = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0)
        self._kept: list[Tensor] = []

    def add(self, *values: Tensor) -> None:
        """Rows `[..., width]` of one or several values that belong together, of one number of rows."""
        flat = [value.detach().reshape(-1, value.shape[-1]) for value in values]
        keys = torch.rand(flat[0].shape[0], generator=self._random)
        drawn = keys.topk(min(self._rows, keys.numel()), largest=False).indices
        # The drawn rows are copies: the tensors of the model are not kept alive.
        fresh = [value[drawn].float() for value in flat]
        both = torch.cat([self._keys, keys[drawn]])
        joined = [torch.cat(pair) for pair in zip(self._kept, fresh, strict=True)] if self._kept else fresh
        best = both.topk(min(self._rows, both.numel()), largest=False).indices
        self._keys, self._kept = both[best], [value[best] for value in joined]

    @property
    def values(self) -> tuple[Tensor, ...]:
        """The rows, float32 `[rows, width]` of each value; empty if there were none."""
        return tuple(self._kept)


def sample_hidden(model: nn.Module, calls: Sequence[Call], ffns: Sequence[FFN]) -> list[tuple[Tensor, Tensor]]:
    """The activated gate and the hidden layer of FFN blocks.

    Returns:
        For every block float32 `[rows, hidden]` of both, of the same rows; without a gate both are the hidden layer.

    Raises:
        ValueError: a block did not run, or gave NaN or infinity.
    """
    reservoirs = [Reservoir() for _ in ffns]
    last: dict[int, Tensor] = {}

    def activated(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            last[number] = output

        return hook

    def hidden(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            reservoirs[number].add(last.pop(number, args[0]), args[0])

        return hook

    with ExitStack() as stack:
        for number, ffn in enumerate(ffns):
            if ffn.gated and ffn.activation is not None:
                stack.callback(ffn.activation.register_forward_hook(activated(number)).remove)
            stack.callback(ffn.down.register_forward_pre_hook(hidden(number)).remove)
        for call in calls:
            call.run(model)
    result = []
    for ffn, reservoir in zip(ffns, reservoirs, strict=True):
        _check(reservoir.values, f"FFN block {ffn.name!r}")
        result.append((reservoir.values[0], reservoir.values[1]))
    return result


def sample_inputs(model: nn.Module, calls: Sequence[Call], groups: Sequence[InputGroup]) -> list[Tensor]:
    """The inputs of groups of linears, float32 `[rows, in]` of each.

    Raises:
        ValueError: a linear did not run, or was given NaN or infinity.
    """
    reservoirs = [Reservoir() for _ in groups]
    with ExitStack() as stack:
        for group, reservoir in zip(groups, reservoirs, strict=True):

            def hook(_: nn.Module, args: tuple[Any, ...], reservoir: Reservoir = reservoir) -> None:
                reservoir.add(args[0])

            stack.callback(group.modules[0].register_forward_pre_hook(hook).remove)
        for call in calls:
            call.run(model)
    for group, reservoir in zip(groups, reservoirs, strict=True):
        _check(reservoir.values, f"linear {group.names[0]!r}")
    return [reservoir.values[0] for reservoir in reservoirs]


def _check(values: tuple[Tensor, ...], where: str) -> None:
    if not values:
        raise ValueError(f"{where} did not run on any calibration input: give inputs that reach it, or leave it out")
    if not all(bool(value.isfinite().all()) for value in values):
        raise ValueError(f"{where} has NaN or infinity on the calibration inputs: look at the batches")
