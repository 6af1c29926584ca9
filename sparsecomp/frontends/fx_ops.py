"""Which canonical operation a node of Dynamo's graph is, and which of its inputs it changes.

Dynamo hands over torch-level calls: functions of `torch`, `torch.nn.functional`, `torch._C._nn` and `operator`, and
methods of tensors. One table from name to reader covers them, since the names and argument orders of functions and
methods agree. What a reader does not recognise for certain it leaves alone, and the node becomes `opaque`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN_MODULES = frozenset(
    {"torch", "torch.nn.functional", "torch._C._nn", "torch._C._autograd", "_operator", "builtins", "torch.ops.aten"}
)
_IN_PLACE = frozenset({"setitem", "setattr", "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod"})
_IN_PLACE |= {"ipow", "iand", "ior", "ixor", "ilshift", "irshift"}
_COMPOSITES: dict[str, dict[str, int]] = {
    # which arguments of these hold matrices of linears, and their places
    "_transformer_encoder_layer_fwd": {"qkv_weight": 3, "proj_weight": 5, "ffn_weight_1": 14, "ffn_weight_2": 16},
    "_native_multi_head_attention": {"qkv_weight": 5, "proj_weight": 7},
    "multi_head_attention_forward": {
        "in_proj_weight": 5,
        "out_proj_weight": 11,
        "q_proj_weight": 18,
        "k_proj_weight": 19,
        "v_proj_weight": 20,
    },
}
_UNSET: Any = object()


@dataclass(frozen=True)
class Call:
    """What a node is in canonical terms.

    Attributes:
        kind: Canonical kind.
        operands: Canonical operands in canonical order.
        attrs: What else defines it.
        aliases: Whether the value may share memory with an input.
    """

    kind: str
    operands: tuple[fx.Node, ...] = ()
    attrs: dict[str, Any] = field(default_factory=dict)
    aliases: bool = False


def function_name(node: fx.Node) -> str | None:
    """The bare name of what a call node calls, or None when it is no function of torch, operator or a tensor."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return None
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return name if namespace == "aten" else None
    name = str(getattr(target, "__name__", ""))
    plain = getattr(target, "__module__", None) in _PLAIN_MODULES
    method = getattr(target, "__objclass__", None) in (torch._C.TensorBase, torch.Tensor)
    return name if name and (plain or method) else None


def is_transform(node: fx.Node) -> bool:
    """Whether a node enters, leaves or belongs to a torch.func transform (vmap, grad, jvp)."""
    return node.op == "call_function" and "functorch" in str(getattr(node.target, "__module__", ""))


