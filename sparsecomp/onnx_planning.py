"""Pruning of ONNX models: which pattern every layer should be pruned to under a budget, and the pruning itself.

It is that of modules (`sparsecomp.planning`, `sparsecomp.pruning`), with latencies of ONNX Runtime.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecomp.frontends.onnx_module import OnnxModule
from sparsecomp.log import log
from sparsecomp.patterns import Pattern
from sparsecomp.planner import Plan
from sparsecomp.planner.budget import Budget, Summary
from sparsecomp.planner.plan import SiteChoice
from sparsecomp.planner.pricing import Pricer, scaled
from sparsecomp.planner.select import module_name
from sparsecomp.planning import Priced, as_patterns, under_budget
from sparsecomp.pruning.calibration import as_calls
from sparsecomp.pruning.criterion import criterion_named
from sparsecomp.pruning.sites import choose_sites
from sparsecomp.runtime.ort_timing import product_call
from sparsecomp.targets.base import DENSE, Problem, Target, WeightFacts
from sparsecomp.targets.cpu.timing import median_seconds

Calibration = Mapping[str, Any] | str | os.PathLike[str]
"""Samples by the names of the inputs, stacked along a first axis; or the path of an .npz file of such arrays."""

_SECONDS = 2.0
_MOST_SAMPLES = 4096


@dataclass(frozen=True)
class Wish:
    """How a model is to be pruned.

    Attributes:
        budget: for which patterns are chosen; None where a plan says them.
        criterion: of pruning.
        calibration: batches of inputs by name; empty if nothing was given.
    """

    budget: Budget | None
    criterion: str
    calibration: list[dict[str, Tensor]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Sizes of the inputs of one batch by name; None if nothing was given."""
        return {name: tuple(value.shape) for name, value in self.calibration[0].items()} if self.calibration else None


def read_calibration(given: Calibration, inputs: Mapping[str, Sequence[int | None]]) -> list[dict[str, Tensor]]:
    """Batches of a model's inputs, one for every sample, or for as many samples as a fixed first dimension takes.

    Args:
        given: the samples.
        inputs: sizes of the model's inputs by name, None for those that it leaves open.

    Raises:
        ValueError: an input is missing or unknown, the numbers of samples differ, or a shape is not what the model
            takes.
        FileNotFoundError: there is no such file.
    """
    arrays = dict(given) if isinstance(given, Mapping) else _read_npz(given)
    if set(arrays) != set(inputs):
        raise ValueError(
            f"the calibration holds {_names(arrays)}, but the model's inputs are {_names(inputs)}: give each of them, "
            "with its samples along the first axis"
        )
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    for name, sizes in inputs.items():
        shape = arrays[name].shape
        fits = len(shape) == len(sizes) and len(shape) > 0
        if not fits or any(size not in (None, have) for size, have in zip(sizes[1:], shape[1:], strict=True)):
            wanted = ["samples", *("any" if size is None else size for size in sizes[1:])]
            raise ValueError(f"calibration of {name!r} has shape {list(shape)}, expected {wanted}")
    counts = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"the inputs have different numbers of samples: {counts}")
    samples = min(next(iter(counts.values())), _MOST_SAMPLES)
    fixed = {sizes[0] for sizes in inputs.values() if sizes[0] is not None}
    together = max(fixed, default=1)
    if len(fixed) > 1 or samples < together:
        raise ValueError(f"the model takes {sorted(fixed)} samples at once, and the calibration holds {samples}")
    return [
        {name: torch.from_numpy(np.ascontiguousarray(array[at : at + together])) for name, array in arrays.items()}
        for at in range(0, samples - together + 1, together)
    ]


