"""The skip forms in eager mode: the same rules as the compiled operation, on dense products that save nothing.

For measuring what a plan costs in quality, and what the operation is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.skipping.forms import SkipChoice, SkipPlan
from sparsecomp.skipping.sites import FFN, find_ffns


@dataclass
class SkipRates:
    """What was skipped while a model was emulated.

    Attributes:
        skipped: units, inputs or calls (of one row each) that were skipped, by site.
        total: how many there were.
    """

    skipped: dict[str, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)

    def note(self, site: str, kept: Tensor) -> None:
        """Count the entries of a mask."""
        self.total[site] = self.total.get(site, 0) + kept.numel()
        self.skipped[site] = self.skipped.get(site, 0) + kept.numel() - int(kept.sum())

    def rate(self, site: str) -> float:
        """The share that a site skipped, 0 if it did not run."""
        return self.skipped.get(site, 0) / max(self.total.get(site, 0), 1)

    def mean(self) -> float:
        """The mean of the shares of the sites that ran; 0 if none did."""
        return sum(map(self.rate, self.total)) / max(len(self.total), 1)


@contextmanager
def emulate(model: nn.Module, plan: SkipPlan) -> Iterator[SkipRates]:
    """Skip in a model as a plan says, by hooks that set to zero what is skipped.

    Args:
        model: the module, not compiled; it is as before afterwards.
        plan: its choices; `relu` changes nothing.

    Yields:
        What was skipped so far.

    Raises:
        ValueError: the model has no such site, or a threshold of another size.
    """
    rates = SkipRates()
    ffns = {ffn.name: ffn for ffn in find_ffns(model)}
    modules = dict(model.named_modules())
    # All are checked before the first hook is there.
    blocks = []
    hooks: list[Callable[[], Any]] = []
    for choice in plan.values():
        if choice.form.kind in ("input", "rsparse"):
            hooks.append(_input_hooks(_linear(modules, choice), choice, rates))
        elif (ffn := ffns.get(choice.site)) is None:
            raise ValueError(f"the skip plan names {choice.site!r}, which is no FFN block of this model")
        elif choice.form.kind == "threshold":
            hooks.append(_threshold_hook(ffn, choice, rates))
        elif choice.form.kind == "block":
            blocks.append(choice.site)
    if blocks:
        hooks.append(_BlockSkips(model, list(ffns.values()), plan, rates).install)
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook())
        yield rates


def _linear(modules: dict[str, nn.Module], choice: SkipChoice) -> nn.Linear:
    module = modules.get(choice.site)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"the skip plan names {choice.site!r}, which is no nn.Linear of this model")
    for what, value in (("threshold", choice.threshold), ("scale", choice.scale)):
        if isinstance(value, Tensor) and value.shape != (module.in_features,):
            raise ValueError(f"{choice.site}: its {what} has shape {tuple(value.shape)}, expected {module.in_features}")
    return module


def _input_hooks(module: nn.Linear, choice: SkipChoice, rates: SkipRates) -> Callable[[], Callable[[], None]]:
    dropped: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        size = args[0].abs().float()
        kept = (size if choice.scale is None else size * choice.scale) > choice.threshold
        rates.note(choice.site, kept)
        if choice.low_rank is not None:
            dropped.append(args[0] * ~kept)
        return (args[0] * kept, *args[1:])

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        assert choice.low_rank is not None
        a, b = (factor.to(output.dtype) for factor in choice.low_rank)
        return output + (dropped.pop() @ b.T) @ a.T

    def install() -> Callable[[], None]:
        stack = ExitStack()
        stack.callback(module.register_forward_pre_hook(before).remove)
        if choice.low_rank is not None:
            stack.callback(module.register_forward_hook(after).remove)
        return stack.close

    return install


def _threshold_hook(ffn: FFN, choice: SkipChoice, rates: SkipRates) -> Callable[[], Callable[[], None]]:
    hidden = ffn.down_matrix().shape[1]
    threshold = choice.threshold
    if isinstance(threshold, Tensor) and threshold.shape != (hidden,):
        raise ValueError(f"{choice.site}: its threshold has shape {tuple(threshold.shape)}, expected {hidden}")

    def mask(value: Tensor) -> Tensor:
        kept = value.abs().float() > threshold
        rates.note(choice.site, kept)
        return value * kept

    def install() -> Callable[[], None]:
        if ffn.gated:
            assert ffn.activation is not None
            return ffn.activation.register_forward_hook(lambda _, args, output: mask(output)).remove
        return ffn.down.register_forward_pre_hook(lambda _, args: (mask(args[0]), *args[1:])).remove

    return install


class StreamOf:
    """The stream that an FFN block is added to: what goes into the norm before the block, else the block's input.

    Norms are told by identity: the module whose output is the very tensor that the block is given.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
        self._last: tuple[Tensor, Tensor] | None = None

    def install(self, stack: ExitStack) -> None:
        """Watch the norms."""
        for norm in self._norms:
            stack.callback(norm.register_forward_hook(self._note).remove)

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(output, Tensor):
            self._last = (args[0], output)

    def before(self, given: Tensor) -> Tensor:
        """The stream for the input of a block."""
        return self._last[0] if self._last is not None and self._last[1] is given else given


class _BlockSkips:
    """FFN-SkipLLM (Jaiswal et al. 2024, arXiv:2404.03865, Algorithm 1), for every row of a batch on its own.

    Once the cosine between the stream before and after a block exceeds the threshold, the blocks behind it are skipped,
    `span` of them, and then the next is computed and looked at again.
    """

    def __init__(self, model: nn.Module, ffns: list[FFN], plan: SkipPlan, rates: SkipRates) -> None:
        self._ffns, self._plan, self._rates = ffns, plan, rates
        self._stream = StreamOf(model)
        self._input: Tensor | None = None
        self._left = torch.zeros(())
        self._late: Tensor = torch.ones((), dtype=torch.bool)
        self._seen = 0

    def install(self) -> Callable[[], None]:
        stack = ExitStack()
        self._stream.install(stack)
        for number, ffn in enumerate(self._ffns):
            choice = self._plan.get(ffn.name)
            if choice is not None and choice.form.kind != "block":
                choice = None
            stack.callback(ffn.first.register_forward_pre_hook(self._enter(number)).remove)
            stack.callback(ffn.down.register_forward_hook(self._leave(choice)).remove)
        return stack.close

    def _enter(self, number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._input = args[0]
            if number == 0:
                self._begin(args[0])

        return hook

    def _begin(self, value: Tensor) -> None:
        """The first block of a pass: nothing is being skipped; which rows may skip depends on their place."""
        tokens = value.shape[-2] if value.dim() > 1 else 1
        first = self._seen if tokens == 1 else 0
        self._seen = first + tokens
        self._left = torch.zeros(value.shape[:-1], dtype=torch.int64)
        self._late = torch.arange(first, first + tokens) >= self._plan.warmup

    def _leave(self, choice: SkipChoice | None) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if choice is None:
                self._left = torch.zeros_like(self._left)
                return None
            assert self._input is not None
            stream = self._stream.before(self._input)
            skip = self._left > 0
            self._rates.note(choice.site, ~skip)
            alike = torch.cosine_similarity(stream.float(), (stream + output).float(), dim=-1) > choice.threshold
            span = torch.where(alike & self._late, self._plan.span, 0)
            self._left = torch.where(skip, self._left - 1, span)
            return output.masked_fill(skip.unsqueeze(-1), 0)

        return hook
