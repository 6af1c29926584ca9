"""Shapes of every value of an ONNX model, with dimensions that change from call to call told from those that do not.

ONNX's own shape inference knows symbols, but loses them at the first computed `Reshape`. So it is run on numbers: once
for the sizes that the report is made for, and twice for others, in which no two symbols have the same size. What is the
same in both of these is a constant; dimensions that agree in both count as equal. (The sizes of the report alone would
not do: where a batch is 1, any size may broadcast with it.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from sparsecomp.ir import Size
from sparsecomp.log import log

UNKNOWN_SIZE = 64
"""Hint for a size that no inference gives."""
_SEQUENCE, _IMAGE, _BATCH = 128, 224, 1
_STEP = 32  # other sizes are tried in multiples of this: windows and pooling divide them
_LARGEST_TENSOR = 1024  # bytes of a constant that shape inference is given; larger ones hold no shapes

_Sizes = tuple[int | None, ...]


@dataclass(frozen=True)
class _Inferred:
    """What one run found of a value."""

    sizes: _Sizes
    dtype: int


@dataclass
class ValueShape:
    """Shape of a value.

    Attributes:
        hints: sizes in the first run.
        sizes: the same with changing dimensions as text; equal text, equal size.
        dtype: element type.
    """

    hints: tuple[int, ...]
    sizes: tuple[Size, ...]
    dtype: ir.DataType


@dataclass
class Shapes:
    """Shapes by graph and name; graphs are counted in the order of `all_graphs`.

    Attributes:
        graphs: for every graph the shapes of its values by name; a value of unknown rank is left out.
        inputs: sizes by name of the model's inputs in the first run.
    """

    graphs: list[dict[str, ValueShape]] = field(default_factory=list)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)


def all_graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """A graph and, depth first, the subgraphs of its nodes."""
    waiting = [graph]
    while waiting:
        current = waiting.pop()
        yield current
        inner = [sub for node in current for sub in subgraphs(node)]
        waiting.extend(reversed(inner))


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs among the attributes of a node, by the name of the attribute."""
    found: list[ir.Graph] = []
    for _, attribute in sorted(node.attributes.items()):
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def infer(model: ir.Model, given: Mapping[str, Sequence[int]] | None = None) -> Shapes:
    """Find the shapes of all values.

    Args:
        model: is not changed.
        given: sizes of inputs by name. What the model leaves open and is not given is 1 for the first dimension, 224
            for those of an image from the third on, and 128 otherwise.

    Raises:
        ValueError: an input is given that the model does not have, or a shape that it does not take.
    """
    proto = _without_weights(model)
    assignments = _assignments(model, given or {})
    runs = [_run(proto, sizes) for sizes in assignments]
    namer = _Namer()
    for value in _true_inputs(model):
        for place, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim):
                hint, *others = (sizes[value.name or ""][place] for sizes in assignments)
                namer.declare(tuple(others), hint, dim.value)
    shapes = Shapes(inputs=assignments[0])
    for graphs in zip(*runs, strict=True):
        names = dict.fromkeys(name for run in graphs for name in run)
        shapes.graphs.append({name: namer.shape(*(run.get(name) for run in graphs)) for name in names})
    return shapes


class _Namer:
    """Tells sizes that change by what they were in the two runs, and gives them names."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[str, int]] = {}
        self._unknown = 0

    def declare(self, sizes: tuple[int, ...], hint: int, name: str | None) -> None:
        """A symbol of the model's inputs."""
        self._known.setdefault(sizes, (name or f"d{len(self._known)}", hint))

    def shape(self, *found: _Inferred | None) -> ValueShape:
        """The shape of a value from its sizes in three runs."""
        known = next(value for value in found if value is not None)
        unknown: _Sizes = (None,) * len(known.sizes)
        runs = [value.sizes if value and len(value.sizes) == len(unknown) else unknown for value in found]
        dims = [self._dim(*dim) for dim in zip(*runs, strict=True)]
        dtype = ir.DataType(known.dtype)
        return ValueShape(tuple(hint for hint, _ in dims), tuple(size for _, size in dims), dtype)

    def _dim(self, hint: int | None, first: int | None, second: int | None) -> tuple[int, Size]:
        if first is None or second is None:
            self._unknown += 1
            return UNKNOWN_SIZE if hint is None else hint, f"?{self._unknown}"
        if first == second:
            return first, first
        known = self._known.setdefault(
            (first, second), (f"d{len(self._known)}", UNKNOWN_SIZE if hint is None else hint)
        )
        return known[1] if hint is None else hint, known[0]


def _true_inputs(model: ir.Model) -> list[ir.Value]:
    return [
        value
        for value in model.graph.inputs
        if value.name not in model.graph.initializers and isinstance(value.type, ir.TensorType)
    ]


