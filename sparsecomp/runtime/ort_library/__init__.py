"""A native library of custom operations for a stock ONNX Runtime: the C sources beside this file and a model's kernels.

`build` generates the table of the operations that a model uses, compiles their kernels (each once, they are cached) and
links all of it to one shared object that needs nothing else.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsecomp.runtime.cache import built_file, key_of, link
from sparsecomp.runtime.launch import KernelSource, key_of_kernel, write_kernel
from sparsecomp.window import Window

DOMAIN = "ai.sparsecomp"
"""Domain of the custom operations."""

MOST_FORMS = 3
"""Forms of one weight, at most."""
_SOURCES = ("library.c", "weights.c", "tensor.c", "launch.c", "cut.c", "linear.c", "conv.c")
_HERE = Path(__file__).parent
_FLAGS = ("-std=gnu11", "-Wall", "-fvisibility=hidden", "-pthread", "-Wl,-z,noexecstack", "-s")


@dataclass(frozen=True)
class OrtKernel:
    """A kernel that a call may choose.

    Attributes:
        number: vectors of its tile (rows, convolutions), tokens of its register tile (panel), else 0.
        source: of the kernel.
        whole: of a convolution, whether a tile lies within one image.
        direct: and whether the maps are used where they lie.
    """

    number: int
    source: KernelSource
    whole: bool = False
    direct: bool = False


@dataclass(frozen=True)
class OrtForm:
    """A packed form of a weight, and the kernels that a call may choose from.

    Attributes:
        family: `rows`, `panel`, `gather`, `mask`, `conv` or `full`.
        v: rows of a panel (panel, full), entries of a group (gather), else 1.
        kernels: by ascending number.
    """

    family: str
    v: int
    kernels: tuple[OrtKernel, ...]


@dataclass(frozen=True)
class OrtOperation:
    """An operation to register: the forms of one weight with one epilogue.

    Attributes:
        name: type of the operation, unique in its domain.
        forms: of the weight; with several, a table of the node chooses by the number of tokens.
        bias: whether a bias is an input.
        residual: whether a residual is an input.
        indexed: whether the places of the values are inputs too, which the library does not read.
        lanes: float32 in a vector.
        window: of a convolution, which has one form.
        rank: dimensions of its maps, 1 or 2.
        opening: the kernel that takes maps apart, where the window asks for that.
    """

    name: str
    forms: tuple[OrtForm, ...]
    bias: bool
    residual: bool
    indexed: bool
    lanes: int
    window: Window | None = None
    rank: int = 2
    opening: KernelSource | None = None

    @property
    def sources(self) -> list[KernelSource]:
        """All kernels."""
        kernels = [kernel.source for form in self.forms for kernel in form.kernels]
        return [*kernels, *([self.opening] if self.opening else [])]


@dataclass(frozen=True)
class PackedForm:
    """A weight in one form.

    Attributes:
        family: `rows`, `panel`, `gather`, `mask`, `conv` or `full`.
        v: rows of a panel (panel, full), entries of a group (gather), else 1.
        attributes: sizes that the node carries.
        arrays: by name, in the order of its inputs; the values of a panel or of rows are flat.
        width: rows of a panel whose values lie together (panel), else 1.
    """

    family: str
    v: int
    attributes: dict[str, int]
    arrays: dict[str, npt.NDArray[Any]]
    width: int = 1


@dataclass(frozen=True)
class PackedWeight:
    """A weight as the constants of a node.

    Attributes:
        forms: one, or up to `MOST_FORMS`.
        choice: with several, int32 `[ranges, 2]`: up to so many tokens, the place of the form.
    """

    forms: tuple[PackedForm, ...]
    choice: npt.NDArray[np.int32] | None = None

    @property
    def attributes(self) -> dict[str, int]:
        """Sizes that the node carries."""
        return {name: size for form in self.forms for name, size in form.attributes.items()}


@dataclass(frozen=True)
class OrtTarget:
    """What the library has to know of the hardware.

    Attributes:
        name: for messages.
        needs: features of the CPU, as the C compiler's `__builtin_cpu_supports` calls them.
        constants: numbers of the schedules by name, for `cut.c`.
    """

    name: str
    needs: tuple[str, ...]
    constants: Mapping[str, float]


def build(operations: Sequence[OrtOperation], target: OrtTarget, output: Path) -> None:
    """Write the library.

    Args:
        operations: to register; at least one.
        target: of the kernels.
        output: the shared object, written whole or not at all.

    Raises:
        BuildError: a kernel or the library could not be built here.
        OSError: the file cannot be written.
    """
    table = _table(operations, target)
    sources = {source.name: source for operation in operations for source in operation.sources}
    keys = {name: key_of("object", key_of_kernel(source)) for name, source in sources.items()}
    texts = [path.read_text() for path in sorted((*_HERE.glob("*.c"), *_HERE.glob("*.h")))]

    def link_all(folder: Path) -> Path:
        for path in (*_HERE.glob("*.c"), *_HERE.glob("*.h")):
            shutil.copy(path, folder)
        (folder / "ops.h").write_text(table)
        return link([*(folder / source for source in _SOURCES), *objects], folder / "linked.so", _FLAGS)

    # One after the other: the cache is locked while it makes a file.
    objects = [
        built_file(keys[name], ".o", functools.partial(write_kernel, source)) for name, source in sources.items()
    ]
    library = built_file(key_of("library", table, *keys.values(), *texts, *_FLAGS), ".so", link_all)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        shutil.copyfile(library, temporary)
        temporary.chmod(0o644)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def _table(operations: Sequence[OrtOperation], target: OrtTarget) -> str:
    """`ops.h`: what the C sources are told of the model and the target."""
    symbols = {source.name: None for operation in operations for source in operation.sources}
    lines = [f'#define TARGET "{target.name}"', f'#define DOMAIN "{DOMAIN}"']
    lines += [f"#define {name.upper()} {value}" for name, value in target.constants.items()]
    checks = " ".join(f'if (!__builtin_cpu_supports("{need}")) missing = "{need}";' for need in target.needs)
    lines.append(f"#define CHECK_CPU(missing) do {{ {checks} }} while (0)")
    lines += [f"extern KernelFunction {symbol};" for symbol in symbols]
    unused = "__attribute__((unused))"
    for index, operation in enumerate(operations):
        forms = []
        for place, form in enumerate(operation.forms):
            variants = ", ".join(
                f"{{{k.number}, {int(k.whole)}, {int(k.direct)}, {k.source.name}}}" for k in form.kernels
            )
            lines.append(f"static const Variant VARIANTS{index}_{place}[] {unused} = {{{variants}}};")
            forms.append(f"{{{form.family.upper()}, {form.v}, VARIANTS{index}_{place}, {len(form.kernels)}}}")
        lines.append(f"static const Form FORMS{index}[] {unused} = {{{', '.join(forms)}}};")
    entries = []
    for index, o in enumerate(operations):
        flags = ", ".join(str(int(flag)) for flag in (o.bias, o.residual, o.indexed))
        entries.append(
            f'{{"{o.name}", {flags}, {o.lanes}, FORMS{index}, {len(o.forms)}, '
            f"{_window(o)}, {o.opening.name if o.opening else 'NULL'}}},"
        )
    lines += ["static const Entry ENTRIES[] __attribute__((unused)) = {", *entries, "};"]
    return "\n".join(["/* Generated. */", *lines]) + "\n"


def _window(operation: OrtOperation) -> str:
    window = operation.window
    if window is None:
        return "{0}"
    pairs = (window.kernel, window.stride, window.padding, window.dilation, window.extra)
    numbers = ", ".join(f"{{{first}, {second}}}" for first, second in pairs)
    return f"{{{operation.rank}, {numbers}, {window.groups}}}"
