"""Writes a program as a package: C, objects, weights, a build file."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsecomp.exporting.program import ALIGNMENT, Operand, Program, SiteStep, Tensor
from sparsecomp.targets.arm.kernels import Call

MAGIC = b"SPARSECW"
_HEADER = 64
_C_TYPES = {"float32": "float", "float64": "double", "bool": "uint8_t", "float16": "uint16_t"}


@dataclass
class _Weights:
    """`weights.bin` under construction; equal arrays are stored once."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)
    size: int = _HEADER
    _known: dict[tuple[str, bytes], int] = field(default_factory=dict)

    def add(self, name: str, array: npt.NDArray[Any]) -> int:
        """Offset of an array in the file."""
        content = np.ascontiguousarray(array).tobytes()
        key = (str(array.dtype), hashlib.sha256(content).digest())
        if key not in self._known:
            self._known[key] = self.size
            self.entries.append(
                {
                    "name": name,
                    "dtype": str(array.dtype),
                    "shape": list(array.shape),
                    "offset": self.size,
                    "bytes": len(content),
                }
            )
            padded = -(-max(len(content), 1) // ALIGNMENT) * ALIGNMENT
            self.parts.append(content.ljust(padded, b"\0"))
            self.size += padded
        return self._known[key]

    def content(self) -> tuple[bytes, int]:
        """The file, and the number that tells it from those of other packages."""
        body = b"".join(self.parts)
        digest = hashlib.sha256(body).digest()
        number = int.from_bytes(digest[:8], "little")
        head = MAGIC + struct.pack("<QQ", number, self.size)
        return head.ljust(_HEADER, b"\0") + body, number


@dataclass(frozen=True)
class Sizes:
    """Bytes that a package takes on the device.

    Attributes:
        ram: planned buffers, scratch of all threads, inputs and outputs.
        flash: weights and object code, the files counted whole.
    """

    ram: int
    flash: int


@dataclass(frozen=True)
class Package:
    """A package in memory: its files by name, and what it takes."""

    files: dict[str, bytes]
    sizes: Sizes


def package(
    program: Program,
    sites: Sequence[SiteStep],
    objects: dict[str, tuple[bytes, str]],
    threads: int,
    title: str,
    cpu: str,
) -> Package:
    """Make the files of a package.

    Args:
        program: with its steps.
        sites: by their numbers.
        objects: object code and assembly of the kernels by their C names.
        threads: most that a call uses.
        title: what the model is called, for comments.
        cpu: that the kernels are for.
    """
    weights = _Weights()
    arena = _Arena.of(program, sites, threads)
    body = _steps(program, sites, weights, arena)
    content, number = weights.content()
    files: dict[str, bytes] = {"weights.bin": content}
    everything = dict(objects)
    if program.objects[0]:
        everything["operations"] = program.objects
    for name, (code, assembly) in everything.items():
        files[f"kernels/{name}.o"] = code
        files[f"kernels/{name}.s"] = assembly.encode()
    kernels = sum(len(code) for code, _ in everything.values())
    interface = sum(tensor.nbytes for tensor in (*program.inputs, *program.outputs))
    sizes = Sizes(arena.total + interface, len(content) + kernels)
    files["weights.json"] = _json({"format": "see docs/arm.md", "bytes": len(content), "arrays": weights.entries})
    files["model.h"] = _header(program, arena, len(content), threads, title, sizes).encode()
    files["model.c"] = _source(program, sites, body, number, cpu).encode()
    files["main.c"] = resources.files(__package__).joinpath("main.c").read_bytes()
    files["CMakeLists.txt"] = _cmake(sorted(everything)).encode()
    return Package(files, sizes)


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


@dataclass(frozen=True)
class _Arena:
    """Where buffers lie: those of the program, then maps that were taken apart, then the scratch of each thread."""

    buffers: tuple[int, ...]
    opened: int
    scratch: int
    scratch_bytes: int
    total: int

    @classmethod
    def of(cls, program: Program, sites: Sequence[SiteStep], threads: int) -> _Arena:
        offsets, at = [], 0
        for nbytes in program.buffers:
            offsets.append(at)
            at += _aligned(nbytes)
        opened = max((4 * site.call.opened_floats for site in sites), default=0)
        scratch = _aligned(max((4 * site.call.call.scratch_floats for site in sites), default=0))
        start = at + _aligned(opened)
        return cls(tuple(offsets), at, start, scratch, start + threads * scratch)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


# -- model.c ----------------------------------------------------------------------------------------------------------


def _steps(program: Program, sites: Sequence[SiteStep], weights: _Weights, arena: _Arena) -> list[str]:
    """The cases of the switch, and before them the sizes that kernels read."""
    constants = [weights.add(f"constant_{index}", array) for index, array in enumerate(program.constants)]
    packed: dict[int, int] = {}

    def pointer(operand: Operand) -> str:
        if operand.kind == "constant":
            return f"W({constants[operand.index]})"
        if operand.kind == "buffer":
            return f"B({arena.buffers[operand.index]})"
        return f"{'inputs' if operand.kind == 'input' else 'outputs'}[{operand.index}]"

    lines = []
    for number, step in enumerate(program.steps):
        operands = [pointer(operand) for operand in step.operands]
        lines.append(f"    case {number}: /* {_comment(step.label)} */")
        if step.site is not None:
            site = sites[step.site]
            bias = packed.setdefault(step.site, weights.add(f"{site.name}.bias", site.bias))
            x, residual, y = operands[0], operands[1] if len(operands) == 3 else "NULL", operands[-1]
            if site.call.opening is not None:
                opened, stem = f"B({arena.opened})", f"{site.name}.open"
                lines.append(_launch(f"{step.site}_open", site.call.opening, x, "NULL", "NULL", opened, weights, stem))
                x = opened
            lines.append(_launch(str(step.site), site.call.call, x, f"W({bias})", residual, y, weights, site.name))
        elif step.function:
            lines.append(f"      {step.function}({', '.join(operands)});")
        else:
            lines.append(f"      memcpy({operands[1]}, {operands[0]}, {step.nbytes});")
        lines.append("      break;")
    return lines


def _launch(number: str, call: Call, x: str, bias: str, residual: str, y: str, weights: _Weights, stem: str) -> str:
    arrays = [f"W({weights.add(f'{stem}.w{place}', array)})" for place, array in enumerate(call.arrays)]
    arrays += ["NULL"] * (4 - len(arrays))
    values = ", ".join([x, bias, residual, y, *arrays])
    return f"      launch(m, {call.source.name}, {values}, DIMS_{number}, {call.items});"


def _dims(sites: Sequence[SiteStep]) -> list[str]:
    lines = []
    for number, site in enumerate(sites):
        for suffix, call in (("_open", site.call.opening), ("", site.call.call)):
            if call is not None:
                numbers = ", ".join(map(str, call.dims))
                lines.append(f"static const int32_t DIMS_{number}{suffix}[] = {{{numbers}}};")
    return lines


def _source(program: Program, sites: Sequence[SiteStep], body: list[str], number: int, cpu: str) -> str:
    kernels = dict.fromkeys(
        call.source.name for site in sites for call in (site.call.opening, site.call.call) if call is not None
    )
    functions = {step.function: len(step.operands) for step in program.steps if step.function}
    declarations = [f"extern kernel_function {name};" for name in kernels]
    declarations += [f"extern void {name}({', '.join(['void *'] * count)});" for name, count in functions.items()]
    labels, predicted, names = [], [], []
    for step in program.steps:
        site = None if step.site is None else sites[step.site]
        labels.append(f"  {_string(step.label)},")
        names.append(f"  {_string('other' if site is None else site.kernel)},")
        predicted.append(f"{0.0 if site is None else site.us:.3f}")
    template = resources.files(__package__).joinpath("model.c.in").read_text()
    return (
        template.replace("@MAGIC@", MAGIC.decode())
        .replace("@ID@", f"UINT64_C({number})")
        .replace("@CPU@", _string(cpu))
        .replace("@DECLARATIONS@", "\n".join(declarations))
        .replace("@DIMS@", "\n".join(_dims(sites)))
        .replace("@LABELS@", "\n".join(labels))
        .replace("@KERNELS@", "\n".join(names))
        .replace("@PREDICTED@", ", ".join(predicted))
        .replace("@INPUT_BYTES@", ", ".join(str(tensor.nbytes) for tensor in program.inputs))
        .replace("@OUTPUT_BYTES@", ", ".join(str(tensor.nbytes) for tensor in program.outputs))
        .replace("@OUTPUT_FLOATS@", ", ".join(str(int(t.dtype == np.float32)) for t in program.outputs))
        .replace("@PARAMETERS@", _parameters(program))
        .replace("@CAST_INPUTS@", ", ".join(f"(void *)(uintptr_t){name}" for name in _identifiers(program)[0]))
        .replace("@OUTPUTS@", ", ".join(_identifiers(program)[1]))
        .replace("@STEPS@", "\n".join(body))
    )


def _identifiers(program: Program) -> tuple[list[str], list[str]]:
    """Names of the parameters of `model_run`."""
    used: set[str] = set()

    def unique(kind: str, name: str) -> str:
        # With a prefix no name is a word of C.
        base = f"{kind}_{re.sub(r'[^0-9A-Za-z_]', '_', name) or 'value'}"
        chosen, count = base, 1
        while chosen in used:
            count += 1
            chosen = f"{base}_{count}"
        used.add(chosen)
        return chosen

    inputs = [unique("in", tensor.name) for tensor in program.inputs]
    return inputs, [unique("out", tensor.name) for tensor in program.outputs]


def _parameters(program: Program) -> str:
    inputs, outputs = _identifiers(program)
    parts = [f"const {_c_type(t)} *{name}" for name, t in zip(inputs, program.inputs, strict=True)]
    parts += [f"{_c_type(t)} *{name}" for name, t in zip(outputs, program.outputs, strict=True)]
    return ", ".join(["const struct model *m", *parts])


def _c_type(tensor: Tensor) -> str:
    name = str(tensor.dtype)
    return _C_TYPES.get(name, f"{name}_t")


def _comment(text: str) -> str:
    return text.replace("*/", "* /").replace("\n", " ")


def _string(text: str) -> str:
    """A C string; what is not plain ASCII becomes a question mark, and trigraphs cannot arise."""
    plain = "".join(c if " " <= c <= "~" else "?" for c in text)
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"').replace("??", "?\\?") + '"'


# -- the other files --------------------------------------------------------------------------------------------------


def _header(program: Program, arena: _Arena, weights: int, threads: int, title: str, sizes: Sizes) -> str:
    inputs, outputs = _identifiers(program)
    lines = []
    for names, tensors in ((inputs, program.inputs), (outputs, program.outputs)):
        for name, tensor in zip(names, tensors, strict=True):
            shape = " x ".join(map(str, tensor.shape)) or "scalar"
            size = f"{tensor.dtype} [{shape}], {tensor.nbytes} bytes"
            lines.append(f" *   {name}: {size}, the model's {_comment(tensor.name)}")
    template = resources.files(__package__).joinpath("model.h.in").read_text()
    return (
        template.replace("@TITLE@", _comment(title))
        .replace("@TENSORS@", "\n".join(lines))
        .replace("@WEIGHTS@", str(weights))
        .replace("@ARENA@", str(max(arena.total, 1)))
        .replace("@SCRATCH@", f"{arena.scratch}")
        .replace("@SCRATCH_BYTES@", f"{arena.scratch_bytes}")
        .replace("@THREADS@", str(threads))
        .replace("@STEPS@", str(len(program.steps)))
        .replace("@INPUT_COUNT@", str(len(program.inputs)))
        .replace("@OUTPUT_COUNT@", str(len(program.outputs)))
        .replace("@PARAMETERS@", _parameters(program))
        .replace("@RAM@", str(sizes.ram))
        .replace("@FLASH@", str(sizes.flash))
    )


def _cmake(objects: Sequence[str]) -> str:
    files = "\n".join(f"  ${{CMAKE_CURRENT_SOURCE_DIR}}/kernels/{name}.o" for name in objects)
    template = resources.files(__package__).joinpath("CMakeLists.txt.in").read_text()
    return template.replace("@OBJECTS@", files)


def labelled(program: Program, sites: Sequence[SiteStep]) -> None:
    """Give the steps of sites their names."""
    program.steps = [
        step if step.site is None else replace(step, label=_label(sites[step.site])) for step in program.steps
    ]


def _label(site: SiteStep) -> str:
    return f"{site.name}: {site.kernel}" if site.kernel == "dense" else f"{site.name}: {site.kernel} [{site.pattern}]"
