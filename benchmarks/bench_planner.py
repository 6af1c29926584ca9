"""The planner under a budget: is its choice good, are its predictions right, and do its estimates rank as they should?

`python benchmarks/bench_planner.py [--model minilm,smollm2] [--part quality,speed,budgets,rank] [--quick]`: a part
replaces its own rows of `results/planner.json` and leaves the others.

- quality: at the predicted latency of every uniform pattern the plan's model, pruned, beside the best model that has
  one pattern everywhere and is predicted to be no slower. Both by SparseGPT, on the same calibration. Uniform patterns
  that another one clearly beats by the estimates, in latency and in loss, are not pruned; nor is the fastest, which no
  plan can differ from. On SmolLM2 a pruning takes ten minutes with all texts: `--windows 32` takes every few of them.
- speed: the predicted speed-up of plans along the front against the measured one, over Inductor on the dense model.
- budgets: 20 random quality budgets. The choice by predicted costs, against the choice that is best under the same
  budget when every option's kernel is measured: that one is the best of all combinations of the options, by the same
  exact solver. Once with the measured kernels summed up, once with both models compiled and timed in turn.
- allocation: at one share of zeros of the whole model by Wanda, the shares of its layers by the knapsack over the same
  estimates, with entries as the cost, against the same share everywhere. SmolLM2 only.
- rank: Spearman's correlation of the estimated losses of all pairs of layer and pattern with the measured losses of the
  model with that layer alone pruned, on texts that the planner did not see.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from bench_pruning import MODELS, models
from scipy.stats import spearmanr
from timing import RESULTS, Results, Row, Timings, interleave
from torch import Tensor, nn

import sparsecomp
from sparsecomp import Pattern, Plan
from sparsecomp.planner.knapsack import Item, solve
from sparsecomp.planner.plan import SiteChoice
from sparsecomp.planner.quality import mean_loss
from sparsecomp.planner.select import fastest, groups_of, least_us
from sparsecomp.planner.sensitivity import Estimate, Wanted, estimate
from sparsecomp.planning import DEFAULT_PATTERNS
from sparsecomp.pruning.calibration import as_calls, calibrating
from sparsecomp.pruning.criterion import criterion_named
from sparsecomp.pruning.sites import Site, choose_sites
from sparsecomp.targets.base import DENSE

PARTS = ("quality", "speed", "budgets", "allocation", "rank")
TOKENS = 128  # of the call whose latency counts
BUDGETS = 20
MOST_RANKED = 40  # layers whose losses are measured one by one, evenly spread over the model
ALLOCATED = 0.6  # share of zeros
ALLOCATIONS = tuple(f"unstructured@{share / 100:.2f}" for share in range(40, 82, 5))
OWL = 132.0  # perplexity by the layer-wise ratios of Yin et al. 2023 (arXiv:2310.05175)
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the way from dense to the fastest options
CLEARLY = 1.2  # times the estimated loss, beyond what estimates err: no rival for the best uniform pattern

Estimates = dict[str, list[Estimate]]

NOTES = [
    "Calls of one text of 128 tokens; pruned by SparseGPT. Losses and scores are those of `bench_pruning.py`.",
    "quality: the goal is the score of the best uniform pattern that is predicted to be no slower. SmolLM2 with "
    "`--windows 24` (20 windows) and patterns `unstructured@0.5` to `0.8` and `2:4`; its latencies were taken beside "
    "other work, which stretches those of plan and pattern alike.",
    "budgets: measured cost of the planner's choice over that of the best of all combinations of its options.",
    "rank: all pairs of a linear layer of the blocks and a pattern, one pruned at a time, texts of `lee.cor`.",
]


class Subject:
    """A model with its plan."""

    def __init__(self, name: str, patterns: list[str], criterion: str, windows: int) -> None:
        self.base = MODELS[name]()
        self.name, self.patterns, self.criterion = self.base.name, patterns, criterion
        # Small batches: losses of single layers are measured on as many as hold a few hundred tokens.
        self.calibration = [row for batch in self.base.calibration for row in batch.split(4 if name == "minilm" else 1)]
        if windows:  # from all parts of the text
            self.calibration = self.calibration[:: -(-len(self.calibration) // windows)]
        self.inputs = self.calibration[0][:1, :TOKENS].contiguous()
        self._plans: dict[bool, Plan] = {}

    @property
    def model(self) -> nn.Module:
        """The dense model."""
        model: nn.Module = self.base.model
        return model

    def unseen(self) -> Tensor:
        """Texts that nothing was calibrated on, `[inputs, TOKENS]`."""
        tokenizer = (models.minilm if self.base.unit == "cosine" else models.smollm2)()[1]
        return models.windows(tokenizer, models.lee("lee"), TOKENS, most=8)

    def plan(self, *, measured: bool = False) -> Plan:
        """The plan with all options; nothing is chosen."""
        if measured not in self._plans:
            self._plans[measured] = sparsecomp.plan(
                self.model,
                self.calibration,
                speedup=1.0,
                patterns=self.patterns,
                criterion=self.criterion,
                inputs=self.inputs,
                filter_fn=self.base.prunes,
                autotune=measured,
            )
        return self._plans[measured]

    def pruned(self, pattern: str | Plan, criterion: str | None = None) -> nn.Module:
        """A pruned copy."""
        model = copy.deepcopy(self.model)
        sparsecomp.sparsify_(
            model,
            pattern,
            criterion=criterion or self.criterion,
            calibration=None if criterion == "magnitude" else self.calibration,
            filter_fn=self.base.prunes,
        )
        return model

    def better(self, one: float, other: float) -> bool:
        """Whether a score is better than another: cosines rise, perplexities fall."""
        return one > other if self.base.unit == "cosine" else one < other


def planned_us(plan: Plan) -> float:
    assert plan.summary is not None
    return plan.summary.planned_us


@dataclass(frozen=True)
class Uniform:
    """One pattern everywhere; a layer that it does not make faster runs dense."""

    pattern: str
    us: float
    loss: float

    @classmethod
    def of(cls, plan: Plan, pattern: str) -> Uniform:
        """Predicted latency and estimated loss."""
        assert plan.summary is not None
        taken = [next((o for o in g.options if o.prune == pattern), g.options[0]) for g in groups_of(plan)]
        us = plan.summary.call_us(plan.summary.rest_us + sum(option.us for option in taken))
        return cls(pattern, us, sum(option.loss for option in taken))

    def clearly_beats(self, other: Uniform) -> bool:
        """Whether it is no slower and loses so much less that measuring would not change it."""
        return self.us <= other.us and CLEARLY * self.loss < other.loss


def compare_quality(subject: Subject, results: Results, save: Callable[[], None]) -> None:
    """The plan beside uniform patterns, at the latency of each that no other uniform pattern beats in both ways."""
    plan = subject.plan()
    every = [Uniform.of(plan, str(Pattern.parse(text))) for text in subject.patterns]
    for one in every:
        print(f"{subject.name}, {one.pattern}: {one.us:.0f} us, estimated loss {one.loss:.4g}", flush=True)
    known: dict[str, float] = {}
    least = least_us(plan) * (1 + 1e-9)
    for one in sorted(every, key=lambda one: one.us):  # all that are no slower are scored before it
        if one.us <= least or any(other.clearly_beats(one) for other in every):
            continue
        score = known[one.pattern] = subject.base.score(subject.pruned(one.pattern))
        print(f"{subject.name}, {one.pattern}: {score:.4f}", flush=True)
        if any(subject.better(other, score) for other in known.values()):
            continue  # another one is no slower and better: its row is the harder one
        chosen = plan.replan(max_latency=1e-6 * one.us * (1 + 1e-9))
        value = subject.base.score(subject.pruned(chosen))
        assert chosen.summary is not None
        details = {
            "predicted ms": one.us / 1e3,
            "planned ms": chosen.summary.planned_us / 1e3,
            "dense ms": chosen.summary.dense_us / 1e3,
            "estimated loss": chosen.summary.estimated_loss,
            "estimated loss of the pattern": one.loss,
            "calibration batches": len(subject.calibration),
        }
        case = f"{subject.name}, quality at the latency of {one.pattern} everywhere"
        at_most = subject.base.unit != "cosine"
        results.add(Row(case, round(value, 4), subject.base.unit, round(score, 4), at_most, details))
        save()


def compiled(model: nn.Module, backend: str, options: dict[str, Any] | None = None) -> Callable[[Tensor], Any]:
    compile_model: Any = torch.compile
    result: Callable[[Tensor], Any] = compile_model(
        model, backend=backend, options=options, dynamic=False, isolate_recompiles=True
    )
    return result


def time_models(subject: Subject, dense: bool, plans: dict[str, Plan], rounds: int) -> Timings:
    """Models pruned as planned, in turn. By magnitude: the kernels' time depends on where zeros are allowed to be."""
    calls: dict[str, Callable[[Tensor], Any]] = {"dense": compiled(subject.model, "inductor")} if dense else {}
    for name, plan in plans.items():
        calls[name] = compiled(subject.pruned(plan, "magnitude"), "sparse", {"plan": plan})
    with torch.inference_mode():
        bound = {name: (lambda call=call: call(subject.inputs)) for name, call in calls.items()}
        return interleave(bound, rounds=rounds)


