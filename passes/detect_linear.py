"""Find the linears: `F.linear`, `addmm` and `matmul` with a constant matrix, and say why a candidate stays dense."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch._subclasses.fake_tensor import FakeTensor

from sparsecomp.ir import LinearSite, Operation, Size, SparseGraph
from sparsecomp.passes.base import Pass, PassResult

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""Element types that the kernels take; products of int8 are int32."""


class DetectLinear(Pass):
    """Add a site for every operation that multiplies by a matrix which the program holds, or that looks as if it did.

    A `matmul` of two activations (attention) is no candidate and gets no site; a `linear` or `addmm` always gets one,
    and so does a `matmul` with a side that comes from a constant. What cannot be rewritten is declined with its reason.
    """

    name = "detect_linear"

    def run(self, graph: SparseGraph) -> PassResult:
        """Append the sites in graph order."""
        transforms = [operation.name for operation in graph if operation.kind == "transform"]
        found = [site for operation in graph if (site := _candidate(graph, operation)) is not None]
        for site in found:
            if site.declined is None and transforms:
                site.declined = "it runs under torch.func (vmap, grad, jvp), for which the sparse op has no rule"
            site.name = unique_name(graph, site.name)
            graph.sites.append(site)
        return PassResult(bool(found), tuple(str(site) for site in found))


@dataclass(frozen=True)
class _Matrix:
    """What the right side of a product is: a constant up to a transpose, or the reason why it is none."""

    operation: Operation
    transposed: bool
    reason: str | None
    derived: bool


def unique_name(graph: SparseGraph, name: str) -> str:
    """`name`, with "#2", "#3" and so on when sites of that name exist."""
    taken = {site.name for site in graph.sites}
    count = 1
    while (candidate := name if count == 1 else f"{name}#{count}") in taken:
        count += 1
    return candidate


def site_name(operation: Operation, weight: Operation) -> str:
    """The name of a site: its module when that owns the weight, else the weight's own path.

    A module owns a weight called `weight`: `nn.Linear` and its like. A bare parameter or buffer is known by its own
    name, since one module may hold several.
    """
    path = str(weight.attrs.get("path", ""))
    owner, _, leaf = path.rpartition(".")
    is_linear = operation.module_type.endswith("Linear")
    owns = leaf == "weight" or not path
    if owns and operation.module and (is_linear or operation.module == owner or not owner):
        return operation.module
    if owns and owner:
        return owner
    return path if path not in ("", "weight") else operation.module or operation.kind


def _candidate(graph: SparseGraph, operation: Operation) -> LinearSite | None:
    if operation.kind == "linear":
        x, weight = operation.inputs[0], operation.inputs[1]
        bias = operation.inputs[2] if len(operation.inputs) > 2 else None
        stored_by_row = True
    elif operation.kind == "addmm":
        bias, x, weight = operation.inputs[:3]
        stored_by_row = False
    elif operation.kind == "matmul":
        x, weight, bias = operation.inputs[0], operation.inputs[1], None
        stored_by_row = False
    else:
        return None
    matrix = _resolve(graph, weight)
    left = _resolve(graph, x)
    if operation.kind == "matmul" and matrix.reason is not None and not matrix.derived:
        return None if left.reason is not None else _on_the_left(graph, operation, left, weight)
    # transposed means stored [I, O]: F.linear takes [O, I], the others [I, O]; each transpose on the way turns it round
    transposed = matrix.transposed if stored_by_row else not matrix.transposed
    site = _site(graph, operation, matrix, transposed, x)
    reason = matrix.reason or _why_declined(graph, site, operation)
    site.declined = reason or _attach_bias(graph, site, operation, bias)
    return site


def _site(graph: SparseGraph, operation: Operation, matrix: _Matrix, transposed: bool, x: str) -> LinearSite:
    source = graph.operation(x)
    weight = matrix.operation.attrs.get("value")
    if matrix.reason is not None or weight is None:
        weight = torch.empty(matrix.operation.shape, device="meta")
    return LinearSite(
        name=site_name(operation, matrix.operation),
        weight=weight,
        weight_op=matrix.operation.name,
        weight_index=int(matrix.operation.attrs.get("index", -1)),
        transposed=transposed,
        x=x,
        operations=(operation.name,),
        tokens=prod(source.shape[:-1]),
        dynamic=any(isinstance(size, str) for size in (source.sizes or ())[:-1]),
        dtype=weight.dtype if weight.dtype == torch.int8 else operation.dtype or weight.dtype,
        composite=str(operation.attrs.get("composite", "")),
    )


def _attach_bias(graph: SparseGraph, site: LinearSite, operation: Operation, bias: str | None) -> str | None:
    """Make an operand the bias or, if it has the output's shape, the residual of a site; otherwise say why not."""
    if bias is None:
        return None
    added = graph.operation(bias)
    if added.dtype != operation.dtype:
        return f"its bias is {type_name(added.dtype)} and its output {type_name(operation.dtype)}"
    if added.sizes == (site.out_features,):
        site.bias = bias
    elif operation.kind == "addmm" and added.sizes == operation.sizes:
        site.residual = bias
    else:
        return f"its bias has shape {_shape(added.sizes)}; a vector of {site.out_features} values is expected"
    return None


