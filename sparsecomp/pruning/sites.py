"""The modules whose weights can be pruned, and the checks that a weight can change in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

from sparsecomp.patterns import Pattern

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

FilterFn = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Prunable:
    """A type of module that can be pruned.

    Attributes:
        module_type: the type; its subclasses are meant too.
        parameter: name of the parameter that holds the weight.
        to_matrix: view of the weight (or of its scores) as the `[O, I]` that patterns describe.
        from_matrix: the way back for masks or values: `(matrix [O, I], weight) -> tensor` in the weight's shape.
        to_inputs: `(module, input) -> [rows, I]`, the rows that the matrix multiplies: `output = rows @ matrix.T`. Of a
            convolution with groups these are the rows of all groups, so that statistics are those of the groups
            together.
        accepts: whether a module of the type can be pruned.
    """

    module_type: type[nn.Module]
    parameter: str
    to_matrix: Callable[[Tensor], Tensor]
    from_matrix: Callable[[Tensor, Tensor], Tensor]
    to_inputs: Callable[[nn.Module, Tensor], Tensor]
    accepts: Callable[[nn.Module], bool] = lambda _: True


def _patches(module: nn.Module, value: Tensor) -> Tensor:
    """What the rows of a convolution's matrix are multiplied with, `[positions, I / groups * taps]`, I slowest."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        raise TypeError(f"expected a convolution, given {type(module).__name__}")
    dims = len(module.kernel_size)
    if value.dim() == dims + 1:
        value = value.unsqueeze(0)
    # The module's own numbers, from the last dimension backwards: they cover padding='same' and its other modes.
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    value = functional.pad(value, padding, mode=mode) if any(padding) else value
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if dims == 1:
        value, kernel, stride, dilation = value.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    patches = functional.unfold(value, kernel, dilation=dilation, stride=stride)
    images, entries, positions = patches.shape
    grouped = patches.reshape(images, module.groups, entries // module.groups, positions)
    return grouped.transpose(2, 3).reshape(-1, entries // module.groups)


def _not_depthwise(module: nn.Module) -> bool:
    """Depthwise convolutions are left out: they have few weights, each of them counts, and they run dense."""
    return not (isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups > 1 and module.weight.shape[1] == 1)


PRUNABLE: tuple[Prunable, ...] = (
    Prunable(
        nn.Linear,
        "weight",
        to_matrix=lambda weight: weight,
        from_matrix=lambda matrix, _: matrix,
        to_inputs=lambda _, value: value.reshape(-1, value.shape[-1]),
    ),
    *(
        Prunable(
            module_type,
            "weight",
            to_matrix=lambda weight: weight.flatten(1),
            from_matrix=lambda matrix, weight: matrix.reshape(weight.shape),
            to_inputs=_patches,
            accepts=_not_depthwise,
        )
        for module_type in (nn.Conv1d, nn.Conv2d)
    ),
)


@dataclass(frozen=True, eq=False)
class Site:
    """A module that is to be pruned.

    Attributes:
        name: qualified name in the model.
        module: the module.
        kind: how its weight is seen as a matrix.
        weight: the parameter.
    """

    name: str
    module: nn.Module
    kind: Prunable
    weight: nn.Parameter

    def takes(self, pattern: Pattern) -> bool:
        """Whether a pattern is for weights of this form: a kernel pattern is for kernels of its number of taps."""
        return pattern.kind != "taps" or (self.weight.ndim > 2 and self.weight.shape[2:].numel() == pattern.m)

    @property
    def where(self) -> str:
        """The site in a sentence."""
        return f"module {self.name!r}" if self.name else "the model"


def prunable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Prunable]]:
    """Names and modules that can be pruned; one that is there under several names is given under each."""
    for name, module in model.named_modules(remove_duplicate=False):
        for kind in PRUNABLE:
            if isinstance(module, kind.module_type) and kind.accepts(module):
                yield name, module, kind
                break


def choose_sites(model: nn.Module, filter_fn: FilterFn | None) -> list[Site]:
    """The modules to prune, in the order of `model.named_modules()`.

    Raises:
        ValueError: there is none, `filter_fn` rejects all, or a weight cannot change in place.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, given {type(model).__name__}")
    candidates = list(prunable_modules(model))
    types = ", ".join(f"nn.{kind.module_type.__name__}" for kind in PRUNABLE)
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no module that can be pruned ({types})")
    chosen = [item for item in candidates if filter_fn is None or filter_fn(item[1], item[0])]
    if not chosen:
        names = ", ".join(repr(name) for name, _, _ in candidates[:3])
        more = f" and {len(candidates) - 3} more" if len(candidates) > 3 else ""
        raise ValueError(f"filter_fn rejected every module that can be pruned ({types}): {names}{more}")
    return [_site(name, module, kind) for name, module, kind in chosen]


def _site(name: str, module: nn.Module, kind: Prunable) -> Site:
    weight = dict(module.named_parameters(recurse=False)).get(kind.parameter)
    problem = (
        "is computed from other tensors (a parametrization, or torch.nn.utils.prune): make it permanent first "
        "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove)"
    )
    if weight is not None:
        problem = _problem(weight)
        if not problem:
            return Site(name, module, kind, weight)
    where = f"module {name!r}" if name else "the model"
    raise ValueError(f"{where} ({type(module).__name__}) cannot be pruned: its {kind.parameter} {problem}")


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
