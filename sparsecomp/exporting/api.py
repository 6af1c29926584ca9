"""`sparsecomp.export`: a model becomes a package of C, objects and weights that runs on a board by itself."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import onnx_ir as ir
import torch
from torch import nn

from sparsecomp.cuda.export import export_cuda
from sparsecomp.exporting.emit import Sizes, labelled, package
from sparsecomp.exporting.lowering import lower
from sparsecomp.exporting.ranges import dynamic_shapes, parse_shapes
from sparsecomp.exporting.sites import FoundSite, dense_up_to, find_sites, output_shape, pack_sites, replace_sites
from sparsecomp.frontends.onnx_half import widen
from sparsecomp.frontends.onnx_load import load
from sparsecomp.frontends.onnx_shapes import infer
from sparsecomp.frontends.program import load_program
from sparsecomp.kernels import tir
from sparsecomp.options import Options
from sparsecomp.packages import write_package
from sparsecomp.planner import Plan
from sparsecomp.report import Report
from sparsecomp.runtime.cache import built_file, key_of
from sparsecomp.runtime.launch import KernelSource, key_of_kernel
from sparsecomp.targets.arm.cpu import cpu, host_level
from sparsecomp.targets.arm.kernels import sources_of
from sparsecomp.targets.arm.target import ArmTarget

DEFAULT_CPU = "cortex-a76"
_TARGETS = ("arm", "host")
_DTYPES = ("float32", "float16")
_MOST_THREADS = 64
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

Source: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | ir.Model | nn.Module | torch.export.ExportedProgram"
"""What a model may be given as."""


def export(
    model: Source,
    inputs: Sequence[Any] | None = None,
    *,
    output: str | os.PathLike[str],
    target: str = "arm",
    cpu_name: str = DEFAULT_CPU,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    options: Options | Mapping[str, Any] | None = None,
    threads: int = 1,
    dtype: str | None = None,
    ram: int | str | None = None,
    flash: int | str | None = None,
    arch: str | Sequence[str] | None = None,
) -> Report:
    """Write a package that runs a model on a board, without Python, torch or TVM; or its sparse linears on a card.

    Args:
        model: an ONNX model (path or in memory), a program of `torch.export` (or the path of its .pt2 file), or a
            module, which is exported with `inputs`.
        inputs: example inputs of a module.
        output: the folder to write; what lies in it from an export before is replaced.
        target: `arm`; or `host` for the same code built for this x86-64 machine, to test it. `cuda`, or a card such as
            `cuda:h100`: see `sparsecomp.cuda.export.export_cuda`, which takes `options` and `arch`.
        cpu_name: the board's CPU, one of `sparsecomp.targets.arm.cpu_names()`; of `host` the one that is planned for.
        shapes: sizes of inputs by name; what a model leaves open is 1 first, then 128, and 224 for images. A size that
            each run of the package gives is a range, such as `(1, "1..128")`; memory is planned for its largest. Ranges
            with one name, as in `"length:1..128"`, are one size. Of a module the names of inputs are those of the
            parameters of `forward`.
        options: `plan`, `patterns` and `exclude` as for `torch.compile`.
        threads: most that a call uses, where the package is built with OpenMP.
        dtype: `float16` lets linears compute in half precision where that is predicted to be faster, on CPUs that can:
            weights, activations and the sums over a block of columns (at most some hundred) are float16, and what
            follows float32. None: that of the model. What of a float16 model does not compute in half precision does in
            float32. Inputs and outputs stay what they are.
        ram: bytes that the package may take at run time, also as "512K" or "4M".
        flash: bytes that weights and kernels may take.
        arch: of cards: compute capability such as `sm_90`, or several.

    Returns:
        What was chosen for every site; its notes say what the package takes.

    Raises:
        ValueError: the model, an option, the CPU or a size is bad, an operation cannot be exported (the message names
            node and file), or the package is larger than `ram` or `flash`. Nothing is written.
        FileNotFoundError: there is no such file.
        OSError: the folder cannot be written.
    """
    if target.partition(":")[0] == "cuda":
        if shapes or dtype or ram or flash or threads != 1 or cpu_name != DEFAULT_CPU:
            raise ValueError(
                "shapes, dtype, ram, flash, threads and cpu_name belong to boards; cards take options and arch"
            )
        if isinstance(model, (onnx.ModelProto, ir.Model)):
            raise ValueError("packages for cards are made of modules and programs of torch.export, given an ONNX model")
        return export_cuda(model, inputs, output=output, target=target, arch=arch, options=options)
    if arch is not None:
        raise ValueError(f"arch={arch!r} belongs to cards: give target='cuda'")
    if target not in _TARGETS:
        raise ValueError(f"unknown target {target!r} to export for; the targets are {', '.join((*_TARGETS, 'cuda'))}")
    if not 1 <= threads <= _MOST_THREADS:
        raise ValueError(f"threads must be 1 to {_MOST_THREADS}, given {threads}")
    limits = _bytes("ram", ram), _bytes("flash", flash)
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"unknown dtype {dtype!r}; the dtypes are {', '.join(_DTYPES)}")
    if dtype == "float16" and target == "host":
        raise ValueError("float16 is computed by ARM CPUs: export for the target arm, or leave the dtype float32")
    arm = ArmTarget(cpu(cpu_name), half=dtype == "float16")
    level = arm.cpu.level if target == "arm" else host_level()
    parsed = Options.parse(options)
    loaded, title = _load(model, inputs, shapes or {})
    widened = widen(loaded)
    if widened and dtype is None and target == "arm" and arm.cpu.half:
        arm = ArmTarget(arm.cpu, half=True)
    largest, ranges = parse_shapes(loaded, shapes or {})
    sizes = infer(loaded, largest).inputs
    found = find_sites(loaded, sizes, arm, parsed, threads)
    ours = [item for item in found if item.computed]
    replace_sites(loaded, ours)

    def shape_of(index: int, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        return output_shape(ours[index].site, shape)

    ranged = {name: [ranges.get((name, i), size) for i, size in enumerate(shape)] for name, shape in sizes.items()}
    program = lower(ir.to_proto(loaded), ranged, shape_of, level.tvm_target, title)
    shape_of_x = {step.site: step.shape for step in program.steps if step.site is not None}
    sites = pack_sites(ours, [shape_of_x[index] for index in range(len(ours))], arm, level, threads)
    labelled(program, sites)
    report = _report(found, arm, threads)
    objects = _objects(sources_of(call for site in sites for _, call in site.calls))
    made = package(program, sites, objects, threads, title, level.name)
    _check_fits(made.sizes, *limits)
    made.files["plan.json"] = report.plan.to_json().encode()
    _write(made.files, Path(output))
    for item, site in zip(ours, sites, strict=True):
        if tokens := dense_up_to(item, site):
            report.notes.append(f"{site.name}: dense where it gets at most {tokens} tokens")
    if widened:
        half = "linears in half precision where that is faster, all else in" if arm.half else "in"
        report.notes.append(f"the model is float16: it computes {half} float32")
    report.notes.append(f"{made.sizes.ram} bytes of RAM, {made.sizes.flash} bytes of weights and kernels")
    return report


def _load(
    model: Source, inputs: Sequence[Any] | None, shapes: Mapping[str, Sequence[int | str]]
) -> tuple[ir.Model, str]:
    """The model as ONNX, and what it is called; a module is exported so that sizes given as ranges may change."""
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        if path.suffix != ".pt2":
            return load(path), path.name
        return _from_torch(load_program(path)), path.name
    if isinstance(model, (onnx.ModelProto, ir.Model)):
        return load(model), "the model"
    if not isinstance(model, nn.Module):
        return _from_torch(model), type(model).__name__
    if inputs is None:
        raise ValueError("a module is exported with example inputs: sparsecomp.export(model, inputs, output=...)")
    changing = dynamic_shapes(model, len(inputs), shapes)
    return _from_torch(model, tuple(inputs), dynamic_shapes=changing), type(model).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch says of itself: packages that are not installed, calls of its own that will change."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _from_torch(
    model: nn.Module | torch.export.ExportedProgram, inputs: tuple[Any, ...] = (), dynamic_shapes: Any = None
) -> ir.Model:
    """A module or an exported program as ONNX, by PyTorch's exporter."""
    with torch.no_grad(), _quiet():
        made = torch.onnx.export(model, inputs, dynamo=True, verbose=False, dynamic_shapes=dynamic_shapes)
    if made is None:
        raise ValueError(f"PyTorch's ONNX exporter gave nothing for {type(model).__name__}")
    return load(made.model_proto)


