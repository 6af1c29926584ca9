"""An ONNX model as a module of PyTorch whose layers can be pruned: the pruning and planning of modules then take it.

The numbers come from ONNX Runtime, which is given the weights at each call. The layers of the module hold these weights
and are called only for those who want to see what goes into them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn
from torch.nn import functional

from sparsecomp.frontends.onnx import Overlay
from sparsecomp.ir import ConvSite, Site
from sparsecomp.runtime.ort_timing import make_session


class OnnxModule(nn.Module):
    """A model in ONNX Runtime with the layers that can be pruned as its modules, named as the sites.

    `module(**inputs)` takes tensors by the names of the model's inputs and returns its outputs by name. Copies share
    the sessions, not the weights.

    Args:
        model: is not changed.
        sites: with the overlay that each was found in; those that cannot be pruned are left out, see `why_not`.
    """

    def __init__(self, model: ir.Model, sites: Sequence[tuple[Overlay, Site]]) -> None:
        super().__init__()
        self._layers: dict[str, _Layer] = {}
        for overlay, site in sites:
            if why_not(model, overlay, site) is None:
                self._layers[site.name] = layer = _Layer(overlay, site)
                _add(self, site.name, layer.module)
        self._outputs = [value.name or "" for value in model.graph.outputs]
        self._sessions = Sessions(model, list(self._layers.values()))

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the model with the weights as they are now."""
        seen = [layer for layer in self._layers.values() if layer.module._forward_pre_hooks]
        feeds = {name: np.ascontiguousarray(value.numpy()) for name, value in inputs.items()}
        feeds |= {layer.feed: layer.array(self.get_submodule(name)) for name, layer in self._layers.items()}
        results = self._sessions.run(feeds, self._outputs, list(dict.fromkeys(layer.x for layer in seen)))
        for layer in seen:
            layer.show(torch.from_numpy(results[layer.x]))
        return {name: _tensor(results[name]) for name in self._outputs}

    def dense_session(self) -> Any:
        """A session of the model as it was, with its weights as constants."""
        return self._sessions.dense()

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxModule:
        other = OnnxModule.__new__(OnnxModule)
        nn.Module.__init__(other)
        other._outputs, other._sessions, other._layers = self._outputs, self._sessions, {}
        for name, layer in self._layers.items():
            other._layers[name] = twin = layer.with_own_weight()
            _add(other, name, twin.module)
        return other

    def write_to(self, model: ir.Model) -> None:
        """Put the weights into a model, in place; only those of layers that were pruned differ."""
        values = _values(model)
        for layer in self._layers.values():
            old = values[layer.value]
            array = np.ascontiguousarray(layer.array(layer.module))
            name = old.name or layer.feed
            if name in model.graph.initializers:
                model.graph.initializers[name].const_value = ir.tensor(array, name=name)
                continue
            tensor = ir.tensor(array, name=layer.feed)
            new = ir.Value(
                name=layer.feed, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            model.graph.register_initializer(new)
            ir.convenience.replace_all_uses_with(old, new)
        common.RemoveUnusedNodesPass()(model)


def why_not(model: ir.Model, overlay: Overlay, site: Site) -> str | None:
    """Why the weight of a site cannot be pruned, None if it can."""
    value = overlay.origin(site.weight_op)
    if site.declined is not None:
        return site.declined
    if overlay.owner is not model.graph:
        return "it is in the branch or the body of a node"
    if not isinstance(value, ir.Value) or not isinstance(overlay.origin(site.x), ir.Value):
        return "its weight is computed"
    if len(value.uses()) != 1 or value.is_graph_output():
        return "its weight is used elsewhere too"
    if site.weight.dtype != torch.float32:
        return f"its weight is {str(site.weight.dtype).removeprefix('torch.')}"
    if isinstance(site, ConvSite) and (site.window is None or site.window.is_depthwise(site.in_features)):
        return "it is a depthwise convolution"
    if not all(site.name.split(".")) or "#" in site.name:
        return "it has no name of its own"
    return None


class _Layer:
    """A site as a layer: the module that holds its weight, and how that weight and its input are called in ONNX."""

    def __init__(self, overlay: Overlay, site: Site) -> None:
        value, x = overlay.origin(site.weight_op), overlay.origin(site.x)
        assert isinstance(value, ir.Value)
        assert isinstance(x, ir.Value)
        self.value, self.x = value.name or "", x.name or ""
        self.feed = f"{self.value}.pruned"
        self._transposed = site.transposed
        self._pad: tuple[int, ...] = ()
        stored = site.weight.detach().clone()
        self.shape = tuple(stored.shape)
        outputs = site.out_features
        if isinstance(site, ConvSite):
            window = site.window
            assert window is not None
            dims = site.weight.ndim - 2
            ahead, behind = window.padding, tuple(map(sum, zip(window.padding, window.extra, strict=True)))
            self._pad = tuple(size for axis in (1, 0)[:dims] for size in (ahead[axis], behind[axis]))
            kind: Any = nn.Conv2d if dims == 2 else nn.Conv1d
            self.module: nn.Module = kind(
                site.weight.shape[1] * window.groups,
                outputs,
                window.kernel[2 - dims :],
                stride=window.stride[2 - dims :],
                dilation=window.dilation[2 - dims :],
                groups=window.groups,
                bias=False,
                device="meta",
            )
        else:
            self.module = nn.Linear(site.in_features, outputs, bias=False, device="meta")
        # A view of what ONNX Runtime is given: a change in place is seen by both.
        matrix = stored.t() if site.transposed else stored
        self.module.weight = nn.Parameter(matrix, requires_grad=False)

    def array(self, module: nn.Module) -> np.ndarray[Any, Any]:
        """The weight as the model stores it."""
        weight = module.get_parameter("weight").detach()
        array: np.ndarray[Any, Any] = (weight.t() if self._transposed else weight).numpy()
        return array

    def show(self, x: Tensor) -> None:
        """Call the module, whose hooks want to see its input."""
        self.module(functional.pad(x, self._pad) if any(self._pad) else x)

    def with_own_weight(self) -> _Layer:
        """A layer with a weight of its own."""
        twin = copy(self)
        # PyTorch keeps the strides, so that the copy too is a view of what ONNX Runtime is given.
        twin.module = deepcopy(self.module)
        return twin


class Sessions:
    """Sessions of a model whose weights are inputs: one for its outputs, others that also give values inside."""

    def __init__(self, model: ir.Model, layers: Sequence[_Layer]) -> None:
        self._layers = list(layers)
        self._dense, self._model = model.clone(), model.clone()
        values = _values(self._model)
        for layer in self._layers:
            given = ir.Value(name=layer.feed, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(layer.shape))
            ir.convenience.replace_all_uses_with(values[layer.value], given)
            self._model.graph.inputs.append(given)
        common.RemoveUnusedNodesPass()(self._model)
        self._known: dict[tuple[str, ...], Any] = {}

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str], inside: Sequence[str]) -> dict[str, Any]:
        """Outputs and values inside by name; a value that is an input is given back."""
        wanted = tuple(name for name in inside if name not in feeds and name not in outputs)
        if wanted not in self._known:
            self._known[wanted] = self._session(wanted)
        session = self._known[wanted]
        taken = {value.name for value in session.get_inputs()}
        names = [*outputs, *wanted]
        results = session.run(names, {name: value for name, value in feeds.items() if name in taken})
        return {**{name: feeds[name] for name in inside if name in feeds}, **dict(zip(names, results, strict=True))}

    def dense(self) -> Any:
        """A session with the weights as constants."""
        return _open(self._dense)

    def _session(self, wanted: tuple[str, ...]) -> Any:
        model = self._model.clone()
        values = _values(model)
        for name in wanted:
            value = values[name]
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
            if not value.is_graph_output():
                model.graph.outputs.append(value)
        return _open(model)


def _open(model: ir.Model) -> Any:
    # Through a file, since a protobuf ends at 2 GB.
    with tempfile.TemporaryDirectory(prefix="sparsecomp.") as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="model.data")
        return make_session(path, None, torch.get_num_threads())


def _values(model: ir.Model) -> dict[str, ir.Value]:
    """The values of the outer graph by name."""
    graph = model.graph
    found = {value.name or "": value for value in (*graph.inputs, *graph.initializers.values())}
    found.update((value.name or "", value) for node in graph for value in node.outputs)
    return found


def _add(owner: nn.Module, name: str, module: nn.Module) -> None:
    """Add a module under a qualified name, with what is between."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if leaf in owner._modules:
        for child, inner in owner.get_submodule(leaf).named_children():
            module.add_module(child, inner)
    owner.add_module(leaf, module)


def _tensor(value: Any) -> Any:
    """An output as a tensor, as far as PyTorch has its type; sequences and texts stay what they are."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype != np.uint16:
        return torch.from_numpy(value)
    return value
