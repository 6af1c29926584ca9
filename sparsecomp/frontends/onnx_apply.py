"""Put sparse operations into an ONNX model, in the places of the sites that they replace; all else stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import Tensor

from sparsecomp.frontends.onnx import Derived, Overlay
from sparsecomp.frontends.onnx_fallback import (
    CHOICE,
    DECODING_OPSET,
    FULL_OPSET,
    Form,
    Variant,
    function,
    index_of,
    product_nodes,
)
from sparsecomp.frontends.onnx_shapes import all_graphs
from sparsecomp.ir import ConvSite, LinearSite, Site
from sparsecomp.runtime.ort_library import DOMAIN, PackedWeight

_LEAST_IR_VERSION = 8  # the first with model-local functions


@dataclass(frozen=True)
class Replacement:
    """A site to be replaced.

    Attributes:
        overlay: that it was found in.
        site: as the passes left it.
        weight: `[O, I]`, or that of the convolution.
        key: equal for sites that share their packed weight.
        pack: packs a weight like this one.
        bias: instead of the site's own, where a normalisation was folded into it.
    """

    overlay: Overlay
    site: Site
    weight: Tensor
    key: Any
    pack: Callable[[Tensor], PackedWeight]
    bias: npt.NDArray[np.float32] | None = None


def apply(model: ir.Model, replacements: Sequence[Replacement]) -> list[Variant]:
    """Replace sites, in place.

    Args:
        model: that the overlays were built on.
        replacements: what to replace; every site once.

    Returns:
        The operations that the model uses now; each has its function in the model.
    """
    opset = model.opset_imports.get("", 1)
    rewriter = Rewriter(model, opset)
    variants = dict.fromkeys(rewriter.replace(replacement) for replacement in replacements)
    for variant in variants:
        made = function(variant, opset)
        model.functions[made.identifier()] = made
    if variants:
        model.graph.opset_imports[DOMAIN] = 1
        model.ir_version = max(model.ir_version, _LEAST_IR_VERSION)
    return list(variants)


@dataclass
class StandardSite:
    """A site to be written anew in standard operations.

    Attributes:
        overlay: that it was found in.
        site: as the passes left it.
        weight: `[O, I]`, or that of the convolution.
        bias: `[O]` or None; it takes the place of what the site adds and normalises.
    """

    overlay: Overlay
    site: Site
    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32] | None


def replace_with_standard(model: ir.Model, sites: Sequence[StandardSite]) -> None:
    """Write sites anew, in place: their products with other weights and biases, and what follows them as it was."""
    rewriter = Rewriter(model, model.opset_imports.get("", 1))
    for standard in sites:
        rewriter.replace_standard(standard)


@dataclass
class Rewriter:
    """Puts nodes and constants into a model, under names that are new to it."""

    model: ir.Model
    opset: int
    names: set[str] = field(default_factory=set)
    packed: dict[Any, tuple[PackedWeight, dict[str, ir.Value]]] = field(default_factory=dict)
    replaced: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for graph in all_graphs(self.model.graph):
            self.names.update(value.name or "" for value in (*graph.inputs, *graph.initializers.values()))
            self.names.update(value.name or "" for node in graph for value in node.outputs)

    def replace(self, replacement: Replacement) -> Variant:
        """Put one operation in the place of a site."""
        overlay, site = replacement.overlay, replacement.site
        packed, arrays = self._packed(replacement)
        conv = site if isinstance(site, ConvSite) else None
        forms = _forms(packed)
        variant = Variant(
            forms,
            site.activation,
            site.bias is not None or replacement.bias is not None,
            site.residual is not None,
            self._indexed(forms),
            residual_first=conv is not None and conv.residual_first,
            window=None if conv is None else conv.window,
            rank=2 if conv is None else conv.weight.ndim - 2,
        )
        new_nodes: list[ir.Node] = []
        operands = [self._operand(overlay, site.x, new_nodes)]
        if replacement.bias is not None:
            operands.append(self.initializer(overlay.owner, f"{site.name}.bias", replacement.bias))
        elif site.bias is not None:
            operands.append(self._operand(overlay, site.bias, new_nodes))
        if site.residual is not None:
            operands.append(self._operand(overlay, site.residual, new_nodes))
        attributes = [ir.AttrInt64(name, packed.attributes[name]) for name in variant.attributes]
        node = ir.Node(DOMAIN, variant.name, [*operands, *arrays.values()], attributes, name=site.name)
        new_nodes.append(node)
        self._put(overlay, site, new_nodes)
        return variant

    def replace_standard(self, standard: StandardSite) -> None:
        """Put standard operations with other constants in the place of a site."""
        overlay, site = standard.overlay, standard.site
        nodes: list[ir.Node] = []
        given = {"x": self._operand(overlay, site.x, nodes)}
        matrix = isinstance(site, LinearSite)
        stored = standard.weight.T if matrix else standard.weight
        given["weight"] = self.initializer(overlay.owner, f"{site.name}.kept", stored)
        if standard.bias is not None:
            given["bias"] = self.initializer(overlay.owner, f"{site.name}.kept_bias", standard.bias)
        if site.residual is not None:
            given["residual"] = self._operand(overlay, site.residual, nodes)
        conv = None if isinstance(site, LinearSite) else site
        variant = Variant(
            (),
            site.activation,
            standard.bias is not None,
            site.residual is not None,
            residual_first=conv is not None and conv.residual_first,
            window=None if conv is None else conv.window,
            rank=2 if conv is None else conv.weight.ndim - 2,
        )
        nodes += product_nodes(given, given["weight"], variant, self.opset)
        for node in nodes:
            for value in node.outputs:
                value.name = value.name or self.unique(f"{site.name}.value")
        self._put(overlay, site, nodes)

    def _put(self, overlay: Overlay, site: Site, new_nodes: list[ir.Node]) -> None:
        """Put nodes, the last of which gives the value, in the place of a site."""
        old_value = overlay.origin(site.anchor)
        assert isinstance(old_value, ir.Value)
        old_nodes = list(dict.fromkeys(node for name in site.operations for node in overlay.nodes.get(name, ())))
        read = [value for node in old_nodes for value in node.inputs if value is not None]
        anchor = old_value.producer()
        assert anchor is not None
        ir.convenience.replace_nodes_and_values(
            overlay.owner, anchor, old_nodes, new_nodes, [old_value], [new_nodes[-1].outputs[0]]
        )
        self.replaced[old_value] = new_nodes[-1].outputs[0]
        remove_unused(read)

    def _operand(self, overlay: Overlay, name: str, new_nodes: list[ir.Node]) -> ir.Value:
        origin = overlay.origin(name)
        if isinstance(origin, Derived):
            if origin.tensor is not None:
                return self.initializer(overlay.owner, name, origin.tensor)
            assert origin.transposed is not None
            source = self.replaced.get(origin.transposed, origin.transposed)
            node = ir.Node("", "Transpose", [source], [ir.AttrInt64s("perm", [1, 0])])
            node.outputs[0].name = self.unique(name)
            new_nodes.append(node)
            return node.outputs[0]
        return self.replaced.get(origin, origin)

    def _packed(self, replacement: Replacement) -> tuple[PackedWeight, dict[str, ir.Value]]:
        key = (replacement.key, replacement.overlay.owner)
        if key not in self.packed:
            packed = replacement.pack(replacement.weight)
            forms = _forms(packed)
            variant = Variant(forms, "none", bias=False, residual=False)
            arrays: dict[str, npt.NDArray[Any]] = {} if packed.choice is None else {CHOICE: packed.choice}
            for form, part in zip(forms, packed.forms, strict=True):
                arrays.update(zip(variant.arrays(form), part.arrays.values(), strict=True))
            if self._indexed(forms):
                place = forms.index(variant.decoded)
                weight = replacement.weight.float().numpy()
                arrays["index"] = index_of(_values_of(replacement.pack, place), weight, self.opset)
                arrays["shape"] = np.array(weight.shape[::-1] if weight.ndim == 2 else weight.shape, np.int64)
            owner, stem = replacement.overlay.owner, replacement.site.name
            values = {name: self.initializer(owner, f"{stem}.{name}", array) for name, array in arrays.items()}
            self.packed[key] = packed, values
        return self.packed[key]

    def _indexed(self, forms: tuple[Form, ...]) -> bool:
        full = any(form.family == "full" for form in forms)
        return self.opset < (FULL_OPSET if full else DECODING_OPSET)

    def initializer(self, graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """Add a constant to a graph, under this name or one like it."""
        tensor = ir.tensor(np.asarray(array, order="C"), name=self.unique(name))
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        graph.register_initializer(value)
        return value

    def unique(self, name: str) -> str:
        """A name that no value of the model has yet."""
        candidate, count = name, 1
        while candidate in self.names:
            count += 1
            candidate = f"{name}_{count}"
        self.names.add(candidate)
        return candidate


def _forms(packed: PackedWeight) -> tuple[Form, ...]:
    return tuple(Form(part.family, part.v, part.width) for part in packed.forms)


def _values_of(
    pack: Callable[[Tensor], PackedWeight], place: int
) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    """Gives the values of a form of a weight."""
    from torch import from_numpy

    return lambda weight: pack(from_numpy(weight)).forms[place].arrays["values"]


def remove_unused(values: list[ir.Value]) -> None:
    """Remove what gave values that nothing reads any more: initializers, constants, transposes of weights."""
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        node = value.producer()
        if node is None:
            if value.graph is not None and (value.name or "") in value.graph.initializers:
                del value.graph.initializers[value.name or ""]
        elif node.graph is not None and not any(other.uses() or other.is_graph_output() for other in node.outputs):
            waiting.extend(operand for operand in node.inputs if operand is not None)
            node.graph.remove(node, safe=True)
