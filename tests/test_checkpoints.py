"""Pruned models on disk, and checkpoints of compressed-tensors."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import models
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsecomp
from sparsecomp.checkpoints import load_checkpoint, read_weights, save_checkpoint


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def tied(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 6), "head": nn.Linear(6, 10, bias=False)})
    model["head"].weight = model["embedding"].weight
    return model


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def bitmask(weight: Tensor) -> dict[str, Tensor]:
    """A weight as sparse-bitmask stores it."""
    mask = weight != 0
    rows = mask.sum(1)
    return {
        "shape": torch.tensor(weight.shape),
        "compressed": weight[mask],
        "bitmask": torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little")),
        "row_offsets": torch.cumsum(rows, 0) - rows,
    }


def bitmask24(weight: Tensor) -> dict[str, Tensor]:
    """A weight as sparse-24-bitmask stores it: two of four, zeros among them where there are fewer nonzeros."""
    mask = sparsecomp.Pattern.parse("2:4").mask(weight.abs())
    return {
        "shape": torch.tensor(weight.shape).reshape(-1, 1),
        "compressed": weight[mask].reshape(len(weight), -1),
        "bitmask": torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little")),
    }


def write(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return folder


@pytest.mark.parametrize("make", [small, tied])
def test_a_model_comes_back_as_it_was_saved(make: type[nn.Module], tmp_path: Path) -> None:
    model, other = make(0), make(1)
    sparsecomp.sparsify_(model, "2:4")
    save_checkpoint(model, tmp_path / "pruned")
    assert load_checkpoint(other, tmp_path / "pruned") is None
    assert_equal(other.state_dict(), model.state_dict())


def test_a_plan_is_kept_beside_the_weights_and_does_not_outlive_them(tmp_path: Path) -> None:
    model = small().eval()
    plan = sparsecomp.explain(model, torch.randn(4, 16)).plan
    save_checkpoint(model, tmp_path, plan=plan)
    assert load_checkpoint(model, tmp_path) == plan
    save_checkpoint(model, tmp_path)
    assert load_checkpoint(model, tmp_path) is None


def test_a_hugging_face_model_is_saved_as_transformers_reads_it(tmp_path: Path) -> None:
    model = models.bert(layers=1, width=32, heads=2, vocab_size=50)
    sparsecomp.sparsify_(model, "2:4")
    save_checkpoint(model, tmp_path)
    import transformers

    again = transformers.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert_equal(again.state_dict(), model.state_dict())
    other = models.bert(layers=1, width=32, heads=2, vocab_size=50, seed=1)
    load_checkpoint(other, tmp_path)
    assert_equal(other.state_dict(), model.state_dict())


def test_weights_in_several_files_are_read_by_their_index(tmp_path: Path) -> None:
    model = models.bert(layers=2, width=32, heads=2, vocab_size=50)
    model.save_pretrained(tmp_path, max_shard_size="40KB")  # type: ignore[operator]
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_equal(read_weights(tmp_path), model.state_dict())


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 999))
def test_compressed_weights_unfold_to_what_was_compressed(rows: int, cols: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    weight = (torch.randn(rows, cols) * (torch.rand(rows, cols) < 0.4)).to(dtype)
    square = sparsecomp.Pattern.parse("2:4").project(torch.randn(rows, 4 * cols).to(dtype))
    square *= torch.rand(rows, 4 * cols) < 0.8
    tensors = {
        **{f"a.weight.{part}": value for part, value in bitmask(weight).items()},
        **{f"b.{part}": value for part, value in bitmask24(square).items()},
        "b.bias": torch.ones(rows),
    }
    with tempfile.TemporaryDirectory() as folder:
        read = read_weights(write(Path(folder), tensors))
    assert_equal(read, {"a.weight": weight, "b.weight": square, "b.bias": torch.ones(rows)})


def test_a_compressed_checkpoint_loads_into_a_model(tmp_path: Path) -> None:
    model, other = small(0), small(1)
    sparsecomp.sparsify_(model, "2:4")
    state = dict(model.state_dict())
    parts = {f"0.{part}": value for part, value in bitmask24(state.pop("0.weight")).items()}
    load_checkpoint(other, write(tmp_path, {**state, **parts}))
    assert_equal(other.state_dict(), model.state_dict())


def _damaged(name: str, value: Tensor) -> dict[str, Tensor]:
    return {f"0.{part}": tensor for part, tensor in {**bitmask24(torch.ones(8, 16)), name: value}.items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_damaged("shape", torch.tensor([8, 1 << 40])), "does not fit a bit mask"),
        (_damaged("shape", torch.tensor([1 << 62, 1 << 62, 16])), "does not fit a bit mask"),
        (_damaged("shape", torch.tensor([0, 16])), "does not fit a bit mask"),
        (_damaged("shape", torch.tensor([8.0, 16.0])), "does not fit a bit mask"),
        (_damaged("compressed", torch.ones(8, 7)), "its mask keeps 64 entries, 56 are there"),
        (_damaged("compressed", torch.ones(64, dtype=torch.int8)), "int8"),
        (_damaged("bitmask", torch.ones(8, 2)), "does not fit a bit mask"),
        ({"0.bitmask": torch.ones(8, 2, dtype=torch.uint8)}, "not complete"),
        ({"0.weight_packed": torch.ones(8, 2, dtype=torch.int32)}, "quantised"),
        ({"0.weight": torch.ones(8, 16), "nothing.weight": torch.ones(2)}, "has no nothing.weight"),
        ({"0.weight": torch.ones(8, 16)}, "0.bias, 1.weight, 1.bias and 5 more are missing"),
        (
            {**small().state_dict(), "2.weight": torch.ones(4, 9)},
            r"2.weight has shape \(4, 8\), in the folder \(4, 9\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_an_error_and_change_nothing(
    tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    model = small(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, write(tmp_path, tensors))
    assert_equal(model.state_dict(), before)


def test_a_damaged_plan_changes_nothing(tmp_path: Path) -> None:
    save_checkpoint(small(0), tmp_path)
    (tmp_path / "plan.json").write_text("[")
    model = small(1)
    with pytest.raises(ValueError, match=r"plan\.json"):
        load_checkpoint(model, tmp_path)
    assert_equal(model.state_dict(), small(1).state_dict())


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"0.weight": "../model.safetensors"}},
        {"weight_map": {"0.weight": "/etc/model.safetensors"}},
        {"weight_map": {"0.weight": "model.bin"}},
        {"weight_map": {"0.weight": ["a"]}},
        {"weight_map": {"0.weight": 3}},
        {"weight_map": []},
        {"map": {}},
        [],
    ],
)
def test_an_index_cannot_lead_out_of_the_folder(index: object, tmp_path: Path) -> None:
    save_checkpoint(small(), tmp_path)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index"):
        read_weights(inner)


def test_a_folder_without_safetensors_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        read_weights(tmp_path / "nothing")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin can run code"):
        read_weights(tmp_path)
    save_checkpoint(small(), tmp_path)
    shutil.move(tmp_path / "model.safetensors", tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "b.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors, which is not there"):
        read_weights(tmp_path)
