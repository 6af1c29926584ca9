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

from sparsecomp.exporting.program import ALIGNMENT, Count, Operand, Program, SiteStep, Step, Tensor, product
from sparsecomp.targets.arm.dot import INT8
from sparsecomp.targets.arm.kernels import CONV_HALF, HALF, Call, SiteCall, sources_of

MAGIC = b"SPARSECW"
_HEADER = 64
_COARSE = (HALF, CONV_HALF, INT8)
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
    interface = sum(tensor.nbytes.most for tensor in (*program.inputs, *program.outputs))
    sizes = Sizes(arena.total + interface, len(content) + kernels)
    files["weights.json"] = _json({"format": "see docs/arm.md", "bytes": len(content), "arrays": weights.entries})
    files["model.h"] = _header(program, sites, arena, len(content), threads, title, sizes).encode()
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
        calls = [call for site in sites for _, call in site.calls]
        opened = max((4 * call.opened_floats for call in calls), default=0)
        scratch = _aligned(max((4 * call.call.scratch_floats for call in calls), default=0))
        start = at + _aligned(opened)
        return cls(tuple(offsets), at, start, scratch, start + threads * scratch)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


# -- model.c ----------------------------------------------------------------------------------------------------------


def _steps(program: Program, sites: Sequence[SiteStep], weights: _Weights, arena: _Arena) -> list[str]:
    """The cases of the switch."""
    constants = [weights.add(f"constant_{index}", array) for index, array in enumerate(program.constants)]

    def pointer(operand: Operand) -> str:
        if operand.count is not None:
            return operand.count.text
        if operand.kind == "constant":
            return f"W({constants[operand.index]})"
        if operand.kind == "buffer":
            return f"B({arena.buffers[operand.index]})"
        return f"{'inputs' if operand.kind == 'input' else 'outputs'}[{operand.index}]"

    lines = []
    for number, step in enumerate(program.steps):
        operands = [pointer(operand) for operand in step.operands]
        lines.append(f"    case {number}: {{ /* {_comment(step.label)} */")
        if step.site is not None:
            lines += _site(sites[step.site], step, operands, weights, arena)
        elif step.function:
            lines.append(f"      {step.function}({', '.join(operands)});")
        else:
            lines.append(f"      memcpy({operands[1]}, {operands[0]}, {_bytes(step.shape[0])});")
        lines += ["      break;", "    }"]
    return lines


def _site(site: SiteStep, step: Step, operands: list[str], weights: _Weights, arena: _Arena) -> list[str]:
    """The calls of a site, of which the sizes of the run choose one."""
    bias = f"W({weights.add(f'{site.name}.bias', site.bias)})"
    x, residual, y = operands[0], operands[1] if len(operands) == 3 else "NULL", operands[-1]

    def launches(call: SiteCall, count: str) -> list[str]:
        lines, source = [], x
        if call.opening is not None:
            source = f"B({arena.opened})"
            lines = _launch("opening", call.opening, [x, "NULL", "NULL", source], weights, f"{site.name}.open", count)
        return lines + _launch("dims", call.call, [source, bias, residual, y], weights, site.name, count)

    counted = product(step.shape[:-1]) if site.calls[0][1].call.step else step.shape[0]
    if counted.fixed:
        return ["      " + line for line in launches(site.calls[0][1], "")]
    lines = [f"      const int32_t count = (int32_t)({counted.text});"]
    for place, (most, call) in enumerate(site.calls):
        condition = f"if (count <= {most}) " if most < counted.most else ""
        lines.append(f"      {'} else ' if place else ''}{condition}{{")
        lines += ["        " + line for line in launches(call, "count")]
    return [*lines, "      }"]


def _launch(dims: str, call: Call, operands: list[str], weights: _Weights, stem: str, count: str) -> list[str]:
    """Sizes and the call; with `count` the C name of the tokens that it is for, instead of a number."""
    arrays = [f"W({weights.add(f'{stem}.w{place}', array)})" for place, array in enumerate(call.arrays)]
    arrays += ["NULL"] * (4 - len(arrays))
    numbers, items, kind = list(map(str, call.dims)), str(call.items), "static const"
    if count and call.step:
        each = call.items // -(-call.dims[0] // call.step)
        items = count if call.step == 1 else f"({count} + {call.step - 1}) / {call.step}"
        items += f" * {each}" if each > 1 else ""
        numbers[0], kind = count, "const"
    return [
        f"{kind} int32_t {dims}[] = {{{', '.join(numbers)}}};",
        f"launch(m, {call.source.name}, {', '.join([*operands, *arrays])}, {dims}, {items});",
    ]


def _bytes(count: Count) -> str:
    return count.text if count.fixed else f"(size_t)({count.text})"