def tensor_value(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor that describes what a node produces, None when it is no plain tensor or not known.

    Nested tensors and other wrappers have no sizes that could be read and no rule for the sparse op.
    """
    value: Any = node.meta.get("example_value", node.meta.get("val"))
    wrapped: bool = is_traceable_wrapper_subclass(value)
    return value if isinstance(value, torch.Tensor) and not (wrapped or value.is_nested) else None


def argument(node: fx.Node, place: int, name: str, default: Any = _UNSET) -> Any:
    """An argument given by place or by name.

    Raises:
        LookupError: It is not given and has no default.
    """
    if place < len(node.args):
        return node.args[place]
    if name in node.kwargs:
        return node.kwargs[name]
    if default is _UNSET:
        raise LookupError(f"{node.name} has no argument {name!r}")
    return default


def classify(node: fx.Node) -> Call | None:
    """The canonical operation of a call node, None when it is not understood."""
    name = function_name(node)
    if name is None or node.kwargs.get("out") is not None:
        return None
    if name in _COMPOSITES:
        return _composite(node, _COMPOSITES[name])
    reader = _READERS.get(name if name.endswith("__") else name.rstrip("_"))
    try:
        return None if reader is None else reader(node)
    except (LookupError, TypeError, ValueError):
        return None  # an unusual form of a known call is as good as an unknown call


def mutated(node: fx.Node) -> tuple[fx.Node, ...]:
    """The inputs whose contents a call node changes or, if it is not known what it does, may change."""
    if node.op not in ("call_function", "call_method"):
        return ()
    name, target = function_name(node), node.target
    if isinstance(target, torch._ops.OpOverload):
        return _mutated_by_schema(node, target)
    if name is None and not _keeps_naming_rule(target):
        return tuple(node.all_input_nodes)
    name = name or str(getattr(target, "__name__", ""))
    changed: tuple[fx.Node, ...] = _nodes(node.kwargs.get("out"))
    # PyTorch's rule: the name of what works in place ends with an underscore
    in_place = name.strip("_") in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    if in_place or (_flag(node, name, "inplace") and not _is_idle_dropout(node, name)):
        changed += _nodes(node.args[0] if node.args else node.kwargs.get("input"))
    if name == "embedding" and argument(node, 3, "max_norm", None) is not None:
        changed += _nodes(argument(node, 1, "weight", None))  # renormalises the rows that it reads
    return changed


def _keeps_naming_rule(target: Any) -> bool:
    """Whether a function is PyTorch's own and no operator that takes functions or is registered by others."""
    foreign = isinstance(target, (torch._ops.HigherOrderOperator, torch._ops.OpOverloadPacket))
    return not foreign and str(getattr(target, "__module__", "")).split(".")[0] in ("torch", "math", "_operator")


def _mutated_by_schema(node: fx.Node, target: torch._ops.OpOverload[Any, Any]) -> tuple[fx.Node, ...]:
    changed: tuple[fx.Node, ...] = ()
    for place, parameter in enumerate(target._schema.arguments):
        if parameter.alias_info is not None and parameter.alias_info.is_write:
            changed += _nodes(argument(node, place, parameter.name, None))
    return changed


_INPLACE_PLACES = {
    **dict.fromkeys(("relu", "relu6", "silu", "mish", "selu", "hardswish", "hardsigmoid"), 1),
    **dict.fromkeys(("elu", "celu", "leaky_relu"), 2),
    **dict.fromkeys(("hardtanh", "threshold", "dropout", "alpha_dropout", "feature_alpha_dropout"), 3),
    **dict.fromkeys(("dropout1d", "dropout2d", "dropout3d"), 3),
    "rrelu": 4,
}


def _flag(node: fx.Node, name: str, key: str) -> bool:
    place = _INPLACE_PLACES.get(name, 99)
    return argument(node, place, key, False) is not False


def _is_idle_dropout(node: fx.Node, name: str) -> bool:
    return name == "dropout" and argument(node, 2, "training", True) is False


def _nodes(value: Any) -> tuple[fx.Node, ...]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return tuple(found)


def _node(value: Any) -> fx.Node:
    if not isinstance(value, fx.Node):
        raise TypeError(f"expected the value of a node, got {value!r}")
    return value


def _operands(node: fx.Node, *names: str) -> tuple[fx.Node, ...]:
    return tuple(_node(argument(node, place, name)) for place, name in enumerate(names))


def _rank(node: fx.Node) -> int:
    value = tensor_value(node)
    if value is None:
        raise ValueError(f"the rank of {node.name} is not known")
    return value.ndim


def _linear(node: fx.Node) -> Call:
    operands = [_node(argument(node, 0, "input")), _node(argument(node, 1, "weight"))]
    bias = argument(node, 2, "bias", None)
    return Call("linear", (*operands, *(() if bias is None else (_node(bias),))))


def _addmm(node: fx.Node) -> Call | None:
    if argument(node, 3, "beta", 1) != 1 or argument(node, 4, "alpha", 1) != 1 or function_name(node) == "addmm_":
        return None
    return Call("addmm", _operands(node, "input", "mat1", "mat2"))


def _matmul(node: fx.Node) -> Call:
    second = "mat2" if function_name(node) in ("mm", "bmm", "_int_mm") else "other"
    return Call("matmul", _operands(node, "input", second))


def _binary(kind: str) -> Callable[[fx.Node], Call | None]:
    def read(node: fx.Node) -> Call | None:
        if argument(node, 2, "alpha", 1) != 1:
            return None
        left, right = argument(node, 0, "input"), argument(node, 1, "other")
        tensors = tuple(side for side in (left, right) if isinstance(side, fx.Node) and tensor_value(side) is not None)
        if not tensors:
            return None
        attrs = {} if len(tensors) == 2 else {"scalar": right if tensors[0] is left else left}
        return Call(kind, tensors, attrs)

    return read


def _gelu(node: fx.Node) -> Call | None:
    kind = {"none": "gelu", "tanh": "gelu_tanh"}.get(argument(node, 1, "approximate", "none"))
    return None if kind is None else Call(kind, (_node(argument(node, 0, "input")),))


def _dropout(node: fx.Node) -> Call | None:
    if argument(node, 2, "train" if "train" in node.kwargs else "training", True) is not False:
        return None
    return Call("identity", (_node(argument(node, 0, "input")),), aliases=True)


def _unchanged(node: fx.Node) -> Call | None:
    """A copy or conversion, an identity when it changes neither type, device nor layout."""
    source = _node(argument(node, 0, "input"))
    before, after = tensor_value(source), tensor_value(node)
    if before is None or after is None or (before.dtype, before.device) != (after.dtype, after.device):
        return None
    if node.kwargs.get("memory_format", torch.preserve_format) not in (torch.preserve_format, torch.contiguous_format):
        return None
    return Call("identity", (source,), aliases=True)


def _permutation(rank: int, first: int, second: int) -> tuple[int, ...]:
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    return tuple(order)


def _swap_last(node: fx.Node) -> Call:
    source = _node(argument(node, 0, "input"))
    rank = _rank(source)
    order = _permutation(rank, -2, -1) if rank > 1 else (0,) * rank
    return Call("transpose", (source,), {"permutation": order}, aliases=True)


def _transpose(node: fx.Node) -> Call:
    source = _node(argument(node, 0, "input"))
    first = argument(node, 1, "dim0", None)
    second = argument(node, 2, "dim1", None)
    if not isinstance(first, int) or not isinstance(second, int):
        raise ValueError(f"the dimensions that {node.name} swaps are not constant")
    return Call("transpose", (source,), {"permutation": _permutation(_rank(source), first, second)}, aliases=True)


def _permute(node: fx.Node) -> Call:
    source = _node(argument(node, 0, "input"))
    given = argument(node, 1, "dims")
    dims = tuple(given) if isinstance(given, (list, tuple)) else node.args[1:]
    rank = _rank(source)
    order = tuple(dim % rank for dim in dims if isinstance(dim, int))
    if len(order) != rank:
        raise ValueError(f"the order that {node.name} permutes to is not constant")
    return Call("transpose", (source,), {"permutation": order}, aliases=True)


def _getattr(node: fx.Node) -> Call | None:
    source, name = _node(argument(node, 0, "input")), argument(node, 1, "name")
    if name in ("T", "mT") and _rank(source) == 2:
        return _swap_last(node)
    return Call("identity", (source,), aliases=True) if name == "data" else None


def _reshape(node: fx.Node) -> Call | None:
    source = _node(argument(node, 0, "input"))
    before, after = tensor_value(source), tensor_value(node)
    if before is None or after is None or before.dtype != after.dtype:
        return None  # view(dtype) reinterprets
    return Call("reshape", (source,), aliases=True)


def _plain(kind: str, *names: str) -> Callable[[fx.Node], Call | None]:
    return lambda node: Call(kind, _operands(node, *names))


def _conv(node: fx.Node) -> Call:
    name = str(function_name(node))
    operands = [_node(argument(node, 0, "input")), _node(argument(node, 1, "weight"))]
    bias = argument(node, 2, "bias", None)
    attrs: dict[str, Any] = {"function": name}
    if name in ("conv1d", "conv2d"):
        attrs |= {
            "stride": argument(node, 3, "stride", 1),
            "padding": argument(node, 4, "padding", 0),
            "dilation": argument(node, 5, "dilation", 1),
            "groups": argument(node, 6, "groups", 1),
        }
    return Call("conv", (*operands, *(() if bias is None else (_node(bias),))), attrs)


def _pad(node: fx.Node) -> Call | None:
    zeros = argument(node, 2, "mode", "constant") == "constant" and not argument(node, 3, "value", None)
    amounts = argument(node, 1, "pad")
    if not zeros or not all(isinstance(amount, int) for amount in amounts):
        return None
    return Call("pad", (_node(argument(node, 0, "input")),), {"amounts": tuple(amounts)})


def _batch_norm(node: fx.Node) -> Call | None:
    if argument(node, 5, "training", False) is not False:
        return None
    operands = _operands(node, "input", "running_mean", "running_var")
    affine = [argument(node, 3, "weight", None), argument(node, 4, "bias", None)]
    given = tuple(_node(value) for value in affine if value is not None)
    attrs = {"eps": float(argument(node, 7, "eps", 1e-5)), "affine": tuple(value is not None for value in affine)}
    return Call("batch_norm", (*operands, *given), attrs)


def _clamped(low: str, high: str) -> Callable[[fx.Node], Call | None]:
    """A clamp to the range of ReLU6, by the names of its bounds."""

    def read(node: fx.Node) -> Call | None:
        bounds = argument(node, 1, low), argument(node, 2, high)
        return Call("relu6", (_node(argument(node, 0, "input")),)) if bounds == (0, 6) else None

    return read


def _power(node: fx.Node) -> Call:
    exponent = argument(node, 1, "exponent")
    if not isinstance(exponent, (int, float)):
        raise TypeError(f"the exponent of {node.name} is not a number")
    return Call("power", (_node(argument(node, 0, "input")),), {"exponent": float(exponent)})


def _threshold(node: fx.Node) -> Call | None:
    bound, value = argument(node, 1, "threshold"), argument(node, 2, "value")
    if not isinstance(bound, (int, float)) or bound < 0 or value != 0:
        return None
    return Call("threshold", (_node(argument(node, 0, "input")),), {"threshold": float(bound)})


def _getitem(node: fx.Node) -> Call | None:
    """One of the pieces that a value was split into along its last dimension."""
    pieces, place = _node(argument(node, 0, "input")), argument(node, 1, "index")
    if function_name(pieces) not in ("chunk", "split", "tensor_split") or not isinstance(place, int):
        return None
    source, sizes = _node(argument(pieces, 0, "input")), pieces.meta.get("example_value")
    if argument(pieces, 2, "dim", 0) not in (-1, _rank(source) - 1) or not isinstance(sizes, (tuple, list)):
        return None
    widths = [piece.shape[-1] for piece in sizes]
    if not all(isinstance(width, int) for width in widths):
        return None
    start = sum(widths[: place % len(widths)])
    return Call("part", (source,), {"start": start, "length": widths[place]}, aliases=True)


def _topk(node: fx.Node) -> Call:
    count = argument(node, 1, "k", 1) if function_name(node) == "topk" else 1
    return Call("topk", (_node(argument(node, 0, "input")),), {"count": count if isinstance(count, int) else 0})


def _composite(node: fx.Node, places: dict[str, int]) -> Call:
    given = [argument(node, place, name, None) for name, place in places.items()]
    weights = tuple(value.name for value in given if isinstance(value, fx.Node))
    return Call("composite", attrs={"weights": weights, "function": function_name(node)})


_READERS: dict[str, Callable[[fx.Node], Call | None]] = {
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(("matmul", "mm", "bmm", "_int_mm", "__matmul__"), _matmul),
    **dict.fromkeys(("add", "iadd", "__add__"), _binary("add")),
    **dict.fromkeys(("mul", "imul", "multiply", "__mul__"), _binary("mul")),
    **{kind: _plain(kind, "input") for kind in ("relu", "silu", "sigmoid", "tanh")},
    **{kind: _plain(kind, "input") for kind in ("relu6", "hardswish")},
    "hardtanh": _clamped("min_val", "max_val"),
    **dict.fromkeys(("clamp", "clip"), _clamped("min", "max")),
    **{f"conv{dims}d": _conv for dims in (1, 2, 3)},
    **{f"conv_transpose{dims}d": _conv for dims in (1, 2, 3)},
    "batch_norm": _batch_norm,
    "pad": _pad,
    "gelu": _gelu,
    "dropout": _dropout,
    **dict.fromkeys(
        ("contiguous", "detach", "clone", "to", "float", "bfloat16", "type_as", "alias", "_get_data_attr"), _unchanged
    ),
    "t": _swap_last,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    "permute": _permute,
    "getattr": _getattr,
    "getitem": _getitem,
    **dict.fromkeys(("pow", "__pow__"), _power),
    "square": lambda node: Call("power", _operands(node, "input"), {"exponent": 2.0}),
    "threshold": _threshold,
    **dict.fromkeys(("topk", "argmax"), _topk),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"), _reshape),
    "layer_norm": _plain("layer_norm", "input"),
    "softmax": _plain("softmax", "input"),
    "embedding": _plain("embedding", "input", "weight"),
    "scaled_dot_product_attention": _plain("attention", "query", "key", "value"),
}
