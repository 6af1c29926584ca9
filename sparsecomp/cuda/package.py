"""The files of an exported package: sources, cubins, weights, and a program that runs, checks and times the layers."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.cuda.compiled import cubin_of, sources_of
from sparsecomp.cuda.library import CudaKernel
from sparsecomp.planner import SiteChoice
from sparsecomp.report import Report

_ALIGNMENT = 256  # bytes, what the driver gives allocations and more than any kernel needs
_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.int32: "int32"}


@dataclass(frozen=True)
class Layer:
    """A linear that becomes one launch, `y = x W^T + bias`.

    Attributes:
        name: of the site.
        kernel: that computes it.
        weight: `[outputs, inputs]`.
        bias: `[outputs]`, or None.
        x: `[tokens, inputs]`, of one run of the model.
        y: `[tokens, outputs]`, likewise.
    """

    name: str
    kernel: CudaKernel
    weight: Tensor
    bias: Tensor | None
    x: Tensor
    y: Tensor


class _File:
    """A binary file that arrays are put into, one behind the other."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, array: Tensor) -> int:
        """Append an array; returns the byte that it begins at."""
        at = self._size
        content = array.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        content += bytes(-len(content) % _ALIGNMENT)
        self._parts.append(content)
        self._size += len(content)
        return at

    def content(self) -> bytes:
        """The whole file."""
        return b"".join(self._parts)


def package(layers: Sequence[Layer], report: Report, archs: Sequence[str], card: str, title: str) -> dict[str, bytes]:
    """The files by their paths.

    Args:
        layers: one at least.
        report: whose plan is written; its dense sites are listed with their reasons.
        archs: to compile for, such as `sm_90`.
        card: whose prices chose the kernels.
        title: of the model.

    Raises:
        ValueError: a kernel does not take the weight or the number of tokens.
        ModuleNotFoundError: NVRTC is not installed.
    """
    title = _plain(title)
    weights, recorded = _File(), _File()
    rows = "\n".join(_layer(layer, weights, recorded) for layer in layers)
    kernels = {layer.kernel.name: layer.kernel for layer in layers}
    files = {"main.cpp": _resource("main.cpp").encode(), "plan.json": report.plan.to_json().encode()}
    for kernel in kernels.values():
        files |= {f"kernels/{name}": text.encode() for name, text in sources_of(kernel).items()}
        files |= {f"cubins/{arch}/{kernel.name}.cubin": cubin_of(kernel, arch) for arch in archs}
    manifest = {"TITLE": title, "LAYERS": rows}
    for name, file in (("weights", weights), ("recorded", recorded)):
        files[f"{name}.bin"] = content = file.content()
        manifest[name.upper()] = f'{{"{name}.bin", {len(content)}, {zlib.crc32(content)}u}}'
    numbers = ", ".join(arch.removeprefix("sm_") for arch in archs)
    files["layers.h"] = _filled("layers.h", manifest | {"ARCHITECTURES": numbers})
    rules = "\n".join(f"  kernel({_rule(kernel)})" for kernel in kernels.values())
    files["CMakeLists.txt"] = _filled("CMakeLists.txt", {"ARCHITECTURES": " ".join(archs), "KERNELS": rules})
    values = {"TITLE": title, "COUNT": str(len(layers)), "CARD": card, "ARCHITECTURES": ", ".join(archs)}
    values |= {"LAYERS": "\n".join(map(_table_row, layers)), "DENSE": _dense(list(report))}
    files["README.md"] = _filled("README.md", values)
    return files


def _layer(layer: Layer, weights: _File, recorded: _File) -> str:
    """What `layers.h` says of a layer, whose data goes into the files."""
    kernel, (outputs, inputs), tokens = layer.kernel, layer.weight.shape, len(layer.x)
    launch, many, stride = kernel.launch(outputs, inputs, tokens), not kernel.tokens, kernel.stride(tokens)
    x, y, width = (layer.x, layer.y, outputs) if not many else (layer.x.t(), layer.y.t(), stride)
    arrays = kernel.pack(layer.weight)
    if layer.bias is not None:
        arrays["bias"] = layer.bias.float()
    given = {name: f"{{Argument::weights, {weights.add(array)}}}" for name, array in arrays.items()}
    given |= {"x": "{Argument::input}", "y": "{Argument::output}"}
    given.setdefault("bias", "{Argument::none}")
    numbers = {"outputs": outputs, "inputs": inputs, "tokens": tokens, "stride": stride, "activation": 0}
    given |= {name: f"{{Argument::number, {value}}}" for name, value in numbers.items()}
    taken = functional.pad(x, (0, stride - tokens)) if many else x
    x_at, y_at = recorded.add(taken), recorded.add(y)
    geometry = ", ".join("{" + ", ".join(map(str, sizes)) + "}" for sizes in (launch.grid, launch.block))
    lines = [
        f"    {{{_string(layer.name)}, {_string(kernel.name)}, {_string(kernel.entry)},",
        f"     {geometry}, {launch.shared},",
        "     {" + ",\n      ".join(f"{given[name]} /* {name} */" for name in kernel.arguments) + "},",
        f"     Type::{_TYPES[layer.y.dtype]}, {x_at}, {taken.numel() * taken.itemsize}, {y_at},"
        f" {y.shape[0]}, {y.shape[1]}, {width}}},",
    ]
    return "\n".join(lines)


def _rule(kernel: CudaKernel) -> str:
    """The arguments of a `kernel` in CMakeLists.txt."""
    return " ".join([kernel.name, f"{kernel.source}.cu", *(f"-D{define}" for define in kernel.defines)])


def _table_row(layer: Layer) -> str:
    outputs, inputs = layer.weight.shape
    return f"| {_plain(layer.name)} | {outputs} x {inputs} | {len(layer.x)} | {layer.kernel.name} |"


def _dense(choices: Sequence[SiteChoice]) -> str:
    left = [f"- {_plain(choice.name)}: {_plain(choice.reason)}" for choice in choices if choice.chosen.is_dense]
    return "\n".join(["Not in the package, since they stay dense:", "", *left] if left else ["All sites are in it."])


def _string(text: str) -> str:
    """A C++ string; what is not plain ASCII becomes a question mark, and trigraphs cannot arise."""
    plain = _plain(text).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + plain.replace("??", "?\\?") + '"'


def _plain(text: str) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in text)


def _filled(name: str, values: Mapping[str, str]) -> bytes:
    """A template with its places filled, all at once: values may hold what looks like a place."""
    parts = _resource(f"{name}.in").split("@")
    return "".join(values[part] if i % 2 else part for i, part in enumerate(parts)).encode()


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
