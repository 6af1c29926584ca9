"""Remove hidden units, channels and heads that do nothing, for real: smaller dense weights in standard operations.

Channels that go through a graph together (see `onnx_channels`) are cut together. One is dead where each of the nodes
that read it does not (its row of the weight is zero) or where its value is known: what a known value adds is then a
part of a bias. A sum over the channels, as in RMS normalisation, can miss those that are zero; means count them still.
So the directions that SliceGPT removes (Ashkboos et al., 2024, https://arxiv.org/abs/2401.15024, section 3) go from a
whole residual stream, where they are zero in everything that is added to it.

A head of attention is dead when the linear that mixes the heads does not read it, or when its values are zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import Tensor

from sparsecomp.frontends.onnx import Overlay
from sparsecomp.frontends.onnx_apply import Rewriter, StandardSite, remove_unused, replace_with_standard
from sparsecomp.frontends.onnx_channels import Channels, Read, Tracer
from sparsecomp.frontends.onnx_heads import Attention, find_attention, set_heads
from sparsecomp.frontends.onnx_known import Numbers, known_numbers
from sparsecomp.frontends.onnx_shapes import Shapes
from sparsecomp.ir import LinearSite

_PASSES = 10
"""Times that a model is looked at: what was removed may have been all that read something before it."""
_KEPT = ".kept"  # follows the names of constants that were cut


@dataclass(frozen=True)
class Shrunk:
    """A layer that became smaller, or what several layers share.

    Attributes:
        name: of the weight that gives the units; of a residual stream, of the first that does; of an attention, of
            the linear that mixes the heads.
        units: hidden units, channels or heads before.
        removed: of them.
        kind: what they are: `units` of one layer, `channels` that several share, or `heads`.
    """

    name: str
    units: int
    removed: int
    kind: str = "units"

    def __str__(self) -> str:
        return f"{self.name}: {self.removed} of {self.units} {self.kind} removed"


def remove_heads(model: ir.Model, overlays: list[Overlay]) -> list[Shrunk]:
    """Remove the dead heads of a model, in place.

    Args:
        model: that the overlays, with their sites, were built on.
        overlays: of its graphs.

    Returns:
        The attentions that became smaller.
    """
    found: list[Shrunk] = []
    standard: list[StandardSite] = []
    for overlay in overlays:
        for attention in find_attention(overlay):
            before = [_standard(overlay, site) for site in attention.sources]
            after = _standard(overlay, attention.mix)
            if after is None or any(site is None for site in before):
                continue
            kept = _remove_heads(attention, [site for site in before if site is not None], after)
            if kept < attention.heads:
                set_heads(overlay.owner, attention, kept)
                found.append(Shrunk(attention.mix.name, attention.heads, attention.heads - kept, "heads"))
                standard += [site for site in (*before, after) if site is not None]
    replace_with_standard(model, standard)
    return found


def _standard(overlay: Overlay, site: LinearSite) -> StandardSite | None:
    """A linear with its weight and bias as arrays of their own; None if they are not constant."""
    bias: npt.NDArray[np.float32] | None = None
    weight = site.weight.t() if site.transposed else site.weight
    if site.bias is not None:
        value: Tensor | None = overlay.graph.operation(site.bias).attrs.get("value")
        if value is None:
            return None
        bias = value.float().numpy()
    return StandardSite(overlay, site, weight.float().numpy().copy(), bias)


def _remove_heads(attention: Attention, sources: list[StandardSite], mix: StandardSite) -> int:
    """Remove the dead heads of an attention; returns how many stay."""
    heads, size = attention.heads, attention.size
    values = sources[2]
    unread = ~(mix.weight != 0).reshape(-1, heads, size).any(axis=(0, 2))
    unmade = ~(values.weight != 0).reshape(heads, -1).any(axis=1)
    if values.bias is not None:
        unmade &= ~(values.bias != 0).reshape(heads, size).any(axis=1)
    kept = ~(unread | unmade)
    if not kept.any():
        kept[0] = True
        mix.weight[:, :size] = 0
    units = np.repeat(kept, size)
    for source in sources:
        source.weight = source.weight[units]
        source.bias = None if source.bias is None else source.bias[units]
    mix.weight = mix.weight[:, units]
    return int(kept.sum())


def remove_channels(model: ir.Model, shapes: Shapes) -> list[Shrunk]:
    """Remove the dead channels of the outer graph of a model, in place.

    Args:
        model: without functions.
        shapes: of its values.

    Returns:
        What became smaller, once for all channels that were removed together.

    Raises:
        ValueError: a constant cannot be read.
    """
    tracer = Tracer(model.graph, shapes.graphs[0])
    cutter = _Cutter(model, tracer)
    found: dict[str, Shrunk] = {}
    for _ in range(_PASSES):
        seen: set[ir.Value] = set()
        removed = [cut for seed in tracer.seeds() if seed[0] not in seen and (cut := cutter.cut(seed, seen))]
        for cut in removed:
            first = found.setdefault(cut.name, cut)
            if first is not cut:
                found[cut.name] = Shrunk(cut.name, first.units, first.removed + cut.removed, first.kind)
        if not removed:
            break
    return list(found.values())


class _Cutter:
    """Cuts channels out of a graph, and what they add into biases."""

    def __init__(self, model: ir.Model, tracer: Tracer) -> None:
        self._opset = model.opset_imports.get("", 1)
        self._graph, self._tracer = model.graph, tracer
        self._rewriter = Rewriter(model, self._opset)

    def cut(self, seed: tuple[ir.Value, int], seen: set[ir.Value]) -> Shrunk | None:
        """Remove the dead channels that begin at a wire; None if there are none."""
        channels = self._tracer.trace(seed, seen)
        if channels is None:
            return None
        seen.update(channels.axes)
        known = known_numbers(self._tracer, channels, self._opset)
        dead = np.ones(channels.size, bool)
        for read in channels.reads:
            dead &= self._misses(read, known[read.value])
        # A dimension of none is more than most kernels expect.
        dead[0] &= not dead.all()
        if not dead.any():
            return None
        sources = [(node, place) for node, place in channels.constants if self._gives(channels, node, place)]
        name = self._name(*sources[0])
        for read in channels.reads:
            self._keep_what_is_added(read, np.where(dead, np.nan_to_num(known[read.value]), 0.0))
        self._cut_constants(channels, ~dead)
        self._correct_counts(channels, ~dead)
        for value, axis in channels.axes.items():
            self._tracer.sizes[value][axis] = int((~dead).sum())
            value.shape = None
        alone = len(sources) == 1 and len(channels.reads) == 1
        return Shrunk(name, channels.size, int(dead.sum()), "units" if alone else "channels")

    def _gives(self, channels: Channels, node: ir.Node, place: int) -> bool:
        """Whether channels begin at a constant: that of a linear, a convolution or a table."""
        kinds = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}
        return kinds.get(node.op_type) == place and node.outputs[0] in channels.axes and node not in channels.grouped

    def _name(self, node: ir.Node, place: int) -> str:
        found = self._tracer.stored(node.inputs[place])
        name = (found[0].name if found is not None else None) or node.name or node.op_type
        return name.removesuffix(_KEPT)

    def _misses(self, read: Read, known: Numbers) -> npt.NDArray[np.bool_]:
        """The channels that a node does without."""
        if read.weight is None:
            return known == 0
        weight = self._tracer.array(read.node.inputs[read.weight])
        unread = ~(weight != 0).any(axis=tuple(axis for axis in range(weight.ndim) if axis != read.axis))
        # At the border of a padded map a constant is missing: only zeros go without a trace.
        may = known == 0 if _is_padded(read.node) else np.isfinite(known)
        return unread | may

    def _keep_what_is_added(self, read: Read, numbers: Numbers) -> None:
        """Put into a bias what channels of these numbers add behind a node."""
        if read.weight is None or not numbers.any():
            return
        node = read.node
        weight = self._tracer.array(node.inputs[read.weight]).astype(np.float64)
        rows = np.moveaxis(weight, read.axis, 0).reshape(weight.shape[read.axis], weight.shape[1 - read.axis], -1)
        added = np.einsum("i,iot->o", numbers, rows) * (node.attributes.get_float("alpha", 1.0) or 0.0)
        if not added.any():
            return
        held = self._bias(node, len(added))
        dtype = self._tracer.array(node.inputs[read.weight]).dtype
        if held is not None:
            holder, place = held
            array = self._tracer.array(holder.inputs[place]).astype(np.float64) + added
            self._give(holder, place, array.astype(dtype))
            return
        shape = (-1, *[1] * (weight.ndim - 2))
        self._insert_behind(node, "Add", added.reshape(shape).astype(dtype))

    def _bias(self, node: ir.Node, outputs: int) -> tuple[ir.Node, int] | None:
        """Where a constant vector is added to what a node gives."""
        uses = list(node.outputs[0].uses())
        places = []
        if node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_float("beta", 1.0) == 1.0):
            places = [(node, 2)] if len(node.inputs) > 2 else []
        elif len(uses) == 1 and uses[0].node.op_type == "Add" and uses[0].node.graph is self._graph:
            places = [(uses[0].node, 1 - uses[0].idx)]
        for holder, place in places:
            held = self._tracer.stored(holder.inputs[place]) is not None
            if held and self._tracer.shape(holder.inputs[place]) == (outputs,):
                return holder, place
        return None

    def _insert_behind(self, node: ir.Node, op_type: str, array: npt.NDArray[np.generic]) -> None:
        """An operation with a constant between a node and all that reads it."""
        old = node.outputs[0]
        made = ir.Node("", op_type, [old, self._rewriter.initializer(self._graph, f"{old.name}.{op_type}", array)])
        new = made.outputs[0]
        new.name, new.type = self._rewriter.unique(f"{old.name}.corrected"), old.type
        for use in [*old.uses()]:
            if use.node is not made:
                use.node.replace_input_with(use.idx, new)
        self._graph.insert_after(node, made)
        if old in self._tracer.sizes:
            self._tracer.sizes[new] = list(self._tracer.sizes[old])

    def _give(self, node: ir.Node, place: int, array: npt.NDArray[np.generic]) -> None:
        """Another constant for an operand."""
        old = node.inputs[place]
        assert old is not None
        name = self._name(node, place) + _KEPT
        node.replace_input_with(place, self._rewriter.initializer(self._graph, name, array))
        remove_unused([old])

    def _cut_constants(self, channels: Channels, kept: npt.NDArray[np.bool_]) -> None:
        """Cut the constants; one that several nodes share is still one."""
        made: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
        for (node, place), axes in channels.constants.items():
            old = node.inputs[place]
            found = self._tracer.stored(old)
            assert found is not None
            assert old is not None
            value, flipped = found
            key = value, tuple(sorted(1 - axis if flipped else axis for axis in axes))
            if key not in made:
                array = self._tracer.array(value)
                for axis in key[1]:
                    array = np.compress(kept, array, axis)
                made[key] = self._rewriter.initializer(self._graph, self._name(node, place) + _KEPT, array)
            new = made[key]
            if flipped:
                turn = ir.Node("", "Transpose", [new], [ir.AttrInt64s("perm", [1, 0])])
                turn.outputs[0].name = self._rewriter.unique(f"{new.name}.T")
                self._graph.insert_before(node, turn)
                new = turn.outputs[0]
            node.replace_input_with(place, new)
            remove_unused([old])

    def _correct_counts(self, channels: Channels, kept: npt.NDArray[np.bool_]) -> None:
        """Let means count what was removed, and depthwise convolutions what is left.

        With `share` of the channels left, the mean square of all is `share` times that of those, so that
        `x / sqrt(share * m + eps)` is `x / sqrt(m + eps / share) / sqrt(share)`.
        """
        share = float(kept.mean())
        for node in channels.grouped:
            node.attributes["group"] = ir.AttrInt64("group", int(kept.sum()))
        for node in (read.node for read in channels.reads if read.weight is None):
            dtype = _dtype(node)
            if node.op_type == "RMSNormalization":
                eps = node.attributes.get_float("epsilon", 1e-5) or 0.0
                node.attributes["epsilon"] = ir.AttrFloat32("epsilon", eps / share)
                scale = self._tracer.array(node.inputs[1])
                self._give(node, 1, (scale.astype(np.float64) / math.sqrt(share)).astype(scale.dtype))
            elif node.op_type == "ReduceMean":
                self._insert_behind(node, "Mul", np.array(share, dtype))


def _dtype(node: ir.Node) -> np.dtype[np.generic]:
    """Of what a node gives."""
    dtype = node.outputs[0].dtype
    return ir.DataType.FLOAT.numpy() if dtype is None else dtype.numpy()


def _is_padded(node: ir.Node) -> bool:
    """Whether a convolution sees zeros around its maps."""
    if node.op_type != "Conv":
        return False
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    return automatic not in ("NOTSET", "VALID") or any(node.attributes.get_ints("pads", []) or ())
