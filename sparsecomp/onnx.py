"""Sparse ONNX models: `inspect` says what a model would gain, `optimize` writes one that runs in ONNX Runtime.

For a dense model `plan` and `prune` do what `sparsecomp.plan` and `sparsecomp.sparsify_` do for a module; `optimize`
does both under a budget.

The written model gives the same numbers everywhere: what is sparse is an operation of the domain `ai.sparsecomp` with a
function of standard operations beside it. Where the library that is written with it is registered, its kernels run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from sparsecomp.frontends.onnx import build
from sparsecomp.frontends.onnx_apply import Replacement, apply
from sparsecomp.frontends.onnx_fallback import OLDEST_OPSET, Variant
from sparsecomp.frontends.onnx_half import widen
from sparsecomp.frontends.onnx_left import reshape_left
from sparsecomp.frontends.onnx_load import load
from sparsecomp.frontends.onnx_module import OnnxModule, why_not
from sparsecomp.frontends.onnx_norm import fold_norm
from sparsecomp.frontends.onnx_shapes import infer
from sparsecomp.frontends.onnx_shrink import Shrunk, remove_channels, remove_heads
from sparsecomp.frontends.onnx_skip import Skipped, skip_blocks
from sparsecomp.ir import ConvSite, LinearSite
from sparsecomp.onnx_choice import Planned, found_sites, plan_sites
from sparsecomp.onnx_planning import Calibration, Wish, choose_patterns, read_calibration, with_budget
from sparsecomp.options import Options
from sparsecomp.passes import DetectConv, DetectLinear, FuseEpilogue, run_passes
from sparsecomp.patterns import Pattern
from sparsecomp.planner import Plan
from sparsecomp.planner.budget import Budget
from sparsecomp.planner.skips import SkipForm
from sparsecomp.pruning.criterion import criterion_named
from sparsecomp.pruning.sparsify import Refine, sparsify_
from sparsecomp.report import Report
from sparsecomp.runtime.ort_library import OrtForm, OrtOperation
from sparsecomp.runtime.ort_library import build as build_library
from sparsecomp.targets.base import Target
from sparsecomp.window import Maps, Window

if TYPE_CHECKING:
    from sparsecomp.runtime.ort_timing import Timing
    from sparsecomp.targets.cpu.level import Level
    from sparsecomp.targets.x86.ort_target import LibraryTarget

Source: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | ir.Model"
"""What a model may be given as."""

PLAN_KEY = "ai.sparsecomp.plan"
"""Key of the plan in the metadata of a written model."""
_WIDENED = "float16 is computed in float32, as ONNX Runtime does on x86"
_EXTERNAL_ABOVE = 1_500_000_000
"""Bytes of constants from which on they go to a file beside the model: protobuf ends at 2 GB."""


def inspect(
    model: Source,
    *,
    options: Options | Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Report:
    """Say what every site of a model would become, at which predicted times and why; nothing is written.

    Args:
        model: path of a model, or one in memory; it is not changed.
        options: as for `torch.compile`: `target`, `plan`, `patterns`, `exclude`.
        shapes: sizes of inputs by name that the times are for; what the model leaves open is 1 first, then 128, and 224
            from the third dimension of an image on.

    Raises:
        ValueError: the model is not valid, or an option is bad.
        FileNotFoundError: there is no such file.
    """
    parsed, target = _options(options)
    loaded = load(model)
    widened = widen(loaded)
    reshape_left(loaded, shapes)
    report = _report(loaded, plan_sites(loaded, parsed, target, shapes), target)
    report.notes += [_WIDENED] if widened else []
    return report


def optimize(
    model: Source,
    output: str | os.PathLike[str],
    *,
    options: Options | Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    max_quality_loss: float | None = None,
    max_latency: float | str | None = None,
    speedup: float | None = None,
    calibration: Calibration | None = None,
    criterion: str | None = None,
    skip: str | None = None,
    progress: bool | None = None,
) -> Report:
    """Write a model whose sparse sites run in kernels of their own, and the library with these beside it.

    A model without zeros is pruned first where a budget is given, or a plan that says what to prune to: each layer to
    the pattern that a knapsack chooses for the budget (see `sparsecomp.plan`).

    Args:
        model: path of a model, or one in memory; it is not changed.
        output: path of the model to write, such as `model.sparse.onnx`; the library is `model.sparse.so`. There is none
            where every site stays dense.
        options: as in `inspect`.
        shapes: as in `inspect`; the written model runs with others too. With calibration those of one sample.
        max_quality_loss: loss that the pruned model may have at most: the Kullback-Leibler divergence in nats per
            position where an output is called `logits`, else 1 - mean cosine of the vectors of the first output.
        max_latency: of one call, such as `"8 ms"`, or a number of seconds.
        speedup: over the dense model in ONNX Runtime, at least.
        calibration: samples of the inputs, as arrays by name or the path of an .npz file, along a first axis.
        criterion: `"magnitude"`, `"wanda"`, `"ria"` or `"sparsegpt"`, by which is pruned; the last with calibration,
            else the first.
        skip: `"block:T"`: an FFN block is not computed in a call where the one before it turned the stream little, by a
            cosine above T for every token; which blocks, the calibration says.
        progress: whether to show a progress bar while a plan is made; None: on a terminal.

    Returns:
        What was chosen for every site; its plan has the budget, and what the pruning loses.

    Raises:
        ValueError: the model is not valid, an option or the calibration is bad, or a budget cannot be reached; nothing
            is written.
        FileNotFoundError: there is no such file.
        BuildError: the library could not be built here; nothing is written.
    """
    from sparsecomp.targets.x86 import ort

    parsed, target = _options(options)
    level = target.level
    given = load(model)
    loaded = given.clone()
    widened = widen(loaded)
    budget = _budget(max_quality_loss, max_latency, speedup)
    wish = _wish(loaded, budget, calibration, criterion)
    shapes = wish.shapes if shapes is None else shapes
    skipped = [] if skip is None else _skip(loaded, skip, wish.calibration, shapes)
    lefts = reshape_left(loaded, shapes)
    planned = plan_sites(loaded, parsed, target, shapes)
    chosen_under = None
    if budget is not None or (parsed.plan is not None and any(choice.prune for choice in parsed.plan)):
        chosen_under = _prune(loaded, planned, parsed, target, wish, progress)
        planned = plan_sites(loaded, parsed, target, shapes)
    report = _report(loaded, planned, target)
    report.notes += [str(block) for block in skipped] + ([_WIDENED] if widened else [])
    if chosen_under is not None:
        report.plan = with_budget(report.plan, chosen_under)
    chosen = [item for item in planned if not item.choice.chosen.is_dense]
    variants = apply(loaded, [_replacement(item, level) for item in chosen])
    for left in lefts:
        left.put_back()
    if not variants and not skipped and chosen_under is None:
        loaded = given
    loaded.metadata_props[PLAN_KEY] = report.plan.to_json()
    path = Path(output)
    if variants:
        calls: dict[Window | None, set[tuple[Maps, tuple[int, int], int, int]]] = {}
        for item in chosen:
            if isinstance(item.site, ConvSite):
                vectors = dict(item.choice.chosen.params)["vectors"]
                shape = (item.site.out_features, item.site.in_features)
                nonzeros = round(item.choice.density * shape[0] * shape[1])
                calls.setdefault(item.site.window, set()).add((item.site.maps, shape, nonzeros, vectors))
        operations = [_operation(variant, level, calls.get(variant.window, set())) for variant in variants]
        build_library(operations, ort.ort_target(level), library_of(path))
    _save(loaded, path)
    return report


def plan(
    model: Source,
    calibration: Calibration,
    *,
    options: Options | Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    max_quality_loss: float | None = None,
    max_latency: float | str | None = None,
    speedup: float | None = None,
    patterns: Iterable[str | Pattern] | None = None,
    criterion: str = "sparsegpt",
    progress: bool | None = None,
) -> Plan:
    """Choose a pattern for every layer of a dense model under one budget, as `sparsecomp.plan` does.

    Args:
        model: as in `inspect`.
        calibration: as in `optimize`.
        options: as in `inspect`; what `exclude` names stays dense.
        shapes: sizes of inputs by name that the latency is of; those of one sample if None.
        max_quality_loss: as in `optimize`.
        max_latency: as in `optimize`.
        speedup: as in `optimize`.
        patterns: what a layer may be pruned to, each with its share of zeros; `DEFAULT_PATTERNS` if None.
        criterion: that the model will be pruned by.
        progress: whether to show a progress bar; None: on a terminal.

    Returns:
        The plan: for `prune`, and for the option `plan` of `optimize`.

    Raises:
        ValueError: there is not exactly one budget or it cannot be reached, the model is not valid or has nothing to
            prune, or an option or the calibration is bad.
        FileNotFoundError: there is no such file.
    """
    parsed, target = _options(options)
    budget = Budget.of(max_quality_loss, max_latency, speedup)
    loaded = load(model)
    widen(loaded)
    wish = _wish(loaded, budget, calibration, criterion)
    shapes = wish.shapes if shapes is None else shapes
    reshape_left(loaded, shapes)
    planned = plan_sites(loaded, parsed, target, shapes)
    module = OnnxModule(loaded, [(item.overlay, item.site) for item in planned])
    return choose_patterns(module, [item.choice for item in planned], target, wish, patterns, progress)


def prune(
    model: Source,
    output: str | os.PathLike[str],
    pattern: str | Pattern | Plan,
    *,
    criterion: str | None = None,
    calibration: Calibration | None = None,
    refine: Refine | None = None,
    exclude: Sequence[str] = (),
    progress: bool | None = None,
) -> list[str]:
    """Write a model with pruned weights: its own operations, whose dense weights hold zeros, for any tool.

    A model in float16 is written with weights in float32. All layers are pruned from one look at the dense model.

    Args:
        model: as in `inspect`.
        output: path of the model to write.
        pattern: what to prune every layer to, such as `"2:4"`, or a plan with one for each.
        criterion: as in `optimize`.
        calibration: as in `optimize`; only `"magnitude"` needs none.
        refine: `"dsnot"` exchanges entries of the chosen masks.
        exclude: regular expressions; layers whose name one of them matches anywhere stay as they are.
        progress: whether to show a progress bar; None: on a terminal.

    Returns:
        Names of the layers that were pruned.

    Raises:
        ValueError: the model is not valid or no layer can be pruned, or the pattern, the plan, the criterion or the
            calibration is bad; nothing is written.
        FileNotFoundError: there is no such file.
    """
    rules = Options.parse({"exclude": exclude})
    loaded = load(model)
    widen(loaded)
    wish = _wish(loaded, None, calibration, criterion)
    known = loaded.opset_imports.get("", OLDEST_OPSET) >= OLDEST_OPSET
    sites = [*found_sites(build(loaded, infer(loaded, wish.shapes)))] if known else []
    module = OnnxModule(loaded, [(overlay, site) for overlay, site, _ in sites])
    if not any(module.children()):
        reasons = (f": {site.name!r} cannot, since {why_not(loaded, overlay, site)}" for overlay, site, _ in sites)
        raise ValueError(f"the model has no layer that can be pruned{next(reasons, '')}")
    names = sparsify_(
        module,
        pattern,
        criterion=wish.criterion,
        calibration=wish.calibration or None,
        refine=refine,
        filter_fn=None if isinstance(pattern, Plan) else lambda _, name: rules.excluding(name) is None,
        progress=progress,
    )
    module.write_to(loaded)
    _save(loaded, Path(output))
    return names


def _budget(max_quality_loss: float | None, max_latency: float | str | None, speedup: float | None) -> Budget | None:
    if max_quality_loss is max_latency is speedup is None:
        return None
    return Budget.of(max_quality_loss, max_latency, speedup)


def _wish(model: ir.Model, budget: Budget | None, calibration: Calibration | None, criterion: str | None) -> Wish:
    if calibration is None:
        if budget is not None:
            raise ValueError(f"a {budget} needs calibration: samples of the inputs, as arrays or an .npz file of them")
        return Wish(budget, criterion_named(criterion or "magnitude").name, [])
    inputs = {
        value.name or "": [size if isinstance(size, int) else None for size in value.shape or ()]
        for value in model.graph.inputs
        if value.name not in model.graph.initializers
    }
    return Wish(budget, criterion_named(criterion or "sparsegpt").name, read_calibration(calibration, inputs))


def _prune(
    model: ir.Model,
    planned: list[Planned],
    options: Options,
    target: LibraryTarget,
    wish: Wish,
    progress: bool | None,
) -> Plan:
    """Prune a model, in place, to the plan that is given or chosen."""
    module = OnnxModule(model, [(item.overlay, item.site) for item in planned])
    if wish.budget is not None:
        chosen = choose_patterns(module, [item.choice for item in planned], target, wish, None, progress)
    else:
        assert options.plan is not None
        chosen = options.plan
    sparsify_(module, chosen, criterion=wish.criterion, calibration=wish.calibration or None, progress=progress)
    module.write_to(model)
    return chosen


def _skip(
    model: ir.Model,
    form: str,
    batches: list[dict[str, Tensor]],
    shapes: Mapping[str, Sequence[int]] | None,
) -> list[Skipped]:
    if not batches:
        raise ValueError(f"skip={form!r} needs calibration: samples of the inputs, as arrays or an .npz file of them")
    return skip_blocks(model, build(model, infer(model, shapes))[0], SkipForm.parse(form), batches)


def shrink(
    model: Source,
    output: str | os.PathLike[str],
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    skip: str | None = None,
    calibration: Calibration | None = None,
) -> list[Shrunk | Skipped]:
    """Write a model of standard operations alone, without the hidden units and channels that do nothing.

    What is removed is between two linears or two convolutions: a unit whose weights behind it, or before it, are all
    zero. The result is a smaller dense model for any run time.

    Args:
        model: path of a model, or one in memory; it is not changed.
        output: path of the model to write.
        shapes: sizes of inputs by name, as in `inspect`.
        skip: as in `optimize`.
        calibration: as in `optimize`, for `skip`.

    Returns:
        The layers that became smaller, and the blocks that may be skipped.

    Raises:
        ValueError: the model is not valid, or blocks cannot be skipped; nothing is written.
    """
    loaded = load(model)
    batches = _wish(loaded, None, calibration, None).calibration
    found: list[Shrunk | Skipped] = [] if skip is None else [*_skip(loaded, skip, batches, shapes)]
    if loaded.opset_imports.get("", OLDEST_OPSET) >= OLDEST_OPSET:
        overlays = build(loaded, infer(loaded, shapes))
        for overlay in overlays:
            run_passes(overlay.graph, [DetectLinear(), DetectConv(), FuseEpilogue()])
        found += remove_heads(loaded, overlays)
        found += remove_channels(loaded, infer(loaded, shapes))
    _save(loaded, Path(output))
    return found


def bench(
    model: str | os.PathLike[str],
    *,
    options: Options | Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    rounds: int = 30,
) -> list[Timing]:
    """Time a model in ONNX Runtime beside its optimised form, with the library and without, on random inputs.

    Sessions have as many threads as PyTorch. Where the model cannot be sparse anywhere, only the original is timed.

    Args:
        model: path of a model.
        options: as in `inspect`.
        shapes: as in `inspect`.
        rounds: calls of each that are timed, in turn.

    Returns:
        The original first.

    Raises:
        ValueError: the model is not valid, an option is bad, or an input has no obvious random value.
        BuildError: the library could not be built here.
    """
    from sparsecomp.runtime.ort_timing import compare

    with tempfile.TemporaryDirectory(prefix="sparsecomp.") as folder:
        output = Path(folder) / "model.onnx"
        report = optimize(model, output, options=options, shapes=shapes)
        models: dict[str, tuple[Path, Path | None]] = {"original": (Path(model), None)}
        if report.rewritten:
            models["optimised, without the library"] = (output, None)
            models["optimised, with the library"] = (output, library_of(output))
        return compare(models, infer(load(model), shapes).inputs, torch.get_num_threads(), rounds)


def library_of(output: str | os.PathLike[str]) -> Path:
    """The path of the library that `optimize` writes for a path of a model."""
    return Path(output).with_suffix(".so")


def _options(options: Options | Mapping[str, Any] | None) -> tuple[Options, LibraryTarget]:
    from sparsecomp.targets.x86.ort_target import LibraryTarget

    parsed = Options.parse(options)
    return parsed, LibraryTarget(parsed.resolve_target())


def _replacement(item: Planned, level: Level) -> Replacement:
    from sparsecomp.targets.x86 import ort

    site, candidate = item.site, item.choice.chosen
    if isinstance(site, LinearSite):
        matrix, forms = site.weight.t() if site.transposed else site.weight, item.forms
        assert forms is not None
        shared = (site.weight_op, site.transposed, forms)
        return Replacement(item.overlay, site, matrix, shared, lambda weight: ort.pack(level, forms, weight))
    window = site.window
    assert window is not None
    weight, bias = fold_norm(item.overlay, site)
    key = (site.weight_op, window.groups, candidate, site.norm)
    return Replacement(
        item.overlay, site, weight, key, lambda weight: ort.pack_conv(level, candidate, weight, window), bias
    )


def _operation(
    variant: Variant, level: Level, calls: Collection[tuple[Maps, tuple[int, int], int, int]]
) -> OrtOperation:
    from sparsecomp.kernels.epilogue import Epilogue
    from sparsecomp.targets.x86 import ort

    epilogue = Epilogue(variant.activation, variant.residual, variant.residual_first)
    opening = None
    if variant.window is None:
        forms = tuple(OrtForm(f.family, f.v, ort.kernels(level, f.family, f.v, epilogue)) for f in variant.forms)
    else:
        kernels, opening = ort.conv_kernels(level, variant.window, epilogue, calls)
        forms = (OrtForm("conv", 1, kernels),)
    return OrtOperation(
        name=variant.name,
        forms=forms,
        bias=variant.bias,
        residual=variant.residual,
        indexed=variant.indexed,
        lanes=level.lanes,
        window=variant.window,
        rank=variant.rank,
        opening=opening,
    )


def _save(model: ir.Model, path: Path) -> None:
    size = sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )
    if size > _EXTERNAL_ABOVE:
        ir.save(model, path, external_data=f"{path.name}.data")
    else:
        ir.save(model, path)


def _report(model: ir.Model, planned: list[Planned], target: Target) -> Report:
    plan = Plan(target.name, threads=torch.get_num_threads())
    plan.add(item.choice for item in planned)
    opset = model.opset_imports.get("", OLDEST_OPSET)
    notes = []
    if opset < OLDEST_OPSET:
        notes.append(f"the model uses opset {opset}; from {OLDEST_OPSET} on sites are looked for: export it anew")
    return Report(plan, target.description, notes)
