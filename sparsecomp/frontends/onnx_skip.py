"""`block:T` in standard operations: an FFN block is skipped where the one before it turned the stream little.

Jaiswal et al. 2024, arXiv:2404.03865, Algorithm 1, with two differences that a graph of ONNX asks for: all tokens of a
call are skipped or none, so that the least cosine of them counts, and nothing is remembered from call to call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor
from torch.nn import functional

from sparsecomp.blocks import FfnSite
from sparsecomp.frontends.onnx import Overlay
from sparsecomp.frontends.onnx_module import Sessions
from sparsecomp.passes import DetectConv, DetectFfn, DetectLinear, FuseEpilogue, run_passes
from sparsecomp.planner.skips import SkipForm
from sparsecomp.skipping.block import LAST, required_participants, simulate

SKIP_OPSET = 13
"""From this opset on blocks are skipped: sums take their axes as an input."""


@dataclass(frozen=True)
class Skipped:
    """A block that is skipped at times.

    Attributes:
        name: of the block.
        expected: share of the calibration samples for which it is skipped.
    """

    name: str
    expected: float

    def __str__(self) -> str:
        return f"{self.name}: an FFN block that is skipped for {self.expected:.0%} of the calibration samples"


@dataclass(frozen=True)
class _Block:
    """A block of the outer graph: its nodes, the stream before it and after it."""

    name: str
    nodes: tuple[ir.Node, ...]
    before: ir.Value
    after: ir.Value


def skip_blocks(
    model: ir.Model, overlay: Overlay, form: SkipForm, batches: Sequence[dict[str, Tensor]]
) -> list[Skipped]:
    """Put FFN blocks into `If` nodes, in place.

    Blocks at the beginning, before the first whose mean cosine on the calibration exceeds the threshold, and the last
    ones are always computed.

    Args:
        model: to change.
        overlay: of its outer graph, new.
        form: `block:T`.
        batches: calibration inputs by name.

    Returns:
        The blocks that may be skipped, in order.

    Raises:
        ValueError: the form is another one, the model's opset is too old, or no blocks can be skipped.
    """
    if form.kind != "block" or form.parameter is None:
        raise ValueError(f"skip form {form}: an ONNX model can skip whole blocks, such as 'block:0.98'")
    if model.opset_imports.get("", 1) < SKIP_OPSET:
        raise ValueError(f"blocks are skipped from opset {SKIP_OPSET} on: export the model anew")
    run_passes(overlay.graph, [DetectLinear(), DetectConv(), FuseEpilogue(), DetectFfn()])
    blocks = [block for ffn in overlay.graph.ffns if (block := _block(overlay, ffn)) is not None]
    if len(blocks) < LAST + 2:
        raise ValueError(
            f"{form}: the model has {len(blocks)} FFN blocks whose result is added to what goes on beside them; "
            f"at least {LAST + 2} are needed"
        )
    cosines = _cosines(model, blocks, batches)
    part = required_participants(cosines, form)
    chosen = blocks[part.start : part.stop]
    shares = simulate(cosines[:, part.start : part.stop], form.parameter).tolist()
    _rewrite(model.graph, chosen, form.parameter)
    return [Skipped(block.name, share) for block, share in zip(chosen[1:], shares[1:], strict=True)]


def _block(overlay: Overlay, ffn: FfnSite) -> _Block | None:
    residual = ffn.down.residual
    if ffn.declined is not None or residual is None:
        return None
    before, after = overlay.origin(residual), overlay.origin(ffn.down.anchor)
    names = dict.fromkeys(name for linear in ffn.linears for name in linear.operations) | dict.fromkeys(ffn.operations)
    found = {node for name in names for node in overlay.nodes.get(name, ())}
    if not isinstance(before, ir.Value) or not isinstance(after, ir.Value):
        return None
    return _Block(ffn.name, tuple(node for node in overlay.owner if node in found), before, after)


def _cosines(model: ir.Model, blocks: Sequence[_Block], batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """The least cosine between the stream before and after every block, float32 `[samples, blocks]`."""
    sessions = Sessions(model, [])
    names = [(block.before.name or "", block.after.name or "") for block in blocks]
    rows = []
    for batch in batches:
        feeds = {name: value.numpy() for name, value in batch.items()}
        found = sessions.run(feeds, [], list(dict.fromkeys(name for pair in names for name in pair)))
        pairs = [[torch.from_numpy(found[name]) for name in pair] for pair in names]
        rows.append(torch.stack([functional.cosine_similarity(before, after, dim=-1).min() for before, after in pairs]))
    return torch.stack(rows)


def _rewrite(graph: ir.Graph, blocks: Sequence[_Block], threshold: float) -> None:
    flag: ir.Value | None = None
    replaced: dict[ir.Value, ir.Value] = {}
    for number, block in enumerate(blocks):
        block = replace(block, before=replaced.get(block.before, block.before))
        last = number == len(blocks) - 1
        if flag is None:
            # The first is always computed, and tells of the second.
            nodes, flag = _turned_little(block, threshold)
            graph.insert_after(block.nodes[-1], nodes)
            continue
        outputs = _conditional(graph, block, flag, None if last else threshold)
        replaced[block.after], flag = outputs[0], outputs[-1]


def _conditional(graph: ir.Graph, block: _Block, flag: ir.Value, threshold: float | None) -> list[ir.Value]:
    """Put a block into a branch; returns the stream after it and, with a threshold, whether to skip the next one."""
    place = ir.Node("", "If", [flag], num_outputs=1 if threshold is None else 2, name=f"{block.name}.skip")
    outputs = list(place.outputs)
    outputs[0].name, outputs[0].type, outputs[0].shape = f"{block.name}.kept", block.after.type, block.after.shape
    ir.convenience.replace_all_uses_with(block.after, outputs[0])
    for at, value in enumerate(graph.outputs):
        if value is block.after:
            # An output of the model keeps its name.
            outputs[0].name, block.after.name = block.after.name, f"{block.after.name}.computed"
            graph.outputs[at] = outputs[0]
    graph.insert_before(block.nodes[0], place)
    graph.remove(block.nodes)
    tape = Tape()
    skipped = [tape.op("Identity", [block.before])]
    nodes: list[ir.Node] = list(block.nodes)
    results = [block.after]
    if threshold is not None:
        outputs[1].name = f"{block.name}.turned_little"
        skipped.append(tape.op("Constant", [], {"value": ir.tensor(np.array(False))}))
        more, turned = _turned_little(block, threshold)
        nodes += more
        results.append(turned)
    _name(tape.nodes, f"{block.name}.skipped")
    then, other = (
        ir.Graph([], values, nodes=inner, name=f"{block.name}.{title}")
        for title, values, inner in (("skipped", skipped, list(tape.nodes)), ("computed", results, nodes))
    )
    for name, branch in (("then_branch", then), ("else_branch", other)):
        place.attributes[name] = ir.AttrGraph(name, branch)
    return outputs


def _turned_little(block: _Block, threshold: float) -> tuple[list[ir.Node], ir.Value]:
    """Whether the cosine of every token exceeds the threshold."""
    tape = Tape()

    def constant(value: Any, dtype: Any) -> ir.Value:
        return tape.op("Constant", [], {"value": ir.tensor(np.array(value, dtype))})

    axis = constant([-1], np.int64)

    def product(a: ir.Value, b: ir.Value) -> ir.Value:
        return tape.op("ReduceSum", [tape.op("Mul", [a, b]), axis], {"keepdims": 0})

    lengths = tape.op("Mul", [product(block.before, block.before), product(block.after, block.after)])
    cosine = tape.op("Div", [product(block.before, block.after), tape.op("Sqrt", [lengths])])
    least = tape.op("ReduceMin", [cosine], {"keepdims": 0})
    flag = tape.op("Greater", [least, constant(threshold, np.float32)])
    _name(tape.nodes, f"{block.name}.turn")
    flag.type, flag.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
    return list(tape.nodes), flag


def _name(nodes: Sequence[ir.Node], stem: str) -> None:
    """Name the values of new nodes before a graph does: branches must not use the names of what is around them."""
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"{stem}{number}"
