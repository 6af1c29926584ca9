"""What a model loses: a number that is 0 for the dense model and grows as the outputs of another depart from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsecomp.pruning.calibration import Call

Quality = Callable[[Any, Any], Any]
"""`(output of the dense model, output of the pruned model) -> loss`, for one batch; a number or a tensor of one."""

FLOOR = 1e-12
"""A pruned layer is never free, whatever the rounding of a loss near 0 says."""


def describe(quality: Quality | None, output: Any) -> str:
    """What the loss is, for people.

    Raises:
        ValueError: there is no quality and the output holds nothing to compare.
    """
    if quality is not None:
        return getattr(quality, "__name__", type(quality).__name__)
    return "KL divergence per token" if _logits(output) is not None else f"1 - mean cosine of {_main(output)[0]}"


def loss_of(quality: Quality | None, call: Call, dense: Any, pruned: Any) -> float:
    """The loss of one batch.

    Without a `quality` of the user: for outputs with `logits` the mean over positions of the Kullback-Leibler
    divergence from the dense model's distribution, in nats; for others 1 minus the mean cosine between the vectors of
    the first floating-point tensor (of maps `[N, C, H, W]` along C). Positions that an `attention_mask` of the call
    leaves out do not count.

    Raises:
        ValueError: the loss is not a finite number, or the output holds nothing to compare.
    """
    if quality is not None:
        value = quality(dense, pruned)
        loss = float(value.detach()) if isinstance(value, Tensor) else float(value)
    else:
        logits = _logits(dense)
        if logits is not None:
            given = _logits(pruned)
            assert given is not None
            p, q = logits.float().log_softmax(-1), given.float().log_softmax(-1)
            each = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        else:
            want, given = _main(dense)[1].float(), _main(pruned)[1].float()
            # The vectors of maps [N, C, H, W] are those of the channels.
            each = 1 - functional.cosine_similarity(want, given, dim=1 if want.ndim == 4 else -1)
        mask = call.kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == each.shape:
            each = each[mask.bool()]
        loss = float(each.mean(dtype=torch.float64))
    if not math.isfinite(loss):
        raise ValueError(f"the loss of a calibration batch is {loss}, not a finite number: look at the batch")
    return loss


def mean_loss(
    model: nn.Module, calls: Sequence[Call], dense: Sequence[Any] | nn.Module, quality: Quality | None
) -> float:
    """Mean loss of a model over batches.

    Args:
        model: the pruned model.
        calls: the batches.
        dense: outputs of the dense model for them, or the dense model, where they are too large to be kept.
        quality: as in `loss_of`.
    """
    losses = []
    for number, call in enumerate(calls):
        want = call.run(dense) if isinstance(dense, nn.Module) else dense[number]
        losses.append(loss_of(quality, call, want, call.run(model)))
    return sum(losses) / len(losses)


def _logits(output: Any) -> Tensor | None:
    value = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return value if isinstance(value, Tensor) else None


def _main(output: Any) -> tuple[str, Tensor]:
    """Name and value of the first floating-point tensor with a dimension."""
    if isinstance(output, Mapping):
        items = [(str(key), value) for key, value in output.items()]
    elif isinstance(output, (tuple, list)):
        items = [(f"output {number}", value) for number, value in enumerate(output)]
    else:
        items = [("the output", output)]
    for name, value in items:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
            return name, value
    raise ValueError(
        f"the model gives a {type(output).__name__} without a floating-point tensor to compare: pass "
        "quality=lambda dense, pruned: ... that returns the loss of one batch"
    )