def _assignments(model: ir.Model, given: Mapping[str, Sequence[int]]) -> list[dict[str, tuple[int, ...]]]:
    """Sizes of the inputs for the three runs."""
    inputs = {value.name or "": value for value in _true_inputs(model)}
    for name in given:
        if name not in inputs:
            raise ValueError(f"the model has no input {name!r}; its inputs are {', '.join(map(repr, inputs))}")
    symbols: dict[str, tuple[int, ...]] = {}
    runs: list[dict[str, tuple[int, ...]]] = [{}, {}, {}]
    # What is given counts also for inputs that share a symbol with it.
    for name, value in sorted(inputs.items(), key=lambda item: item[0] not in given):
        shape = value.shape
        wanted = given.get(name)
        if shape is None:
            if wanted is not None:
                raise ValueError(f"input {name!r} has no shape in the model, so that none can be given for it")
            continue
        if wanted is not None and (len(wanted) != len(shape) or any(size < 1 for size in wanted)):
            raise ValueError(f"input {name!r} has {len(shape)} dimensions, {list(shape)}; given {list(wanted)}")
        sizes: list[tuple[int, ...]] = []
        for place, dim in enumerate(shape):
            if isinstance(dim, int):
                if wanted is not None and wanted[place] != dim:
                    raise ValueError(f"dimension {place} of input {name!r} is always {dim}; given {wanted[place]}")
                sizes.append((dim,) * 3)
                continue
            hint = wanted[place] if wanted is not None else _default(place, len(shape))
            symbol = dim.value or f"{name}.{place}"
            if symbol in symbols and wanted is not None and symbols[symbol][0] != hint:
                raise ValueError(f"dimension {symbol!r} was given as {symbols[symbol][0]} and as {hint}")
            sizes.append(symbols.setdefault(symbol, _others(hint, len(symbols))))
        for run, column in zip(runs, zip(*sizes, strict=True) if sizes else ((),) * 3, strict=True):
            run[name] = column
    return runs


def _default(place: int, rank: int) -> int:
    if place == 0:
        return _BATCH
    return _IMAGE if rank >= 4 and place >= 2 else _SEQUENCE


def _others(hint: int, count: int) -> tuple[int, int, int]:
    """A hint with two other sizes that no other symbol has: small for small ones, such as batches."""
    step = 1 if hint < _STEP else _STEP
    return hint, hint + (2 * count + 1) * step, hint + (2 * count + 2) * step


def _without_weights(model: ir.Model) -> onnx.ModelProto:
    """The model for shape inference: weights are inputs, and nothing that was inferred before is left to believe."""
    clone = model.clone()
    for graph in [*all_graphs(clone.graph)][1:]:
        for value in graph.initializers.values():
            _give_own_tensor(value)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=_LARGEST_TENSOR)(clone)
    common.LiftSubgraphInitializersToMainGraphPass()(clone)
    inputs = set(clone.graph.inputs)
    for value in list(clone.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None:
            continue
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
        if tensor.nbytes > _LARGEST_TENSOR:
            del clone.graph.initializers[value.name or ""]
            value.const_value = None
            if value not in inputs:
                clone.graph.inputs.append(value)
    for graph in all_graphs(clone.graph):
        for node in graph:
            for value in node.outputs:
                value.shape = None
    try:
        return ir.to_proto(clone)
    except ir.serde.SerdeError as error:
        raise ValueError(f"the model cannot be written again: {error.__cause__ or error}") from error


def _give_own_tensor(value: ir.Value) -> None:
    """Let a constant be renamed, as happens where two subgraphs use one name, without the model that it came from."""
    tensor = value.const_value
    if tensor is not None and not tensor.dtype.is_string():
        shape = ir.Shape(tensor.shape.numpy())
        value.const_value = ir.LazyTensor(lambda: tensor, dtype=tensor.dtype, shape=shape, name=tensor.name)


def _run(proto: onnx.ModelProto, inputs: Mapping[str, tuple[int, ...]]) -> list[dict[str, _Inferred]]:
    """Infer for sizes of the inputs; for every graph the shapes by name."""
    sized = copy.deepcopy(proto)
    for value in sized.graph.input:
        if value.name in inputs:
            for dim, size in zip(value.type.tensor_type.shape.dim, inputs[value.name], strict=True):
                dim.Clear()
                dim.dim_value = size
    try:
        inferred = onnx.shape_inference.infer_shapes(sized, check_type=False, strict_mode=False, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        log.info("shapes are not known: ONNX's shape inference failed with %s", error)
        inferred = sized
    found: list[dict[str, _Inferred]] = []
    waiting = [inferred.graph]
    while waiting:
        graph = waiting.pop()
        found.append(_shapes_of(graph))
        inner = []
        for node in graph.node:
            for attribute in sorted(node.attribute, key=lambda item: item.name):
                inner += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
        waiting.extend(reversed(inner))
    return found


def _shapes_of(graph: onnx.GraphProto) -> dict[str, _Inferred]:
    shapes: dict[str, _Inferred] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape"):
            sizes = tuple(
                dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None for dim in tensor.shape.dim
            )
            shapes[value.name] = _Inferred(sizes, tensor.elem_type)
    return shapes