def _report(found: Sequence[FoundSite], target: ArmTarget, threads: int) -> Report:
    plan = Plan(target.name, threads=threads)
    plan.add(item.choice for item in found)
    return Report(plan, target.description)


def _objects(sources: Sequence[KernelSource]) -> dict[str, tuple[bytes, str]]:
    """Object code and assembly of kernels, from the cache where it has them."""
    made: dict[str, tuple[bytes, str]] = {}
    for source in sources:
        # Compiled once, for whichever of the two files is missing.
        compiled = functools.cache(functools.partial(_compiled, source))

        def code(folder: Path, compiled: _Compile = compiled) -> Path:
            path = folder / "kernel.o"
            path.write_bytes(compiled()[0])
            return path

        def assembly(folder: Path, compiled: _Compile = compiled) -> Path:
            path = folder / "kernel.s"
            path.write_text(compiled()[1], encoding="utf-8")
            return path

        key = key_of_kernel(source)
        paths = built_file(key_of("object", key), ".o", code), built_file(key_of("assembly", key), ".s", assembly)
        made[source.name] = paths[0].read_bytes(), paths[1].read_text(encoding="utf-8")
    return made


_Compile = Callable[[], tuple[bytes, str]]


def _compiled(source: KernelSource) -> tuple[bytes, str]:
    return tir.compile_object(source.build(), source.name, dict(source.target))


def _bytes(name: str, given: int | str | None) -> int | None:
    if given is None:
        return None
    found = re.fullmatch(r"(\d{1,15})([KMG]?)", str(given).upper().removesuffix("B").removesuffix("I"))
    if not found or int(found[1]) == 0:
        raise ValueError(f"{name} must be a number of bytes such as 65536, 512K or 4M; given {given!r}")
    return int(found[1]) * _UNITS[found[2]]


def _check_fits(sizes: Sizes, ram: int | None, flash: int | None) -> None:
    parts = []
    for name, taken, most in (("RAM", sizes.ram, ram), ("flash", sizes.flash, flash)):
        if most is not None and taken > most:
            parts.append(f"it takes {taken} bytes of {name}, {taken - most} more than the {most} given")
    if parts:
        raise ValueError(f"the package does not fit: {'; '.join(parts)}")


def _write(files: Mapping[str, bytes], output: Path) -> None:
    """Write a package, in place of the kernels that an earlier one left there."""
    write_package(files, output)
    kernels = output / "kernels"
    kernels.mkdir(exist_ok=True)
    for old in kernels.iterdir():
        if old.suffix in (".o", ".s") and f"kernels/{old.name}" not in files:
            old.unlink()
