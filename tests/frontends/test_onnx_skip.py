"""FFN blocks that are skipped in standard operations, against the same decisions in NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_cases as cases
import pytest
from onnx import helper

import sparsecomp.onnx

WIDTH, HIDDEN, BLOCKS = 16, 32, 7
# How much each block turns the stream: the first two a lot, and in the middle little.
GAINS = (2.0, 2.0, 0.2, 0.2, 0.2, 0.2, 1.0)


def _weights() -> list[tuple[Any, Any, Any]]:
    generator = np.random.default_rng(0)
    blocks = []
    for gain in GAINS:
        gate, up = (generator.standard_normal((WIDTH, HIDDEN)).astype(np.float32) / 4 for _ in range(2))
        down = generator.standard_normal((HIDDEN, WIDTH)).astype(np.float32) * np.float32(gain / 6)
        blocks.append((gate, up, down))
    return blocks


def _model(gated: bool, opset: int = 17, final: bool = True) -> onnx.ModelProto:
    """A stack of FFN blocks, each added to its input."""
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Any] = {}
    x = "x"
    for number, (gate, up, down) in enumerate(_weights()):
        names = {name: f"layers.{number}.{name}.weight" for name in ("gate", "up", "down")}
        constants |= {names["gate"]: gate, names["down"]: down} | ({names["up"]: up} if gated else {})
        hidden = f"h{number}"
        nodes.append(helper.make_node("MatMul", [x, names["gate"]], [f"g{number}"]))
        nodes.append(helper.make_node("Relu", [f"g{number}"], [f"r{number}" if gated else hidden]))
        if gated:
            nodes.append(helper.make_node("MatMul", [x, names["up"]], [f"u{number}"]))
            nodes.append(helper.make_node("Mul", [f"r{number}", f"u{number}"], [hidden]))
        nodes.append(helper.make_node("MatMul", [hidden, names["down"]], [f"d{number}"]))
        last = number == BLOCKS - 1 and final
        nodes.append(helper.make_node("Add", [x, f"d{number}"], ["y" if last else f"x{number}"]))
        x = f"x{number}"
    return cases.model_of(nodes, {"x": ["n", WIDTH]}, constants, opset=opset)


def _expected(x: Any, gated: bool, skippable: range, threshold: float) -> tuple[Any, list[bool]]:
    """The output, and which blocks are skipped."""
    skip, skipped = False, []
    for number, (gate, up, down) in enumerate(_weights()):
        skipped.append(skip and number in skippable)
        if skipped[-1]:
            skip = False
            continue
        hidden = np.maximum(x @ gate, 0) * (x @ up if gated else 1)
        after = x + hidden @ down
        cosine = (x * after).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(after, axis=-1)
        skip = bool(cosine.min() > threshold)
        x = after
    return x, skipped


@pytest.mark.parametrize(("gated", "threshold"), [(False, 0.99), (True, 0.85)])
def test_blocks_are_skipped_where_the_one_before_turned_little(gated: bool, threshold: float, tmp_path: Path) -> None:
    model = _model(gated)
    generator = np.random.default_rng(1)
    calibration = {"x": generator.standard_normal((40, WIDTH)).astype(np.float32)}
    output = tmp_path / "m.onnx"
    found = sparsecomp.onnx.shrink(model, output, skip=f"block:{threshold}", calibration=calibration)
    onnx.checker.check_model(str(output), full_check=True)
    names = [item.name for item in found]
    first = int(names[0].split(".")[1])
    assert names == [f"layers.{number}" for number in range(first, BLOCKS - 2)]
    assert {node.domain for node in onnx.load(output).graph.node} == {""}
    run = cases.session(output)
    seen: set[int] = set()
    for scale in (0.3, 1.0):
        for tokens in (1, 1, 1, 4):
            x = (scale * generator.standard_normal((tokens, WIDTH))).astype(np.float32)
            expected, skipped = _expected(x, gated, range(first, BLOCKS - 2), threshold)
            seen.update(number for number, flag in enumerate(skipped) if flag)
            cases.close(run.run(None, {"x": x})[0], expected, 1e-3)
    assert seen


def test_skipped_blocks_run_sparse_kernels_too(tmp_path: Path) -> None:
    model = cases.pruned(_model(True), 0.7)
    calibration = {"x": np.random.default_rng(1).standard_normal((20, WIDTH)).astype(np.float32)}
    plan = cases.forced(model, "gather")["plan"]
    output = tmp_path / "m.onnx"
    report = sparsecomp.onnx.optimize(
        model, output, options={"plan": plan}, skip="block:0.9", calibration=calibration, shapes={"x": [1, WIDTH]}
    )
    assert any("is skipped for" in note for note in report.notes)
    assert len(report.rewritten) == 3 * BLOCKS
    library = sparsecomp.onnx.library_of(output)
    for seed in range(5):
        x = np.random.default_rng(seed).standard_normal((1, WIDTH)).astype(np.float32)
        plain, fast = (
            session.run(None, {"x": x})[0] for session in (cases.session(output), cases.session(output, library))
        )
        cases.close(fast, plain)


@pytest.mark.parametrize(
    ("form", "opset", "message"),
    [
        ("block:0.99999", 17, "no two FFN blocks"),
        ("threshold:0.5", 17, "can skip whole blocks"),
        ("blok:0.9", 17, "block:0.98"),
        ("block:0.9", 12, "from opset 13 on"),
    ],
)
def test_what_cannot_be_skipped_is_told(form: str, opset: int, message: str, tmp_path: Path) -> None:
    calibration = {"x": np.random.default_rng(1).standard_normal((8, WIDTH)).astype(np.float32)}
    with pytest.raises(ValueError, match=message):
        sparsecomp.onnx.shrink(_model(False, opset), tmp_path / "m.onnx", skip=form, calibration=calibration)
    with pytest.raises(ValueError, match="needs calibration"):
        sparsecomp.onnx.shrink(_model(False), tmp_path / "m.onnx", skip="block:0.9")
    assert not list(tmp_path.iterdir())
