"""`sparsecomp bench generate`: how fast a language model writes with its FFN blocks skipping, and what it loses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsecomp.cli.common import Threads, errors_for_people, set_threads


def generate(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face model folder of a causal language model.")],
    calibration: Annotated[
        Path, typer.Option(help="A text (UTF-8): thresholds are found on its beginning, perplexity on what follows.")
    ],
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="'relu', 'threshold:0.4', 'input:0.4', 'rsparse:0.4' or 'block:0.98', or a plan (.json) by which "
            "the model was pruned; several times."
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Sites whose name this matches may skip; such as 'mlp'.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the skip plan (.json) to this file; with one --skip.")
    ] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="The same rate in every layer; much quicker.")] = False,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to write.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, from the end of the text.")] = 16,
    cache: Annotated[str, typer.Option(help="Of keys and values: static or dynamic.")] = "static",
    sequences: Annotated[int, typer.Option(min=2, help="Sequences of the text; the second half is scored.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Texts of each form that are timed, in turn.")] = 7,
    threads: Threads = None,
) -> None:
    """Time a language model's `generate` under Inductor and under the sparse backend, with each form of skipping."""
    with errors_for_people():
        set_threads(threads)
        from sparsecomp.planner import Plan
        from sparsecomp.planner.skips import SkipForm
        from sparsecomp.skipping.generate import CACHES

        # What the user gave is checked before a large model is loaded.
        forms = {text: Plan.load(text) if text.endswith(".json") else SkipForm.parse(text) for text in skip or ()}
        if save is not None and len(forms) != 1:
            raise ValueError(f"--save writes one skip plan, but --skip was given {len(forms)} times")
        if cache not in CACHES:
            raise ValueError(f"--cache {cache!r}: expected one of {', '.join(CACHES)}")
        rule = _expression(only)
        from sparsecomp.folders import check_length, load_model, load_tokenizer, text_batches

        model: Any = load_model(folder)
        if not hasattr(model, "generate") or not model.can_generate():
            raise ValueError(f"{folder} holds a {type(model).__name__}, which does not write text")
        check_length(model, max(tokens, prompt_tokens + new_tokens))
        batches = text_batches(load_tokenizer(folder), calibration, sequences=sequences, tokens=tokens, batch=1)
        if len(batches) < 2:
            raise ValueError(f"{calibration} is shorter than two sequences of {tokens} tokens: give a longer text")
        rows = _measure(model, batches, forms, rule, uniform, save, new_tokens, prompt_tokens, cache, rounds)
    print(f"{'':28} {'tokens/s':>9} {'speed-up':>9} {'perplexity':>11} {'over dense':>11} {'skipped':>8}")
    for name, rate, speedup, value, over, skipped in rows:
        print(f"{name:28} {rate:9.1f} {speedup:8.2f}x {value:11.2f} {over:11.3f} {skipped:8.2f}")


def _expression(only: str | None) -> re.Pattern[str] | None:
    try:
        return None if only is None else re.compile(only)
    except re.error as error:
        raise ValueError(f"--only {only!r} is no regular expression ({error})") from error


def _measure(
    model: Any,
    batches: list[Any],
    forms: dict[str, Any],
    rule: re.Pattern[str] | None,
    uniform: bool,
    save: Path | None,
    new_tokens: int,
    prompt_tokens: int,
    cache: str,
    rounds: int,
) -> list[tuple[str, float, float, float, float, float]]:
    from sparsecomp.planner import Plan
    from sparsecomp.skipping import calibrate_skips, emulate
    from sparsecomp.skipping.generate import Candidate, perplexity, time_generation

    half = len(batches) // 2
    used, scored = batches[:half], [batch["input_ids"] for batch in batches[half:]]
    dense = perplexity(model, scored)
    candidates = {"Inductor": Candidate(model, "inductor"), "sparse": Candidate(model, "sparse")}
    quality = {"Inductor": (dense, 0.0), "sparse": (dense, 0.0)}
    for name, form in forms.items():
        filter_fn = None if rule is None else lambda module, name: rule.search(name) is not None
        plan = calibrate_skips(model, used, form, filter_fn=filter_fn, layerwise=not uniform)
        if save is not None:
            plan.save(save)
        with emulate(model, plan) as rates:
            value = perplexity(model, scored)
        options = {"skip": plan} | ({"plan": form} if isinstance(form, Plan) else {})
        candidates[f"sparse, {name}"] = Candidate(model, "sparse", options)
        quality[f"sparse, {name}"] = (value, rates.mean())
    prompt = scored[-1][:, -prompt_tokens:]
    timings = time_generation(candidates, prompt, new_tokens=new_tokens, rounds=rounds, cache=cache)
    return [
        (row.name, row.tokens_per_s, row.speedup, value, value / dense, skipped)
        for row in timings
        for value, skipped in [quality[row.name]]
    ]
