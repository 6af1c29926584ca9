"""Pruning of a model in place: dense tensors that hold zeros, which any other tool can take over.

A call completes or changes nothing: what can be checked is checked before the first weight changes, and the originals
of what has changed are kept until the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from sparsecomp.experts import experts_apart
from sparsecomp.log import log
from sparsecomp.patterns import Pattern
from sparsecomp.planner.plan import Plan
from sparsecomp.pruning.batchnorm import FollowingNorms, batchnorms
from sparsecomp.pruning.calibration import Call, Part, Stream, as_calls, calibrating, find_blocks
from sparsecomp.pruning.criterion import Criterion, Pruned, criterion_named
from sparsecomp.pruning.dsnot import dsnot
from sparsecomp.pruning.reconstruct import Reconstruction, reconstruct_block
from sparsecomp.pruning.sites import FilterFn, Site, choose_sites
from sparsecomp.pruning.statistics import Statistics, collect, stages

Refine = Literal["dsnot"]


def sparsify_(
    model: nn.Module,
    pattern: str | Pattern | Plan,
    *,
    criterion: str = "magnitude",
    calibration: Iterable[Any] | None = None,
    refine: Refine | None = None,
    reconstruct: bool | Reconstruction = False,
    filter_fn: FilterFn | None = None,
    progress: bool | None = None,
) -> list[str]:
    """Prune the weights of a model in place.

    Wanda, RIA and DSnoT look at the inputs of all layers in one pass of the dense model. SparseGPT and reconstruction
    go block by block, and SparseGPT inside a block layer by layer, so that every layer makes up for what those before
    it changed; what lies outside of the blocks, or all of a model without repeated blocks, is looked at once.

    A weight that several modules share is pruned once, also where the other module is no linear (a tied embedding
    changes too: leave its head out with `filter_fn` if that is not wanted). Gradients, hooks and the `requires_grad` of
    the parameters stay; their version counters advance, so a compiled model notices.

    Args:
        model: any module; its `nn.Linear` modules are pruned (the model itself, if it is one), and the experts of
            mixtures that transformers keeps in one weight, as the linears that `split_experts_` would make of them.
        pattern: what to prune to, such as `"unstructured@0.8"`, `"2:4"`, `"32:2:4"`, `"16x1@0.5"` or `"16:taps:4:9"`;
            `"dense"` drops nothing. A plan prunes every site to the pattern that it has for it.
        criterion: `"magnitude"`, `"wanda"`, `"ria"` or `"sparsegpt"`; all but the first need calibration.
        calibration: batches of model inputs, each a tensor, a tuple of arguments or a dict of keyword arguments (such
            as a tokenizer gives; without padding, since padding counts as input). It is read once, into memory. The
            statistics of batch norms follow the weights on it.
        refine: `"dsnot"` exchanges entries of the chosen mask; needs calibration.
        reconstruct: tune the kept weights of each block to give the dense block's output; needs calibration and a model
            with repeated blocks. `Reconstruction(...)` sets how long.
        filter_fn: `(module, qualified_name) -> bool`, called for every module that can be pruned; all of them if None.
        progress: whether to show a progress bar where it goes block by block; None: on a terminal.

    Returns:
        Qualified names of the modules whose weights were pruned, in the order of `model.named_modules()`; a shared
        weight gives every accepted module that holds it, the empty name is the model itself. Empty for `"dense"`.

    Raises:
        ValueError: the pattern is wrong or has no share, the plan names a site that the model does not have, no module
            can be pruned, `filter_fn` rejects all of them, a weight cannot be pruned, calibration is needed and missing
            or holds no batch, does not reach a site, or gives it NaN or infinity. The model is then as it was, as after
            any other exception.
    """
    rule = criterion_named(criterion)
    if refine not in (None, "dsnot"):
        raise ValueError(f"refine={refine!r} is not known: expected 'dsnot' or None")
    settings = Reconstruction() if reconstruct is True else reconstruct or None
    wants = {f"criterion={criterion!r}": rule.needs != "nothing", "refine": refine, "reconstruct": settings}
    reasons = [name for name, wanted in wants.items() if wanted]
    if reasons and calibration is None:
        raise ValueError(f"{reasons[0]} needs calibration: give batches of model inputs as calibration=[...]")
    with experts_apart(model):
        sites = choose_sites(model, filter_fn)
        patterns = _patterns(pattern, sites)
        sites = [site for site in sites if id(site.weight) in patterns]
        calls = [] if calibration is None else as_calls(calibration)
        if not sites:
            return []
        job = _Job(model, patterns, rule, refine, settings)
        try:
            with torch.no_grad():
                norms = FollowingNorms(model, calls) if calls else None
                job.run(sites, calls, progress)
                if norms is not None:
                    for norm in batchnorms(model).values():
                        job.undo.keep(*norm.buffers())
                    norms.move(but=job.settled)
        except BaseException:
            job.undo.restore()
            raise
        return [site.name for site in sites]


def _patterns(pattern: str | Pattern | Plan, sites: Sequence[Site]) -> dict[int, Pattern]:
    """The pattern of every weight that is to be pruned, by its `id`."""
    if not isinstance(pattern, Plan):
        pattern = Pattern.parse(pattern)
        if pattern.kind in ("unstructured", "block") and pattern.sparsity is None:
            raise ValueError(
                f"pattern '{pattern}' does not say how much to prune: give the share of zeros, such as '{pattern}@0.8'"
            )
        for site in sites:
            if not site.takes(pattern):
                raise ValueError(f"{_not_taken(pattern, site)}: choose the modules with filter_fn")
        return {} if pattern.kind == "dense" else {id(site.weight): pattern for site in sites}
    by_name = {site.name: site for site in sites}
    result: dict[int, Pattern] = {}
    for choice in pattern:
        if not choice.prune:
            continue
        name = choice.name.partition("#")[0]  # the suffix counts the calls of one module
        if name not in by_name:
            raise ValueError(
                f"the plan prunes {choice.name!r} to {choice.prune}, but the model has no such module to prune (or "
                "filter_fn rejects it): make the plan for this model"
            )
        wanted = Pattern.parse(choice.prune)
        if not by_name[name].takes(wanted):
            raise ValueError(f"{_not_taken(wanted, by_name[name])}: make the plan for this model")
        if result.setdefault(id(by_name[name].weight), wanted) != wanted:
            raise ValueError(f"the plan has two patterns for the weight of {choice.name!r}, one of them {wanted}")
    return result


def _not_taken(pattern: Pattern, site: Site) -> str:
    return (
        f"pattern '{pattern}' is for convolutions whose kernels have {pattern.m} taps; {site.where} has a weight of "
        f"shape {list(site.weight.shape)}"
    )


class _Undo:
    """The tensors that changed, and what they held before."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            if id(tensor) not in self._before:
                self._before[id(tensor)] = (tensor, tensor.detach().clone())

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, before in self._before.values():
                tensor.copy_(before)


