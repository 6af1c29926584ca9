"""Batch-norm statistics estimated again, for a model whose weights changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsecomp.pruning.calibration import as_calls, calibrating


def batchnorms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms of a model that normalise by stored statistics in evaluation, by qualified name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> list[str]:
    """Replace the running mean and variance of every batch norm by those of its inputs on some batches.

    Pruned weights give other activations than the stored statistics describe, and the error multiplies from layer to
    layer. One pass over the batches: every batch norm normalises by its current batch, as in training, so that the
    layers behind it see inputs as they will be; the moments of the batches are pooled by their number of values. This
    is the "precise" estimate of Wu and Johnson 2021 (arXiv:2105.07576, section 3), which differs from a moving average
    in that all batches count alike.

    Batches should be as varied as the data (shuffled) and not tiny, from about 16 images.

    Args:
        model: changed in place, its running statistics only. Dropout is off; the modes of its modules stay as they are.
        batches: inputs, as `sparsify_` takes them for calibration.

    Returns:
        Qualified names of the batch norms that changed, in the order of `model.named_modules()`; one that the batches
            do not reach is left alone. Empty if the model has none, which then is not run.

    Raises:
        ValueError: there is no batch; a batch norm meets a single value per channel, or values that are not finite.
            The model is then as it was, as after any other error.
    """
    norms = batchnorms(model)
    moments = batch_moments(model, batches)
    for name, moved in moments.items():
        for tensor, value in zip(_statistics(norms[name]), moved, strict=True):
            tensor.copy_(value)
    return list(moments)


def batch_moments(model: nn.Module, batches: Iterable[Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean `[C]` and variance `[C]`, float64, that every batch norm would get from `reestimate_batchnorm`, by name.

    Raises:
        ValueError: as `reestimate_batchnorm`.
    """
    norms = batchnorms(model)
    if not norms:
        return {}
    calls = as_calls(batches)
    moments = {name: _Moments(name) for name in norms}
    tracking = {name: norm.track_running_stats for name, norm in norms.items()}
    hooks = [norm.register_forward_pre_hook(moments[name].add) for name, norm in norms.items()]
    with calibrating(model):
        try:
            for norm in norms.values():
                # Together: normalise by the batch, and leave the stored statistics alone until all of it went well.
                norm.train()
                norm.track_running_stats = False
            for call in calls:
                call.run(model)
        finally:
            for hook in hooks:
                hook.remove()
            for name, norm in norms.items():
                norm.track_running_stats = tracking[name]
    return {name: moment.result() for name, moment in moments.items() if moment.count}


class FollowingNorms:
    """Lets the statistics of batch norms follow a change of weights, without the noise of a few batches.

    Statistics of few batches differ from the stored ones also where no weight changed. So the stored variance changes
    by the ratio of the variances on the batches, before and after, and the stored mean stays as many standard
    deviations away from that of the batches as it was.

    Args:
        model: as it is before.
        batches: inputs, as for `reestimate_batchnorm`.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self._model, self._batches = model, batches
        self._before = batch_moments(model, batches)

    @contextmanager
    def moved(self) -> Iterator[None]:
        """The statistics for the weights as they are now; the stored ones afterwards."""
        norms = {name: norm for name, norm in batchnorms(self._model).items() if name in self._before}
        stored = {name: [tensor.clone() for tensor in _statistics(norm)] for name, norm in norms.items()}
        now = batch_moments(self._model, self._batches) if norms else {}
        try:
            for name, norm in norms.items():
                (mean, variance), (mean0, variance0) = now[name], self._before[name]
                running_mean, running_var = _statistics(norm)
                ratio = (variance + norm.eps) / (variance0 + norm.eps)
                running_mean.copy_(mean + (running_mean - mean0) * ratio.sqrt())
                running_var.copy_(running_var * ratio)
            yield
        finally:
            for name, norm in norms.items():
                for tensor, before in zip(_statistics(norm), stored[name], strict=True):
                    tensor.copy_(before)


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


class _Moments:
    """Pooled mean and variance per channel of what goes into one batch norm, in float64."""

    def __init__(self, name: str) -> None:
        self._where = f"batch norm {name!r}" if name else "the batch norm"
        self.count = 0
        self._mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook: take in a batch `[N, C, ...]`."""
        values = args[0].detach().transpose(0, 1).flatten(1).double()
        count, mean = values.shape[1], values.mean(1)
        if count < 2:
            raise ValueError(f"{self._where} meets a single value per channel: give batches of more inputs")
        # Chan, Golub and LeVeque 1979: pooled without the cancellation that a plain sum of squares has.
        total = self.count + count
        shift = mean - self._mean
        within = (values - mean[:, None]).square().sum(1)
        self._squares = self._squares + within + shift.square() * (self.count * count / total)
        self._mean = self._mean + shift * (count / total)
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean `[C]` and unbiased variance `[C]`, as a batch norm stores them."""
        variance = self._squares / (self.count - 1)
        if not bool(torch.isfinite(self._mean).all() and torch.isfinite(variance).all()):
            raise ValueError(f"{self._where} meets values that are not finite (NaN or infinity) in calibration")
        return self._mean, variance