def _source(program: Program, sites: Sequence[SiteStep], body: list[str], number: int, cpu: str) -> str:
    kernels = [source.name for source in sources_of(call for site in sites for _, call in site.calls)]
    functions = {step.function: step.operands for step in program.steps if step.function}
    declarations = [f"extern kernel_function {name};" for name in kernels]
    for name, operands in functions.items():
        types = ("void *" if operand.count is None else "int64_t" for operand in operands)
        declarations.append(f"extern void {name}({', '.join(types)});")
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
        .replace("@LABELS@", "\n".join(labels))
        .replace("@KERNELS@", "\n".join(names))
        .replace("@PREDICTED@", ", ".join(predicted))
        .replace("@INPUT_BYTES@", _byte_cases(program.inputs))
        .replace("@OUTPUT_BYTES@", _byte_cases(program.outputs))
        .replace("@SIZE_NAMES@", "".join(f"{_string(size.name)}, " for size in program.sizes))
        .replace("@SIZE_LEAST@", "".join(f"{size.least}, " for size in program.sizes))
        .replace("@SIZE_MOST@", "".join(f"{size.most}, " for size in program.sizes))
        .replace("@OUTPUT_FLOATS@", ", ".join(str(_float_bytes(t)) for t in program.outputs))
        .replace("@PARAMETERS@", _parameters(program))
        .replace("@SIZES@", "".join(f"{name}, " for name in _identifiers(program)[0]))
        .replace("@CAST_INPUTS@", ", ".join(f"(void *)(uintptr_t){name}" for name in _identifiers(program)[1]))
        .replace("@OUTPUTS@", ", ".join(_identifiers(program)[2]))
        .replace("@STEPS@", "\n".join(body))
    )


def _float_bytes(tensor: Tensor) -> int:
    return tensor.dtype.itemsize if tensor.dtype in (np.float32, np.float16) else 0


def _tolerance(program: Program, sites: Sequence[SiteStep]) -> float:
    """Half precision rounds by up to a hundredth of the largest value, and a level of int8 may be the next one."""
    coarse = any(site.kernel in _COARSE for site in sites) or any(t.dtype == np.float16 for t in program.outputs)
    return 1e-2 if coarse else 1e-4


def _byte_cases(tensors: Sequence[Tensor]) -> str:
    return "\n".join(f"    case {place}: return {_bytes(tensor.nbytes)};" for place, tensor in enumerate(tensors))


def _identifiers(program: Program) -> tuple[list[str], list[str], list[str]]:
    """Names of the parameters of `model_run`: sizes, inputs and outputs."""
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

    sizes = [unique("size", size.name) for size in program.sizes]
    inputs = [unique("in", tensor.name) for tensor in program.inputs]
    return sizes, inputs, [unique("out", tensor.name) for tensor in program.outputs]


def _parameters(program: Program) -> str:
    sizes, inputs, outputs = _identifiers(program)
    parts = [f"int32_t {name}" for name in sizes]
    parts += [f"const {_c_type(t)} *{name}" for name, t in zip(inputs, program.inputs, strict=True)]
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


def _header(
    program: Program,
    sites: Sequence[SiteStep],
    arena: _Arena,
    weights: int,
    threads: int,
    title: str,
    sizes: Sizes,
) -> str:
    names_of_sizes, inputs, outputs = _identifiers(program)
    lines = [
        f" *   {name}: {size.least} to {size.most}, the model's {_comment(size.name)}"
        for name, size in zip(names_of_sizes, program.sizes, strict=True)
    ]
    for names, tensors in ((inputs, program.inputs), (outputs, program.outputs)):
        for name, tensor in zip(names, tensors, strict=True):
            shape = " x ".join(_readable(count, names_of_sizes) for count in tensor.shape) or "scalar"
            most = "" if tensor.nbytes.fixed else "at most "
            size = f"{tensor.dtype} [{shape}], {most}{tensor.nbytes.most} bytes"
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
        .replace("@SIZE_COUNT@", str(len(program.sizes)))
        .replace("@INPUT_COUNT@", str(len(program.inputs)))
        .replace("@OUTPUT_COUNT@", str(len(program.outputs)))
        .replace("@TOLERANCE@", f"{_tolerance(program, sites):g}")
        .replace("@PARAMETERS@", _parameters(program))
        .replace("@RAM@", str(sizes.ram))
        .replace("@FLASH@", str(sizes.flash))
    )


def _readable(count: Count, sizes: Sequence[str]) -> str:
    """A count with the names of the sizes."""
    return re.sub(r"sizes\[(\d+)\]", lambda found: sizes[int(found[1])], count.text)


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