def _on_the_left(graph: SparseGraph, operation: Operation, matrix: _Matrix, x: str) -> LinearSite:
    site = _site(graph, operation, matrix, matrix.transposed, x)
    site.declined = "the constant is on the left of the product; only x @ W is rewritten, W @ x is not"
    return site


def _resolve(graph: SparseGraph, name: str) -> _Matrix:
    """Follow transposes and identities from the right side of a product to the constant behind it."""
    operation, transposed = graph.operation(name), False
    while operation.kind in ("transpose", "identity") and not operation.mutates:
        if operation.kind == "transpose":
            if operation.attrs["permutation"] not in ((0, 1), (1, 0)):
                break
            transposed ^= operation.attrs["permutation"] == (1, 0)
        operation = graph.operation(operation.inputs[0])
    if operation.kind == "constant":
        return _Matrix(operation, transposed, None, False)
    if operation.kind == "input":
        reason = f"its weight is {operation.attrs['why']}, not a constant of the program"
        return _Matrix(operation, transposed, reason, False)
    origin = _constant_behind(graph, operation)
    if origin is None:
        return _Matrix(operation, transposed, f"its weight is computed at each call ({operation.name})", False)
    how = operation.name if operation.kind == "opaque" else operation.kind
    source = str(origin.attrs.get("path") or origin.name)
    reason = f"its weight is computed from {source} at each call ({how}); make the result a parameter to have it packed"
    if "weight_mask" in source or "parametrizations" in source:
        reason += " (torch.nn.utils.prune.remove, torch.nn.utils.parametrize.remove_parametrizations)"
    return _Matrix(operation, transposed, reason, True)


def constant_reason(graph: SparseGraph, name: str) -> tuple[Operation, str | None]:
    """The constant behind a value that is not transposed on the way, and why it is none (None if it is one)."""
    found = _resolve(graph, name)
    reason = "its weight is transposed at each call" if found.transposed and found.reason is None else found.reason
    return found.operation, reason


def _constant_behind(graph: SparseGraph, operation: Operation) -> Operation | None:
    """The one constant that a value is computed from, None when an argument of the call goes into it or none does."""
    found, seen, stack = None, set(), [operation.name]
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        current = graph.operation(name)
        if current.kind == "input" and current.dtype is not None:
            return None
        if current.kind == "constant":
            found = current
        stack.extend(current.inputs)
    return found


def _why_declined(graph: SparseGraph, site: LinearSite, operation: Operation) -> str | None:
    x, weight = graph.operation(site.x), site.weight
    if (reason := storage_reason(weight)) is not None:
        return reason
    if weight.ndim != 2:
        return f"its weight has shape {tuple(weight.shape)}; a matrix is expected"
    if weight.numel() == 0:
        return f"its weight has shape {tuple(weight.shape)} and no elements"
    if (reason := types_reason(x, weight, operation)) is not None:
        return reason
    if len(x.shape) < 2:
        return f"its input has shape {_shape(x.sizes)}; at least two dimensions are expected"
    if operation.sizes != (*(x.sizes or ())[:-1], site.out_features):
        return (
            f"its output has shape {_shape(operation.sizes)}, expected [..., {site.out_features}] as {_shape(x.sizes)}"
        )
    if not operation.contiguous:
        return "its output is not laid out row by row"
    return weight_changes(graph, site.weight_op)


def storage_reason(weight: torch.Tensor) -> str | None:
    """Why a weight is not a matrix of values, None if it is; whether the values are there is not for a pass to ask."""
    if type(weight) not in (torch.Tensor, torch.nn.Parameter, FakeTensor):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.layout != torch.strided:
        return f"its weight has layout {weight.layout}; a dense tensor with zeros is expected"
    return None


def types_reason(x: Operation, weight: torch.Tensor, operation: Operation) -> str | None:
    """Why the types of input, weight and output do not fit a kernel, None if they do."""
    if weight.dtype not in DTYPES:
        return f"its weight is {type_name(weight.dtype)}; there are kernels for {', '.join(map(type_name, DTYPES))}"
    if x.dtype is None or operation.dtype is None:
        return "the shape and type of its input are not known, as of nested tensors"
    if weight.dtype == x.dtype == torch.int8:
        given = type_name(operation.dtype)
        return None if operation.dtype == torch.int32 else f"its products of int8 are {given}; int32 is expected"
    if not weight.dtype == x.dtype == operation.dtype:
        given = f"weight {type_name(weight.dtype)}, input {type_name(x.dtype)}, output {type_name(operation.dtype)}"
        return f"it mixes types as under autocast ({given}); one type is expected"
    return None


def weight_changes(graph: SparseGraph, weight: str) -> str | None:
    """Why a weight cannot be relied on inside of the graph, None if it can."""
    for writer in graph.writers():
        for name in writer.mutates:
            if weight in graph.roots(name):
                return f"its weight is or may be changed inside the graph by {writer.name}"
    return None


def _shape(sizes: tuple[Size, ...] | None) -> str:
    return f"[{', '.join(map(str, sizes or ()))}]"


def type_name(dtype: torch.dtype | None) -> str:
    """A type as the messages spell it."""
    return str(dtype).removeprefix("torch.")