def _read_npz(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not a file; give the path of an .npz file with the inputs") from None
    except Exception as error:  # whatever a parser raises for what is no such file
        raise ValueError(f"{path} is no .npz file of arrays: {error}") from error


def _names(items: Iterable[str]) -> str:
    return ", ".join(map(repr, items)) or "nothing"


def choose_patterns(
    module: OnnxModule,
    choices: Sequence[SiteChoice],
    target: Target,
    wish: Wish,
    patterns: Iterable[str | Pattern] | None,
    progress: bool | None,
) -> Plan:
    """A plan under the budget of a wish.

    Args:
        module: the dense model; not changed.
        choices: of its sites as they are, whose predicted costs count.
        target: prices the sites.
        wish: with a budget and calibration.
        patterns: what a layer may be pruned to; `DEFAULT_PATTERNS` if None.
        progress: whether to show a progress bar; None: on a terminal.

    Raises:
        ValueError: the budget cannot be reached, or nothing of the model can be pruned or become faster.
    """
    assert wish.budget is not None
    batches = as_calls(wish.calibration)
    prunable = {site.name: site for site in choose_sites(module, None)} if any(module.children()) else {}
    entries = [choice for choice in choices if module_name(choice) in prunable and not choice.declined]
    if not entries:
        raise ValueError("the model has no layer that could be pruned and run by a sparse kernel: see inspect")
    wanted = as_patterns(patterns, prunable.values())

    def price() -> Priced:
        pricer = Pricer(target, autotune=False)
        scale = _scale(entries, target)
        dense_us = _dense_us(module, batches[0].kwargs)
        plan = Plan(target.name, threads=torch.get_num_threads())
        plan.sites = [scaled(choice, scale) if choice in entries else choice for choice in choices]
        inside = sum(choice.dense_us or 0.0 for choice in plan.sites if module_name(choice) in prunable)
        log.info("plan: dense model %.0f us, of which its %d sites %.0f us", dense_us, len(entries), inside)
        plan.summary = Summary(dense_us, max(0.0, dense_us - inside), dense_us, "", 0.0)
        return Priced(plan, {name: prunable[name] for name in map(module_name, entries)}, pricer, scale)

    rule = criterion_named(wish.criterion)
    return under_budget(module, batches, price, wanted, wish.budget, criterion=rule, quality=None, progress=progress)


def _dense_us(module: OnnxModule, feeds: Mapping[str, Tensor]) -> float:
    """Median microseconds of a call of the model as it is, its weights constant."""
    session = module.dense_session()
    given = {value.name: feeds[value.name].numpy() for value in session.get_inputs()}
    return 1e6 * median_seconds(lambda: session.run(None, given), _SECONDS)


def _scale(entries: Sequence[SiteChoice], target: Target) -> float:
    """Microseconds of ONNX Runtime's dense products as measured now over those predicted, all linears together.

    The clock may differ from that of the calibration, which changes all costs alike. Each is measured by itself, and so
    is what is predicted here: the caches are for it alone.
    """
    from sparsecomp.targets.x86.ort_target import LibraryTarget

    alone, threads = LibraryTarget(target), torch.get_num_threads()
    products = Counter((entry.shape, entry.tokens) for entry in entries if entry.maps is None and entry.tokens)
    measured = predicted = 0.0
    for (shape, tokens), count in products.items():
        facts = WeightFacts.assumed(*shape, Pattern.parse("dense"))
        measured += count * _product_us(shape, tokens)
        predicted += count * alone.predict(DENSE, Problem(facts, tokens, threads))
    return measured / predicted if predicted else 1.0


def _product_us(shape: tuple[int, int], tokens: int) -> float:
    weight, x = np.ones(shape, np.float32), np.ones((tokens, shape[1]), np.float32)
    return 1e6 * median_seconds(product_call(weight, x, torch.get_num_threads()))


def with_budget(plan: Plan, chosen: Plan) -> Plan:
    """The plan of a pruned model with what is known of its pruning."""
    pruned = {module_name(choice): choice for choice in chosen}
    sites = []
    for choice in plan:
        of = pruned.get(module_name(choice))
        sites.append(choice if of is None else replace(choice, prune=of.prune, options=of.options))
    return replace(plan, sites=sites, budget=chosen.budget, summary=chosen.summary)