def compare_speed(subject: Subject, rounds: int, results: Results) -> None:
    """Predicted and measured speed-up along the front."""
    plan = subject.plan()
    assert plan.summary is not None
    least = least_us(plan)
    dense_us = plan.summary.dense_us
    worst, details = 0.0, {}
    for share in SHARES:
        chosen = plan.replan(max_latency=1e-6 * (dense_us + share * (least - dense_us)) * (1 + 1e-9))
        assert chosen.summary is not None
        timings = time_models(subject, True, {"planned": chosen}, rounds)
        predicted, measured = chosen.summary.speedup, timings.speedup("planned", over="dense")
        worst = max(worst, abs(predicted / measured - 1))
        details[f"predicted, measured at {share:.0%}"] = f"{predicted:.2f}, {measured:.2f}"
    case = f"{subject.name}, predicted speed-up against measured, worst of {len(SHARES)} plans"
    results.add(Row(case, 100 * worst, "% off", 15, True, details))


def compare_budgets(subject: Subject, rounds: int, results: Results) -> None:
    """Choices by predicted costs against the best by measured ones."""
    plan, tuned = subject.plan(), subject.plan(measured=True)
    assert tuned.summary is not None
    cost = {(g.name, o.prune): o.us for g in groups_of(tuned) for o in g.options}
    unlimited = fastest(plan).summary
    assert unlimited is not None
    most = unlimited.estimated_loss
    numbers = random.Random(0)
    kernels, whole = [], []
    for number in range(BUDGETS):
        budget = most * 10 ** numbers.uniform(-2, 0)
        choice, best = plan.replan(max_quality_loss=budget), tuned.replan(max_quality_loss=budget)
        # A pattern that was measured to gain nothing is no option of the measured plan: it would run dense.
        summed = tuned.summary.rest_us + sum(
            cost.get((site.name, site.prune), cost.get((site.name, ""), site.dense_us or 0.0))
            for site in choice
            if (site.name, "") in cost
        )
        kernels.append(tuned.summary.call_us(summed) / planned_us(best))
        timings = time_models(subject, False, {"choice": choice, "best": best}, rounds)
        whole.append(timings.speedup("best", over="choice"))
        print(f"budget {number}: {budget:.3g}, kernels {kernels[-1]:.3f}, models {whole[-1]:.3f}", flush=True)
    for how, ratios in (("kernels measured and summed", kernels), ("models timed in turn", whole)):
        case = f"{subject.name}, {BUDGETS} random budgets, choice over the best by measurement, {how}"
        details = {"median": sorted(ratios)[len(ratios) // 2], "over 1.05": sum(ratio > 1.05 for ratio in ratios)}
        results.add(Row(case, max(ratios), "x at worst", 1.05, True, details))


def estimates_of(subject: Subject, sites: list[Site], patterns: list[str], criterion: str, wanted: Wanted) -> Estimates:
    """Estimated losses of all pairs, by name of the site, with one batch held out to measure losses on."""
    probes = as_calls(subject.calibration[:1])
    with calibrating(subject.model):
        probed = [call.run(subject.model) for call in probes]
        return estimate(
            subject.model,
            as_calls(subject.calibration[1:]),
            sites,
            [Pattern.parse(text) for text in patterns],
            criterion_named(criterion),
            loss=lambda: mean_loss(subject.model, probes, probed, None),
            wanted=wanted,
            done=lambda: None,
        )


def compare_allocation(subject: Subject, results: Results) -> None:
    """Shares of zeros by layer, at the same share of the whole."""
    sites = choose_sites(subject.model, subject.base.prunes)
    found = estimates_of(subject, sites, list(ALLOCATIONS), "wanda", lambda *_: True)
    entries = [site.weight.numel() for site in sites]
    classes = [
        [Item(item.loss, size * (1 - float(Pattern.parse(item.prune).sparsity or 0))) for item in found[site.name]]
        for site, size in zip(sites, entries, strict=True)
    ]
    picked = solve(classes, sum(entries) * (1 - ALLOCATED))
    assert picked is not None, "the lowest share of the options is below the one wanted"
    plan = Plan(
        target="",
        sites=[
            SiteChoice(site.name, tuple(site.weight.shape), 0, 1.0, DENSE, "", prune=found[site.name][at].prune)
            for site, at in zip(sites, picked, strict=True)
        ],
    )
    uniform = subject.base.score(subject.pruned(f"unstructured@{ALLOCATED}", "wanda"))
    pruned = subject.pruned(plan, "wanda")
    zeros = sum(int((site.weight == 0).sum()) for site in choose_sites(pruned, subject.base.prunes)) / sum(entries)
    case = f"{subject.name}, {ALLOCATED:.0%} zeros by Wanda, shares of layers by the planner's estimates"
    details = {"uniform": round(uniform, 1), "share of zeros": round(zeros, 4)}
    results.add(Row(case, round(subject.base.score(pruned), 2), subject.base.unit, OWL, True, details))


def compare_ranks(subject: Subject, results: Results) -> None:
    """Estimated losses of single layers against measured ones."""
    tests = as_calls(list(subject.unseen().split(1)))
    sites = choose_sites(subject.model, subject.base.prunes)
    sites = sites[:: -(-len(sites) // MOST_RANKED)]
    measured: dict[tuple[str, str], float] = {}
    with calibrating(subject.model):
        want = [call.run(subject.model) for call in tests]

    def wanted(site: Site, prune: str, weight: Tensor) -> bool:
        before = site.weight.clone()
        site.weight.copy_(weight)
        measured[site.name, prune] = mean_loss(subject.model, tests, want, None)
        site.weight.copy_(before)
        return True

    found = estimates_of(subject, sites, subject.patterns, subject.criterion, wanted)
    pairs = [(item, measured[name, item.prune]) for name, items in found.items() for item in items]
    losses = [loss for _, loss in pairs]
    rank = float(spearmanr([item.loss for item, _ in pairs], losses).statistic)
    error_rank = float(spearmanr([item.error for item, _ in pairs], losses).statistic)
    details = {
        "pairs": len(pairs),
        "by output error alone": error_rank,
        "sum of estimates over measured": sum(item.loss for item, _ in pairs) / sum(losses),
    }
    case = f"{subject.name}, rank correlation of estimated with measured losses of single layers"
    results.add(Row(case, rank, "Spearman's rho", None, details=details))


def merged(rows: list[Row]) -> list[Row]:
    """Earlier rows with the new ones in the places of those of the same case."""
    path = RESULTS / "planner.json"
    earlier: dict[str, Row] = {}
    if path.is_file():
        names = {field.name for field in fields(Row)}
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            earlier[row["case"]] = Row(**{key: value for key, value in row.items() if key in names})
    return list({**earlier, **{row.case: row for row in rows}}.values())


def main() -> None:
    """Run the parts and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=",".join(MODELS), help="some of: " + ", ".join(MODELS))
    parser.add_argument("--part", default=",".join(PARTS), help="some of: " + ", ".join(PARTS))
    parser.add_argument("--pattern", default=",".join(DEFAULT_PATTERNS), help="patterns, with commas between")
    parser.add_argument("--criterion", default="sparsegpt")
    parser.add_argument("--windows", type=int, default=0, help="batches of the calibration at most; all if 0")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    parser.add_argument("--quick", action="store_true", help="few rounds, MiniLM by Wanda, three patterns; not kept")
    options = parser.parse_args()
    if options.quick:
        options.model, options.criterion, options.pattern = "minilm", "wanda", "unstructured@0.5,unstructured@0.7,2:4"
    torch.set_num_threads(options.threads)
    parts = options.part.split(",")
    unknown = sorted({*parts} - {*PARTS})
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    rounds = 5 if options.quick else 15
    results = Results("planner", notes=NOTES)

    def save() -> None:
        if not options.quick:
            Results(results.name, merged(results.rows), results.notes).write()

    for name in options.model.split(","):
        subject = Subject(name, options.pattern.split(","), options.criterion, options.windows)
        if "allocation" in parts and name == "smollm2":
            compare_allocation(subject, results)
        if "rank" in parts:
            compare_ranks(subject, results)
        if "quality" in parts:
            compare_quality(subject, results, save)
        if "speed" in parts:
            compare_speed(subject, rounds, results)
        if "budgets" in parts:
            compare_budgets(subject, rounds, results)
        save()


if __name__ == "__main__":
    main()
