"""Skip forms and plans: what is parsed, what survives a file, and what a damaged or hostile file gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecomp.skipping import SkipChoice, SkipForm, SkipPlan


@given(st.sampled_from(["threshold", "input", "block", "rsparse"]), st.integers(0, 999))
def test_forms_are_read_back_as_printed(kind: str, thousandths: int) -> None:
    form = SkipForm(kind, thousandths / 1000)
    assert SkipForm.parse(str(form)) == form


def test_relu_has_no_parameter() -> None:
    assert str(SkipForm.parse("relu")) == "relu"
    with pytest.raises(ValueError, match="takes no parameter"):
        SkipForm.parse("relu:0.4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("treshold:0.4", "did you mean 'threshold'"),
        ("threshold", "such as 'threshold:0.4'"),
        ("threshold:1.0", "from 0 to below 1"),
        ("threshold:-0.1", "from 0 to below 1"),
        ("threshold:nan", "number behind the colon"),
        ("threshold:much", "number behind the colon"),
    ],
)
def test_bad_forms_say_what_is_right(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipForm.parse(text)


def _plan() -> SkipPlan:
    return SkipPlan.of(
        [
            SkipChoice("a.mlp", SkipForm.parse("threshold:0.4"), torch.rand(6), expected=0.39),
            SkipChoice("b.mlp.down", SkipForm.parse("input:0.5"), 0.25, torch.rand(4)),
            SkipChoice("c.q", SkipForm.parse("rsparse:0.5"), 0.5, low_rank=(torch.rand(3, 2), torch.rand(2, 5))),
            SkipChoice("d.mlp", SkipForm.parse("block:0.97"), 0.97),
        ],
        warmup=30,
        span=2,
    )


def test_a_plan_is_read_back_as_saved(tmp_path: Path) -> None:
    plan = _plan()
    plan.save(tmp_path / "skip.json")
    read = SkipPlan.load(tmp_path / "skip.json")
    assert list(read) == list(plan)
    assert (read.warmup, read.span) == (30, 2)
    for site, choice in plan.items():
        other = read[site]
        assert (other.form, other.expected) == (choice.form, choice.expected)
        torch.testing.assert_close(other.threshold, choice.threshold)
        torch.testing.assert_close(other.scale, choice.scale)
        torch.testing.assert_close(other.low_rank, choice.low_rank)


def test_choices_that_share_a_scale_are_saved(tmp_path: Path) -> None:
    scale = torch.rand(4)
    form = SkipForm.parse("input:0.5")
    SkipPlan.of([SkipChoice(name, form, 0.1, scale) for name in "ab"]).save(tmp_path / "skip.json")
    assert all(torch.equal(choice.scale, scale) for choice in SkipPlan.load(tmp_path / "skip.json").values())


def test_a_plan_without_tensors_leaves_no_tensor_file_of_an_earlier_one(tmp_path: Path) -> None:
    _plan().save(tmp_path / "skip.json")
    SkipPlan.of([SkipChoice("d.mlp", SkipForm("relu"))]).save(tmp_path / "skip.json")
    assert [path.name for path in tmp_path.iterdir()] == ["skip.json"]
    assert SkipPlan.load(tmp_path / "skip.json")["d.mlp"].form == SkipForm("relu")


def test_two_choices_for_one_site_are_refused() -> None:
    with pytest.raises(ValueError, match="two skip choices for 'a'"):
        SkipPlan.of([SkipChoice("a", SkipForm("relu"))] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["choices"][0].update(form="treshold:0.4"), r"choices\[0\].form.*did you mean 'threshold'"),
        (lambda d: d["choices"][0].update(threshold=1.0), r"choices\[0\].threshold"),
        (lambda d: d["choices"][0]["tensors"].update(threshold=7), r"expected 7 finite numbers"),
        (lambda d: d["choices"][0]["tensors"].update(threshold=2**40), "would take more than"),
        (lambda d: d["choices"][1]["tensors"].pop("scale"), "do not agree on the tensor '1.scale'"),
        (lambda d: d["choices"][3]["tensors"].update(a=6), "a and b belong to rsparse"),
        (lambda d: d["choices"][3].update(path="../x"), "unknown field 'path'"),
        (lambda d: d.update(version=2), "reads version 1"),
    ],
)
def test_a_damaged_document_says_where(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "skip.json"
    _plan().save(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        SkipPlan.load(path)


def test_a_missing_or_foreign_tensor_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "skip.json"
    _plan().save(path)
    tensors = tmp_path / "skip.safetensors"
    held = safetensors.torch.load_file(tensors)
    tensors.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        SkipPlan.load(path)
    safetensors.torch.save_file({**held, "0.threshold": torch.full((6,), torch.nan)}, tensors)
    with pytest.raises(ValueError, match="6 finite numbers"):
        SkipPlan.load(path)
    safetensors.torch.save_file({**held, "more": torch.zeros(1)}, tensors)
    with pytest.raises(ValueError, match="do not agree on the tensor 'more'"):
        SkipPlan.load(path)
    tensors.unlink()
    with pytest.raises(ValueError, match="is missing"):
        SkipPlan.load(path)
