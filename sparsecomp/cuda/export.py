"""Export for NVIDIA cards: the sparse linears of a model of PyTorch as a package that runs without Python."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sparsecomp.analysis import DryRun, analyse
from sparsecomp.cuda.library import CudaKernel
from sparsecomp.cuda.nvrtc import ARCHITECTURES
from sparsecomp.cuda.package import Layer, package
from sparsecomp.frontends.program import load_program
from sparsecomp.ir import LinearSite, SparseGraph
from sparsecomp.log import DebugFolder
from sparsecomp.options import Options
from sparsecomp.packages import write_package
from sparsecomp.planner import Plan, SiteChoice
from sparsecomp.report import Report
from sparsecomp.targets.base import DENSE, Candidate, WeightFacts
from sparsecomp.targets.cuda import own
from sparsecomp.targets.cuda.cards import Card, card, card_names
from sparsecomp.targets.cuda.target import SEMI, CudaTarget

_SHOWN = 3  # sites whose reasons an error gives


def export_cuda(
    model: str | os.PathLike[str] | torch.export.ExportedProgram | nn.Module,
    inputs: Sequence[Any] | None = None,
    *,
    output: str | os.PathLike[str],
    target: str = "cuda",
    arch: str | Sequence[str] | None = None,
    options: Options | Mapping[str, Any] | None = None,
) -> Report:
    """Write a package with the sparse linears of a model: CUDA C++, cubins, weights, and a C++ program that runs them.

    The program checks every layer against the output that it has in one run of the model here, and times it. Needs
    NVRTC (`pip install 'sparsecomp[cuda]'`), no card.

    Args:
        model: a module; or a program of `torch.export`, or the path of its .pt2 file, which hold their example inputs.
        inputs: of a module, what it is called with: they give the numbers of tokens, and are recorded.
        output: the folder to write; cubins and kernels of an export before are replaced.
        target: `cuda`, or a card such as `cuda:h100`, whose prices choose.
        arch: compute capability such as `sm_90`, or several; that of the card if None. The prices are of a card of the
            first one, or of the newest architecture before it that a card is known of.
        options: `plan`, `patterns` and `exclude` as for `torch.compile`.

    Returns:
        What was chosen for every site, and why.

    Raises:
        ValueError: the model, an option, the card or an architecture is bad, no site gets a sparse kernel, or an
            output of the model is not finite. Nothing is written.
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: NVRTC is not installed.
        OSError: the folder cannot be written.
    """
    archs = [arch] if isinstance(arch, str) else list(dict.fromkeys(arch or ()))
    chosen_for = _card(target, archs)
    archs = archs or [chosen_for.arch]
    parsed = Options.parse(options)
    program, title = _program(model, inputs)
    layers, report = _layers(program, _Exported(chosen_for), parsed)
    files = package(layers, report, archs, f"{chosen_for.board} ({chosen_for.arch})", title)
    exported_before = (Path(output) / "layers.h").is_file()
    write_package(files, Path(output))
    if exported_before:  # sources of somebody else in a folder of that name stay
        _remove_others(Path(output), files)
    return report


class _Exported(CudaTarget):
    """A card that a package is for: it has our kernels alone, and is not here."""

    def why_not_here(self) -> str | None:
        return "a package is exported for it"

    def candidates(self, facts: WeightFacts, allowed: Collection[str] | None = None) -> list[Candidate]:
        return [candidate for candidate in super().candidates(facts, allowed) if candidate != SEMI]


def _card(target: str, archs: Sequence[str]) -> Card:
    """The card whose prices count, for architectures that were asked for.

    Raises:
        ValueError: one of these is not known, or none is given.
    """
    if unknown := [name for name in archs if name not in ARCHITECTURES]:
        raise ValueError(f"unknown architecture {unknown[0]!r}; kernels are compiled for {', '.join(ARCHITECTURES)}")
    family, _, name = target.partition(":")
    if family != "cuda" or (name and name not in card_names()):
        known = ", ".join(f"cuda:{known}" for known in card_names())
        raise ValueError(f"unknown target {target!r} to export for; the targets are cuda, {known}")
    if name:
        return card(name)
    if not archs:
        raise ValueError(f"give an architecture, such as arch='sm_90' (one of {', '.join(ARCHITECTURES)}), or a card")
    wanted = int(archs[0].removeprefix("sm_"))
    older = [known for known in map(card, card_names()) if int(known.arch.removeprefix("sm_")) <= wanted]
    newest = max(older, key=lambda known: int(known.arch.removeprefix("sm_")))  # the first of these
    return newest if newest.arch == archs[0] else replace(newest, arch=archs[0], measured=False)


def _program(
    model: str | os.PathLike[str] | torch.export.ExportedProgram | nn.Module, inputs: Sequence[Any] | None
) -> tuple[torch.export.ExportedProgram, str]:
    """The model as a program with example inputs, and what it is called."""
    if isinstance(model, nn.Module):
        if inputs is None:
            raise ValueError("a module is exported with example inputs: give them as the second argument")
        with torch.no_grad():
            return torch.export.export(model, tuple(inputs)), type(model).__name__
    if inputs is not None:
        raise ValueError("a program of torch.export has its own example inputs; leave the inputs out")
    title = "the program"
    if not isinstance(model, torch.export.ExportedProgram):
        path = Path(model)
        if path.suffix != ".pt2":
            raise ValueError(f"packages for cards are made of programs of torch.export (.pt2), given {path.name}")
        model, title = load_program(path), path.name
    if model.example_inputs is None:
        raise ValueError(f"{title} has no example inputs; export it again with torch.export.export(model, inputs)")
    return model, title


def _layers(program: torch.export.ExportedProgram, target: CudaTarget, options: Options) -> tuple[list[Layer], Report]:
    """The sites that become launches, with what a run of the model gives them, and the choices for all sites.

    Raises:
        ValueError: there is no such site, or an output is not finite.
    """
    graph_module = program.module()
    assert isinstance(graph_module, fx.GraphModule)
    for node in graph_module.graph.nodes:  # names of modules begin with the model, as those of Dynamo do
        stack = node.meta.get("nn_module_stack", {})
        node.meta["nn_module_stack"] = {key: (f"self.{path}", kind) for key, (path, kind) in stack.items()}
    flat = pytree.tree_leaves(program.example_inputs)
    analysis = analyse(graph_module, flat, options, target, DebugFolder(), DryRun())
    plan = Plan(target.name)
    report = Report(plan, target.description, analysis.reasons)
    found: dict[str, tuple[LinearSite, CudaKernel]] = {}
    for planned in analysis.sites:
        site, choice = planned.site, planned.choice
        if not choice.chosen.is_dense and isinstance(site, LinearSite):
            kernel = own.kernel_of(choice.chosen, site.dtype)
            if (reason := _unfit(analysis.graph, site, kernel)) is not None or kernel is None:
                choice = replace(choice, chosen=DENSE, reason=f"dense: {reason}")
            else:
                found[site.anchor] = site, kernel
        plan.add([choice])
    if not found:
        raise ValueError(f"no layer gets a sparse kernel on {target.name}{_reasons(list(plan))}")
    recorder = _Recorder(graph_module, [site for site, _ in found.values()])
    with torch.no_grad():
        recorder.run(*flat, enable_io_processing=False)
    layers = []
    for anchor, (site, kernel) in found.items():
        x, y = recorder.values[anchor]
        if not y.isfinite().all():
            raise ValueError(
                f"the output of {site.name} is not finite for these inputs, so that nothing can be checked"
            )
        weight = (site.weight.t() if site.transposed else site.weight).detach().cpu().contiguous()
        bias = None if site.bias is None else analysis.graph.operation(site.bias).attrs["value"].detach().cpu()
        layers.append(Layer(site.name, kernel, weight, bias, x, y))
    return layers, report


def _unfit(graph: SparseGraph, site: LinearSite, kernel: CudaKernel | None) -> str | None:
    """Why a site is no launch of a kernel, None if it is one."""
    if kernel is None:
        return f"there is no kernel of its type {site.dtype}"
    if site.residual is not None:
        return "an addition of another value is part of its operation"
    if site.bias is not None and "value" not in graph.operation(site.bias).attrs:
        return "its bias is computed at each call"
    return None


def _reasons(choices: Sequence[SiteChoice]) -> str:
    if not choices:
        return ": the model has no linear with a constant weight"
    shown = "; ".join(f"{choice.name} is {choice.reason}" for choice in choices[:_SHOWN])
    more = f"; and {len(choices) - _SHOWN} more" if len(choices) > _SHOWN else ""
    return f": {shown}{more}. Prune them to patterns that its kernels gain from, or give a plan"


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what goes into some sites and what comes out of them.

    Attributes:
        values: by the anchor of a site, x `[tokens, inputs]` and y `[tokens, outputs]`, on the CPU.
    """

    def __init__(self, module: fx.GraphModule, sites: Sequence[LinearSite]) -> None:
        super().__init__(module)
        nodes = {node.name: node for node in module.graph.nodes}
        self._x_of = {nodes[site.anchor]: nodes[site.x] for site in sites}
        self.values: dict[str, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._x_of:
            return super().run_node(n)
        x = _rows(self.env[self._x_of[n]])  # before an operation that follows may change it
        result = super().run_node(n)
        self.values[n.name] = x, _rows(result)
        return result


def _rows(value: Tensor) -> Tensor:
    return value.detach().reshape(-1, value.shape[-1]).cpu().clone()


def _remove_others(output: Path, files: Collection[str]) -> None:
    """Remove the kernels and cubins that an export before left."""
    for folder, suffixes in (("kernels", (".cu", ".cuh")), ("cubins", (".cubin",))):
        for path in (output / folder).rglob("*"):
            if path.suffix in suffixes and path.relative_to(output).as_posix() not in files:
                path.unlink()
