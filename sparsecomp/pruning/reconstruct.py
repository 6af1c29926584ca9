"""Block-wise reconstruction: the kept weights of one block are tuned until it gives the dense block's output.

The masks are fixed. The block sees what the pruned model gives it and aims at what the dense model has at that place,
so that it also makes up for errors of the blocks before it. Related: EBFT (Guo et al. 2024, arXiv:2402.12419) and BRECQ
(Li et al. 2021, arXiv:2102.05426), which tune block by block against the dense block's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.log import log
from sparsecomp.pruning.calibration import Call, first_tensor

_WARM_UP = 10
"""Steps over which the rate rises: Adam's first steps are as long as the rate, and go by a single mini-batch."""


@dataclass(frozen=True)
class Reconstruction:
    """How long and how fast a block is tuned.

    Attributes:
        steps: Adam steps for each block.
        tokens: of a step, or positions of pictures; inputs are taken whole, at least one.
        learning_rate: the highest rate; it falls to 0 along a cosine.
    """

    steps: int = 200
    tokens: int = 1024
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("steps", "tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Reconstruction({name}={value!r}): expected a whole number of at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"Reconstruction(learning_rate={self.learning_rate!r}): expected a positive number")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        rising = min(1.0, (step + 1) / _WARM_UP)
        return self.learning_rate * rising * (1 + math.cos(math.pi * step / self.steps)) / 2


def reconstruct_block(
    block: nn.Module,
    masks: Mapping[nn.Parameter, Tensor],
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    *,
    settings: Reconstruction,
) -> tuple[float, float]:
    """Tune the kept weights of a block in place, and its biases and norms (all its vectors).

    The error is the squared distance to the target relative to the target's squared length, averaged over the tokens: a
    few tokens of huge activations, as language models have, do not outweigh all others. The result is the same at every
    call, up to the order of summation of the machine.

    Memory: three copies of the block's tuned parameters in float32 (a master copy, two moments), one in their own type,
    and the activations of one step.

    Args:
        block: in evaluation mode. Gradients and `requires_grad` of its parameters stay as they were.
        masks: for each pruned weight, which entries are kept (bool, in its shape); the others stay zero.
        calls: the block's calls in the pruned model.
        targets: for each call the output wanted; dimension 0 counts the inputs, features are the last dimension
            (dimension 1 of a picture `[N, C, H, W]`).
        settings: how long and how fast.

    Returns:
        The error over all calls before and after. If it did not fall, the block is as it was and both are the same.

    Raises:
        ValueError: called under `torch.inference_mode`, where nothing can be tuned.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("reconstruction needs gradients: call sparsify_ outside of torch.inference_mode")
    tuned = [p for p in block.parameters() if p in masks or (p.dim() <= 1 and p.is_floating_point())]
    start = [p.detach().clone() for p in tuned]
    samples = _Samples(block, calls, targets, settings.tokens)
    before = samples.error(block)
    with _only_these_require_grad(block, tuned):
        _tune(block, tuned, masks, samples, settings)
    after = samples.error(block)
    if after < before:
        return before, after
    log.info("reconstruction: error %.4g after %.4g, the block stays as it was", after, before)
    with torch.no_grad():
        for parameter, values in zip(tuned, start, strict=True):
            parameter.copy_(values)
    return before, before


def _tune(
    block: nn.Module,
    tuned: list[nn.Parameter],
    masks: Mapping[nn.Parameter, Tensor],
    samples: _Samples,
    settings: Reconstruction,
) -> None:
    # Steps are far below the spacing of 16-bit floats, so they are summed in float32.
    master = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in tuned]
    drops = [~masks[p] if p in masks else None for p in tuned]
    optimizer = torch.optim.Adam(master, lr=settings.learning_rate)
    for step, batch in zip(range(settings.steps), samples.batches(), strict=False):
        optimizer.param_groups[0]["lr"] = settings.rate(step)
        for copy, gradient, drop in zip(master, _gradients(block, tuned, samples, batch), drops, strict=True):
            copy.grad = gradient.to(copy.dtype) if drop is None else gradient.to(copy.dtype).masked_fill_(drop, 0)
        optimizer.step()
        with torch.no_grad():
            for parameter, copy in zip(tuned, master, strict=True):
                parameter.copy_(copy)


def _gradients(block: nn.Module, tuned: list[nn.Parameter], samples: _Samples, batch: _Batch) -> list[Tensor]:
    total: list[Tensor] = []
    for call, target in samples.take(batch):
        with torch.enable_grad(), _products_in_bfloat16():
            loss = _errors(call, block, target).mean() / len(batch)
            gradients = torch.autograd.grad(loss, tuned, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(tuned, gradients, strict=True)]
        total = [a + b for a, b in zip(total, filled, strict=True)] if total else filled
    return total


def _products_in_bfloat16() -> AbstractContextManager[Any]:
    """Autocast where the processor multiplies bfloat16: a gradient needs no more, and a step takes a fraction.

    Elsewhere such products are emulated, and everything stays float32. Weights, errors and Adam are float32 anyway.
    """
    has: Mapping[str, Any] = torch.cpu.get_capabilities()
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(has.get("avx512_bf16") or has.get("amx_bf16")))


def _features(target: Tensor) -> int:
    """The dimension of the features: the last one, but the channels of pictures `[N, C, H, W]`."""
    return 1 if target.dim() == 4 else -1


def _errors(call: Call, block: nn.Module, target: Tensor) -> Tensor:
    """Relative squared error of every token."""
    output = first_tensor(call.run(block))
    assert output is not None  # the targets came from the same block
    features = _features(target)
    wanted = target.to(torch.float32)
    length = wanted.square().sum(features)
    # A token of nearly no length would count as much as it is short.
    length = length.clamp_min(0.01 * float(length.mean()) + 1e-30)
    return (output.to(torch.float32) - wanted).square().sum(features) / length


@contextmanager
def _only_these_require_grad(block: nn.Module, tuned: list[nn.Parameter]) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in block.parameters()]
    try:
        block.requires_grad_(False)
        for parameter in tuned:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


_Batch = list[tuple[int, Tensor | None]]
"""What a step sees: numbers of calls, and which of their inputs (None: all, unsplit)."""


class _Samples:
    """Calls with their targets, cut into mini-batches in a fixed random order."""

    def __init__(self, block: nn.Module, calls: Sequence[Call], targets: Sequence[Tensor], tokens: int) -> None:
        self._calls = calls
        self._targets = targets
        self._tokens = tokens
        self._random = torch.Generator().manual_seed(0)
        largest = max(range(len(calls)), key=lambda index: len(targets[index]))
        self._splits = len(targets[largest]) > 1 and self._can_split(block, largest)

    def error(self, block: nn.Module) -> float:
        """Mean over all tokens."""
        total, count = 0.0, 0
        with torch.no_grad():
            for call, target in zip(self._calls, self._targets, strict=True):
                errors = _errors(call, block, target)
                total += float(errors.sum())
                count += errors.numel()
        return total / count

    def batches(self) -> Iterator[_Batch]:
        """Mini-batches without end; in every round each input comes once."""
        while True:
            pieces: list[tuple[int, Tensor | None, int]] = []
            for index, target in enumerate(self._targets):
                each = max(1, target[:1].numel() // target.shape[_features(target)])
                if self._splits:
                    order = torch.randperm(len(target), generator=self._random)
                    pieces += [(index, rows, each * len(rows)) for rows in order.split(max(1, self._tokens // each))]
                else:
                    pieces.append((index, None, each * len(target)))
            batch: _Batch = []
            tokens = 0
            for number in torch.randperm(len(pieces), generator=self._random).tolist():
                index, rows, more = pieces[number]
                if batch and tokens + more > self._tokens:
                    yield batch
                    batch, tokens = [], 0
                batch.append((index, rows))
                tokens += more
            yield batch

    def take(self, batch: _Batch) -> Iterator[tuple[Call, Tensor]]:
        """The calls and targets of a mini-batch."""
        for index, rows in batch:
            if rows is None:
                yield self._calls[index], self._targets[index]
            else:
                yield self._rows(index, rows), self._targets[index][rows]

    def _rows(self, index: int, rows: Tensor) -> Call:
        """A call for some of its inputs: tensors that have one entry for each input are cut."""
        call, count = self._calls[index], len(self._targets[index])
        for slot, value in call.slots():
            if isinstance(value, Tensor) and value.dim() and len(value) == count:
                call = call.replace(slot, value[rows])
        return call

    def _can_split(self, block: nn.Module, index: int) -> bool:
        """Whether the block, given some of the inputs of a call, gives the same outputs as given all."""
        rows = torch.arange(0, len(self._targets[index]), 2)
        with torch.no_grad():
            whole = first_tensor(self._calls[index].run(block))
            try:
                part = first_tensor(self._rows(index, rows).run(block))
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                log.info("reconstruction: calls are not split into inputs, since the block says: %s", error)
                return False
        assert whole is not None
        close = part is not None and part.shape == whole[rows].shape and torch.allclose(part, whole[rows], 1e-2, 1e-2)
        if not close:
            log.info("reconstruction: calls are not split into inputs, since the block's inputs are not independent")
        return close