class _Job:
    """One call of `sparsify_`, after its arguments were checked."""

    def __init__(
        self,
        model: nn.Module,
        patterns: dict[int, Pattern],
        rule: Criterion,
        refine: Refine | None,
        settings: Reconstruction | None,
    ) -> None:
        self.undo = _Undo()
        # Batch norms of reconstructed blocks, whose weights were tuned to their statistics.
        self.settled: set[nn.Module] = set()
        self._model = model
        self._patterns = patterns
        self._rule = rule
        self._refine = refine
        self._settings = settings
        self._masks: dict[int, Tensor] = {}
        self._known: dict[int, Statistics] = {}
        self._inside: set[Site] = set()

    def run(self, sites: Sequence[Site], calls: list[Call], progress: bool | None) -> None:
        """Prune all sites with what the calls tell."""
        if self._rule.needs != "gram" and (self._rule.needs == "norms" or self._refine is not None):
            # Without an update nothing makes up for earlier errors, and the dense model's inputs serve better than
            # those of the pruned one (MiniLM by Wanda to 2:4: 0.716 against 0.697): one pass gives all.
            with calibrating(self._model):
                _, once = stages(self._model, calls[0], sites)
                self._known = collect(self._model, calls, sites, gram=False, once=once)
        if self._rule.needs != "gram" and self._settings is None:
            self.prune(sites, self._known)
            return
        blocks = find_blocks(self._model)
        modules = {id(module) for _, block in blocks for module in block.modules()}
        self._inside = {site for site in sites if id(site.module) in modules}
        if not self._inside or (self._settings is None and batchnorms(self._model)):
            # With batch norms, whose statistics follow when all is pruned, the inputs of the dense model serve better
            # than those behind pruned blocks (EfficientNet-Lite0 at 70 %: cosine of the logits 0.30 against 0.26).
            blocks = []
        if self._settings is not None and not blocks:
            raise ValueError(
                "reconstruct needs sites in repeated blocks (a list of modules of one type): there are none"
            )
        left = list(sites)
        console = Console(stderr=True)
        hide = not (console.is_terminal if progress is None else progress)
        with Progress(console=console, disable=hide) as bar, calibrating(self._model):
            task = bar.add_task(f"pruning by {self._rule.name}", total=len(sites))
            stream = Stream(
                self._model, calls, blocks, targets=self._settings is not None, whole=len(self._inside) < len(sites)
            )
            for part in stream:
                modules = {id(module) for module in part.module.modules()}
                own = [site for site in left if id(site.module) in modules]
                left = [site for site in left if id(site.module) not in modules]
                if own:
                    self._prune_part(part, own)
                bar.advance(task, len(own))
                if not left:
                    break

    def _prune_part(self, part: Part, sites: Sequence[Site]) -> None:
        # A site that shares its weight with one of an earlier part finds it pruned.
        sites = [site for site in sites if id(site.weight) not in self._masks]
        within = batchnorms(part.module) if part.targets is not None else {}
        norms = FollowingNorms(part.module, part.calls) if within else None
        if self._rule.needs != "gram":
            self.prune(sites, self._known)
        else:
            groups, once = stages(part.module, part.calls[0], sites)
            # The whole model is run once, whatever its depth.
            for group in groups if part.name else [sites]:
                self.prune(group, collect(part.module, part.calls, group, gram=True, once=once))
        if self._settings is None or not sites:
            return
        if part.targets is None:
            if any(site in self._inside for site in sites):
                raise ValueError(
                    "reconstruct needs blocks that can be run on their own: those of this model change their inputs in "
                    "place, or take objects that may change from call to call (a cache)"
                )
            log.warning("pruning: %d sites outside of the blocks are not reconstructed", len(sites))
            return
        self.undo.keep(*part.module.parameters())
        if norms is not None:
            self.undo.keep(*(buffer for norm in within.values() for buffer in norm.buffers()))
            norms.move()
            self.settled |= set(within.values())
        masks = {site.weight: self._masks[id(site.weight)] for site in sites}
        before, after = reconstruct_block(part.module, masks, part.calls, part.targets, settings=self._settings)
        log.info("pruning: reconstruction of %s: relative error %.4f, before %.4f", part.name, after, before)

    def prune(self, sites: Sequence[Site], known: dict[int, Statistics]) -> None:
        """Prune sites, all of which are judged before the first of them changes."""
        unique = {id(site.weight): site for site in sites}
        results = [(site, self._judge(site, known.get(key))) for key, site in unique.items()]
        for site, pruned in results:
            weight = site.weight
            keep = site.kind.from_matrix(pruned.mask, weight)
            self.undo.keep(weight)
            if pruned.weight is not None:
                weight.copy_(site.kind.from_matrix(pruned.weight, weight))
            else:
                weight.masked_fill_(~keep, 0)
            self._masks[id(weight)] = keep

    def _judge(self, site: Site, known: Statistics | None) -> Pruned:
        pattern = self._patterns[id(site.weight)]
        matrix = site.kind.to_matrix(site.weight)
        try:
            pruned = self._rule.prune(matrix, pattern, known)
            if self._refine is None or known is None:
                return pruned
            mask = dsnot(matrix, pruned.mask, pattern, known)
            updated = None if self._rule.update is None else self._rule.update(matrix, pattern, known, mask)
        except ValueError as error:
            raise ValueError(f"{site.where} cannot be pruned to {pattern}: {error}") from error
        return Pruned(mask, updated)
