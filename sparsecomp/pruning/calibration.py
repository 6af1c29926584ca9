"""Calibration inputs, and the walk through a model block by block that bounds the memory they take.

A criterion wants to see what goes into every site. Models are stacks of blocks, so one block at a time is looked at:
its inputs in the pruned model so far, and, for reconstruction, what the dense model has there. Where every block is fed
by the block before it, the blocks are run on their own: in memory are then the hidden states of one place of the model
(two, with those of the dense model), not those of all places, and every block runs a few times where whole passes would
be quadratic in the number of blocks. Where that is not so, the inputs of each block come from a pass through the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sparsecomp.log import log
from sparsecomp.pruning.sites import prunable_modules

Slot = int | str


class _LinearsByOneDnn(TorchFunctionMode):
    """Linears in float32 that need no gradient go to oneDNN, as Inductor's do, and not to MKL.

    Calibration is little else. On processors of AMD, MKL does not use AVX-512: 110 GFLOP/s against 250 on a Zen 5.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is functional.linear and not kwargs and not torch.is_grad_enabled() and _in_float32(*args):
            x, weight, bias = (*args, None)[:3]
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _in_float32(*tensors: Tensor | None) -> bool:
    """Whether these are plain, non-empty matrices of float32 in the CPU's memory, to be multiplied as that."""
    return (
        torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and all(
            type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype == torch.float32 and t.numel()
            for t in tensors
            if t is not None
        )
        and all(t.dim() >= 2 and t.is_contiguous() for t in tensors[:2] if t is not None)
    )


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, module: nn.Module) -> Any:
        """Call the module with the arguments."""
        with _LinearsByOneDnn():
            return module(*self.args, **self.kwargs)

    def replace(self, slot: Slot, value: Any) -> Call:
        """The call with another value as the positional argument of that number or the keyword of that name."""
        if isinstance(slot, int):
            return Call((*self.args[:slot], value, *self.args[slot + 1 :]), self.kwargs)
        return Call(self.args, {**self.kwargs, slot: value})

    def slots(self) -> Iterator[tuple[Slot, Any]]:
        """Every argument and where it stands."""
        yield from enumerate(self.args)
        yield from self.kwargs.items()


@dataclass(frozen=True)
class Part:
    """A part of a model that is pruned in one step.

    Attributes:
        name: qualified name of the module; empty for the whole model.
        module: a block, or the model.
        calls: its calls in the model as it is pruned so far, one or more for every batch.
        targets: the output of the dense block for every call, on the inputs that it has in the dense model; None where
            they were not asked for, and for the whole model.
    """

    name: str
    module: nn.Module
    calls: Sequence[Call]
    targets: Sequence[Tensor] | None


def as_calls(batches: Iterable[Any]) -> list[Call]:
    """Read calibration batches: a tensor is one argument, a tuple or list gives positional ones, a mapping keywords.

    A batch that is a `Call` already stays as it is.

    Raises:
        ValueError: there is no batch, or something that is no batch.
    """
    remedy = "give a list of batches, each a tensor, a tuple of arguments or a dict of keyword arguments"
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise ValueError(f"calibration is a single {type(batches).__name__}, not batches: {remedy}")
    calls = [_as_call(batch, index, remedy) for index, batch in enumerate(batches)]
    if not calls:
        raise ValueError(f"calibration holds no batch: {remedy}")
    return calls


def _as_call(batch: Any, index: int, remedy: str) -> Call:
    if isinstance(batch, Call):
        return batch
    if isinstance(batch, Tensor):
        return Call((batch,), {})
    if isinstance(batch, Mapping) and all(isinstance(key, str) for key in batch):
        return Call((), dict(batch))
    if isinstance(batch, (tuple, list)) and any(isinstance(item, Tensor) for item in batch):
        return Call(tuple(batch), {})
    raise ValueError(f"calibration batch {index} is a {type(batch).__name__} that is no model input: {remedy}")


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that a block hands on: its output, or the first entry of a tuple; None if that is no tensor."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a model: of its lists of modules of one type, the one with the most weights to prune.

    Returns:
        Qualified names and modules in the order of the list; empty if there is no such list with two blocks.
    """
    best: list[tuple[str, nn.Module]] = []
    most = 0
    for name, module in model.named_modules():
        blocks = list(module.named_children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
        if len(blocks) < 2 or len({type(block) for _, block in blocks}) > 1:
            continue
        weights = {id(p): p.numel() for m in _unique_sites(module) for p in m.parameters(recurse=False)}
        if sum(weights.values()) > most:
            most = sum(weights.values())
            prefix = f"{name}." if name else ""
            best = [(prefix + child, block) for child, block in blocks]
    return best


def _unique_sites(module: nn.Module) -> list[nn.Module]:
    return list({id(site): site for _, site, _ in prunable_modules(module)}.values())


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and no key-value caches, all as before afterwards.

    A cache would grow with every run of a block, so that the second run would see other keys than the first.
    """
    training = [(module, module.training) for module in model.modules()]
    # The parts of a model may have settings of their own, such as the decoder of T5.
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    try:
        model.eval()
        for config in caching:
            config.use_cache = False
        with torch.no_grad():
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for module, mode in training:
            module.training = mode


