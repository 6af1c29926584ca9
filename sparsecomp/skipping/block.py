"""Which FFN blocks may be skipped as a whole, by how little they turn the stream; FFN-SkipLLM.

Jaiswal et al. 2024, arXiv:2404.03865: the cosine between the stream before and after an FFN block grows with depth up
to the last blocks; once it exceeds a threshold, the next blocks of this token are skipped (Algorithm 1). The first
blocks (cold start) and the last ones are always computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.planner.skips import SkipForm
from sparsecomp.pruning.calibration import Call
from sparsecomp.skipping.emulate import StreamOf
from sparsecomp.skipping.forms import SkipChoice, SkipPlan
from sparsecomp.skipping.sites import FFN

LAST = 2
"""Blocks at the end that are always computed."""


def calibrate_block(model: nn.Module, calls: Sequence[Call], form: SkipForm, ffns: Sequence[FFN]) -> SkipPlan:
    """The blocks that take part in `block:T`; run it inside `calibrating(model)`.

    Excluded are the blocks before the first whose mean cosine exceeds the threshold, and the last ones.

    Raises:
        ValueError: no block is left.
    """
    cosines = block_cosines(model, calls, ffns)
    chosen = required_participants(cosines, form)
    return SkipPlan.of(block_choices(cosines[:, chosen.start : chosen.stop], form, ffns[chosen.start : chosen.stop]))


def block_choices(cosines: Tensor, form: SkipForm, ffns: Sequence[FFN]) -> list[SkipChoice]:
    """The choices of all blocks that take part, with their cosines `[tokens, blocks]`."""
    threshold = form.parameter or 0.0
    shares = simulate(cosines, threshold).tolist()
    return [SkipChoice(ffn.name, form, threshold, expected=share) for ffn, share in zip(ffns, shares, strict=True)]


def required_participants(cosines: Tensor, form: SkipForm) -> range:
    """As `participants` for `block:T`.

    Raises:
        ValueError: there are fewer than two.
    """
    chosen = participants(cosines, form.parameter or 0.0)
    if len(chosen) < 2:
        raise ValueError(
            f"{form}: no two FFN blocks between the cold start and the last {LAST} turn the stream that little; mean "
            f"cosines are up to {float(cosines.mean(dim=0).max()):.4f}"
        )
    return chosen


def participants(cosines: Tensor, threshold: float) -> range:
    """The blocks between the cold start and the last ones, by their cosines `[tokens or samples, blocks]`."""
    means = cosines.mean(dim=0).tolist()
    first = next((number for number, mean in enumerate(means) if mean > threshold), len(means))
    return range(first, len(means) - LAST)


def block_cosines(model: nn.Module, calls: Sequence[Call], ffns: Sequence[FFN]) -> Tensor:
    """The cosine between the stream before and after every block, float32 `[tokens, blocks]`.

    Raises:
        ValueError: a block did not run once in every call.
    """
    found: list[list[Tensor]] = [[] for _ in ffns]
    stream = StreamOf(model)
    given: dict[int, Tensor] = {}

    def enter(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            given[number] = stream.before(args[0])

        return hook

    def leave(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            before = given.pop(number).float()
            found[number].append(torch.cosine_similarity(before, before + output.float(), dim=-1).flatten())

        return hook

    with ExitStack() as stack:
        stream.install(stack)
        for number, ffn in enumerate(ffns):
            stack.callback(ffn.first.register_forward_pre_hook(enter(number)).remove)
            stack.callback(ffn.down.register_forward_hook(leave(number)).remove)
        for call in calls:
            call.run(model)
    rows = [torch.cat(cosines) if cosines else torch.empty(0) for cosines in found]
    if len({len(row) for row in rows}) != 1 or not len(rows[0]):
        raise ValueError("the FFN blocks did not all run once in every calibration batch: leave some out by filter_fn")
    return torch.stack(rows, dim=1)


def simulate(cosines: Tensor, threshold: float, span: int = 1) -> Tensor:
    """The share of tokens that each block would be skipped for, float `[blocks]`, by cosines of the dense model."""
    left = torch.zeros(len(cosines), dtype=torch.int64)
    shares = []
    for column in cosines.unbind(dim=1):
        skip = left > 0
        shares.append(skip.float().mean())
        left = torch.where(skip, left - 1, torch.where(column > threshold, span, 0))
    return torch.stack(shares)


def threshold_for(cosines: Tensor, share: float) -> float:
    """The threshold at which a share of the calls of all blocks is skipped, by the cosines of the dense model.

    Args:
        cosines: as `block_cosines` gives them.
        share: of the calls, above 0.

    Raises:
        ValueError: no threshold skips that much.
    """

    def skipped(threshold: float) -> float:
        chosen = participants(cosines, threshold)
        own = cosines[:, chosen.start : chosen.stop]
        return float(simulate(own, threshold).sum()) / cosines.shape[1] if len(chosen) else 0.0

    # Where it is lower, more blocks take part and more of them are skipped; by bisection.
    low, high = -1.0, 1.0
    if (most := skipped(low)) < share:
        raise ValueError(f"at most {most:.2f} of the FFN calls can be skipped, given {share:g}")
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if skipped(middle) >= share else (low, middle)
    return low
