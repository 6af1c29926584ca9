"""Pruned models on disk: safetensors with zeros in them and, beside it, `plan.json`; and reading compressed-tensors.

Files come from anywhere, so nothing is unpickled, no file outside of the folder is opened because a file in it says so,
and what a compressed weight unfolds to is bounded by the size of its bit mask.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sparsecomp.planner import Plan

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PLAN = "plan.json"
_LARGEST_INDEX = 64 << 20
_QUANTISED = (".weight_packed", ".weight_scale", ".qweight", ".scales")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def save_checkpoint(model: nn.Module, folder: str | Path, *, plan: Plan | None = None) -> None:
    """Write a pruned model: dense safetensors that hold zeros, which any other tool can read, and the plan.

    A Hugging Face model is written by its own `save_pretrained`, with its configuration; of any other module the
    `state_dict` is written to `model.safetensors` (entries that share memory once).

    Args:
        model: the model.
        folder: made if it is not there. Files of the same names are replaced, and a `plan.json` is removed if no plan
            is given, since it would describe other weights.
        plan: written to `plan.json`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_pretrained: Any = getattr(model, "save_pretrained", None)
    if save_pretrained is not None:
        save_pretrained(folder)
    else:
        (folder / _INDEX).unlink(missing_ok=True)
        safetensors.torch.save_model(model, str(folder / _WEIGHTS))
    if plan is None:
        (folder / _PLAN).unlink(missing_ok=True)
    else:
        plan.save(folder / _PLAN)


def load_checkpoint(model: nn.Module, folder: str | Path) -> Plan | None:
    """Copy the weights of a folder into a model, in place.

    Args:
        model: as it was saved: same names, same shapes. Values take on the types of its parameters.
        folder: what `save_checkpoint` or Hugging Face's `save_pretrained` wrote, or a checkpoint of compressed-tensors
            (`read_weights`).

    Returns:
        The plan in the folder's `plan.json`; None if there is none.

    Raises:
        FileNotFoundError: there are no weights in the folder.
        ValueError: a file is damaged, or the weights are not those of this model. The model is then as it was.
    """
    folder = Path(folder)
    weights = read_weights(folder)
    own: dict[str, Tensor] = model.state_dict()
    problems = _mismatches(own, weights)
    if problems:
        raise ValueError(f"the weights in {folder} are not those of this {type(model).__name__}: {problems}")
    plan = Plan.load(folder / _PLAN) if (folder / _PLAN).is_file() else None
    with torch.no_grad():
        for name, values in weights.items():
            own[name].copy_(values)
    return plan


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Read the weights of a folder as dense tensors, by name.

    The folder holds `model.safetensors`, or several such files with `model.safetensors.index.json`. Weights in the
    formats `sparse-bitmask` and `sparse-24-bitmask` of compressed-tensors (which llm-compressor writes) are unfolded:
    of each there is `shape`, the kept values row by row in `compressed`, and in `bitmask` one bit for every entry, each
    row padded to whole bytes, the first entry in the lowest bit.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no weights in safetensors.
        ValueError: a file is damaged, names a file outside of the folder, or its weights are quantised.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the one that holds {_WEIGHTS}")
    tensors: dict[str, Tensor] = {}
    for name in _files(folder):
        try:
            tensors.update(safetensors.torch.load_file(folder / name))
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged or not a safetensors file: {error}") from error
    quantised = [name for name in tensors if name.endswith(_QUANTISED)]
    if quantised:
        raise ValueError(f"{folder} holds quantised weights ({_some(quantised)}): save the model unquantised")
    return _unfold(tensors)


def _files(folder: Path) -> list[str]:
    if (folder / _INDEX).is_file():
        return _indexed(folder / _INDEX)
    if (folder / _WEIGHTS).is_file():
        return [_WEIGHTS]
    others = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    hint = f" ({_some(others)} can run code when it is read: convert it to safetensors)" if others else ""
    raise FileNotFoundError(f"{folder} holds no {_WEIGHTS}{hint}")


def _indexed(index: Path) -> list[str]:
    if index.stat().st_size > _LARGEST_INDEX:
        raise ValueError(f"{index} is larger than {_LARGEST_INDEX >> 20} MiB, which no index of weights is")
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(table.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of weights: it should map names to files under 'weight_map'") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}; expected safetensors files in the same folder")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not there: copy all files of the model")
    return names


def _unfold(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the parts of every compressed weight by the weight."""
    result: dict[str, Tensor] = {}
    stems = {name.removesuffix(".bitmask") for name in tensors if name.endswith(".bitmask")}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        if stem not in stems or part not in ("shape", "compressed", "bitmask", "row_offsets"):
            result[name] = tensor
        elif part == "bitmask":
            # By the name of its module; older versions of sparse-bitmask have that of the weight.
            weight = stem if stem.endswith(".weight") else f"{stem}.weight"
            result[weight] = _unfold_one(stem, tensor, tensors.get(f"{stem}.shape"), tensors.get(f"{stem}.compressed"))
    return result


def _unfold_one(name: str, bits: Tensor, shape: Tensor | None, values: Tensor | None) -> Tensor:
    if shape is None or values is None:
        raise ValueError(f"the compressed weight {name!r} is not complete: it needs shape, compressed and bitmask")
    if values.dtype not in _DTYPES:
        raise ValueError(f"the compressed weight {name!r} holds {values.dtype}, not a float of 16, 32 or 64 bits")
    sizes = _sizes(shape)
    if not sizes or bits.dtype != torch.uint8 or bits.numel() != math.prod(sizes[:-1]) * -(-sizes[-1] // 8):
        raise ValueError(
            f"the compressed weight {name!r} is damaged: its shape {sizes or 'is none, and'} does not fit a bit mask "
            f"of {bits.numel()} bytes"
        )
    rows = bits.reshape(-1, -(-sizes[-1] // 8)).numpy()
    mask = np.unpackbits(rows, axis=1, count=sizes[-1], bitorder="little")
    kept = int(np.count_nonzero(mask))
    if kept != values.numel():
        raise ValueError(
            f"the compressed weight {name!r} is damaged: its mask keeps {kept} entries, {values.numel()} are there"
        )
    dense = torch.zeros(sizes, dtype=values.dtype)
    dense[torch.from_numpy(mask).bool().reshape(sizes)] = values.reshape(-1)
    return dense


def _sizes(shape: Tensor) -> list[int]:
    """The declared sizes; empty if they are no shape of a weight."""
    if shape.is_floating_point() or shape.is_complex() or not 1 <= shape.numel() <= 8:
        return []
    sizes = [int(size) for size in shape.reshape(-1).tolist()]
    return sizes if min(sizes) >= 1 else []


def _mismatches(own: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    """What keeps weights from being copied into a state; empty if nothing does."""
    unknown = [name for name in weights if name not in own]
    if unknown:
        return f"it has no {_some(unknown)}"
    # A tied weight is stored once.
    filled = {_memory(own[name]) for name in weights}
    missing = [name for name, tensor in own.items() if name not in weights and _memory(tensor) not in filled]
    if missing:
        return f"{_some(missing)} are missing"
    wrong = [name for name, values in weights.items() if values.shape != own[name].shape]
    if wrong:
        name = wrong[0]
        return f"{name} has shape {tuple(own[name].shape)}, in the folder {tuple(weights[name].shape)}"
    meta = [name for name in weights if own[name].is_meta]
    return f"{_some(meta)} are on the meta device: make the model with values first" if meta else ""


def _memory(tensor: Tensor) -> Any:
    return tensor.data_ptr() or id(tensor), tensor.shape


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