class Stream:
    """Walks a model in parts: its blocks in their order, then the model as a whole for what lies outside of them.

    Iterate inside `calibrating(model)`. The consumer prunes the part that it was given before it asks for the next,
    which then sees the pruned outputs. Blocks that cannot be run on their own come as the whole model.

    Args:
        model: the model.
        batches: its calibration inputs.
        blocks: names and modules as `find_blocks` gives them; may be empty.
        targets: whether the dense outputs of every block are wanted.
        whole: whether the model is to follow as the last part.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Call],
        blocks: Sequence[tuple[str, nn.Module]],
        *,
        targets: bool = False,
        whole: bool = False,
    ) -> None:
        self._model = model
        self._batches = batches
        self._blocks = blocks
        self._targets = targets
        self._whole = whole

    def __iter__(self) -> Iterator[Part]:
        whole = self._whole
        if self._blocks:
            try:
                recorded = _record_chain(self._model, self._batches, [block for _, block in self._blocks])
            except _NoChain as reason:
                how = "the inputs of every block come from whole passes" if reason.replay else "the model is one part"
                log.info("calibration: %s, since %s", how, reason)
                whole = whole or not reason.replay
                if reason.replay:
                    yield from self._by_passes()
            else:
                yield from self._by_chain(*recorded)
        if whole:
            yield Part("", self._model, self._batches, None)

    def _by_chain(self, links: list[list[_Link]], hidden: list[Tensor]) -> Iterator[Part]:
        dense = list(hidden)
        for index, (name, block) in enumerate(self._blocks):
            calls = [link[index].call(value) for link, value in zip(links, hidden, strict=True)]
            if self._targets:
                for number, link in enumerate(links):
                    dense[number] = _output(name, block, link[index].call(dense[number]))
            yield Part(name, block, calls, list(dense) if self._targets else None)
            if index + 1 < len(self._blocks):
                hidden = [_output(name, block, call) for call in calls]

    def _by_passes(self) -> Iterator[Part]:
        for name, block in self._blocks:
            calls = record_calls(self._model, self._batches, block)
            targets = [_output(name, block, call) for call in calls] if self._targets else None
            yield Part(name, block, calls, targets)


def _output(name: str, block: nn.Module, call: Call) -> Tensor:
    output = first_tensor(call.run(block))
    if output is None:
        raise ValueError(
            f"block {name!r} gives no tensor, so its outputs cannot be compared: prune without reconstruct"
        )
    return output


def record_calls(model: nn.Module, batches: Sequence[Call], module: nn.Module) -> list[Call]:
    """Run the model on the batches and return every call of one of its modules."""
    calls: list[Call] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(Call(args, dict(kwargs))), with_kwargs=True
    )
    try:
        for batch in batches:
            batch.run(model)
    finally:
        handle.remove()
    return calls


@dataclass(frozen=True)
class _Link:
    """The call of a block whose hidden state is put in later."""

    template: Call
    slot: Slot

    def call(self, hidden: Tensor) -> Call:
        return self.template.replace(self.slot, hidden)


class _NoChain(Exception):
    """The blocks do not feed each other, or (`replay` false) cannot be run twice on the same arguments."""

    def __init__(self, reason: str, *, replay: bool = True) -> None:
        super().__init__(reason)
        self.replay = replay


class _Done(Exception):
    """The last block was reached: the rest of the pass is of no interest."""


def _record_chain(
    model: nn.Module, batches: Sequence[Call], blocks: list[nn.Module]
) -> tuple[list[list[_Link]], list[Tensor]]:
    """For every batch the links of all blocks and the input of the first block.

    Raises:
        _NoChain: the blocks are no chain.
    """
    links: list[list[_Link]] = []
    hidden: list[Tensor] = []
    for batch in batches:
        recorder = _Recorder(blocks)
        recorder.run(model, batch)
        links.append(recorder.links)
        hidden.append(recorder.first)
    return links, hidden


class _Recorder:
    """Follows one pass through the blocks and keeps what is needed to run them one by one."""

    first: Tensor

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.links: list[_Link] = []
        self._blocks = blocks
        self._passed: Tensor | None = None
        self._version = 0

    def run(self, model: nn.Module, batch: Call) -> None:
        with ExitStack() as stack:
            for block in self._blocks:
                stack.callback(block.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(self._leave).remove)
            try:
                batch.run(model)
            except _Done:
                return
        raise _NoChain(f"{len(self.links)} of {len(self._blocks)} blocks ran")

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number = len(self.links)
        if self._blocks[number] is not module:
            raise _NoChain(f"block {number} did not run in its turn")
        call = Call(args, dict(kwargs))
        if not all(_is_plain(value) for _, value in call.slots()):
            raise _NoChain(f"block {number} takes an object that may change from call to call", replay=False)
        tensors = [(slot, value) for slot, value in call.slots() if isinstance(value, Tensor)]
        if number:
            tensors = [item for item in tensors if item[1] is self._passed]
        if not tensors:
            raise _NoChain(f"block {number} does not take the output of the block before it")
        slot, value = tensors[0]
        if number == 0:
            self.first = value
        self._passed, self._version = value, value._version
        self.links.append(_Link(call.replace(slot, None), slot))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._passed is not None and self._passed._version != self._version:
            raise _NoChain(f"block {len(self.links) - 1} changes its input in place", replay=False)
        self._passed = first_tensor(output)
        if len(self.links) == len(self._blocks):
            raise _Done


def _is_plain(value: Any) -> bool:
    """Whether an argument is the same at the next run: tensors, numbers, text and containers of them."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    return value is None or isinstance(value, (Tensor, bool, int, float, complex, str, torch.dtype, torch.device))
