"""`sparsecomp plan` and `sparsecomp prune`: from a dense Hugging Face model folder to a pruned one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsecomp.cli.common import Threads, errors_for_people, set_threads

if TYPE_CHECKING:
    from torch import nn

Folder = Annotated[Path, typer.Argument(help="A Hugging Face model folder: config.json, weights and tokenizer.")]
Sequences = Annotated[int, typer.Option(min=1, help="Sequences of the calibration text that are used, at most.")]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")]


def plan(
    folder: Folder,
    calibration: Annotated[Path, typer.Option(help="A text (UTF-8) to calibrate on, like those of the task.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the plan to this file.")] = Path("plan.json"),
    max_quality_loss: Annotated[float | None, typer.Option(help="Loss that the pruned model may have.")] = None,
    max_latency: Annotated[str | None, typer.Option(help="Of one sequence, such as '8 ms'.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Over the dense model under Inductor, at least.")] = None,
    pattern: Annotated[
        list[str] | None, typer.Option(help="What a layer may be pruned to; may be given several times.")
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="What may skip at run time, such as 'input:0.4' or 'threshold:0.4'; several times. Latencies are then "
            "of one token."
        ),
    ] = None,
    criterion: Annotated[str, typer.Option(help="What the model will be pruned by.")] = "sparsegpt",
    target: Annotated[str | None, typer.Option(help="Name of a target; this machine's if not given.")] = None,
    sequences: Sequences = 128,
    tokens: Tokens = 128,
    threads: Threads = None,
) -> None:
    """Choose a pattern for every layer of a model, under a budget: give exactly one of the three."""
    with errors_for_people():
        set_threads(threads)
        import sparsecomp
        from sparsecomp.folders import load_model

        model = load_model(folder)
        batches = _batches(model, folder, calibration, sequences, tokens)
        result = sparsecomp.plan(
            model,
            batches,
            target=target,
            max_quality_loss=max_quality_loss,
            max_latency=max_latency,
            speedup=speedup,
            patterns=pattern or None,
            skips=skip or (),
            criterion=criterion,
            inputs={"input_ids": batches[0]["input_ids"][:1, : 1 if skip else None]},
            filter_fn=_all_but_head(model),
        )
        result.save(output)
    print(result)
    print(f"written to {output}; next: sparsecomp prune {folder} --plan {output} -o OUTPUT", file=sys.stderr)


def prune(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the pruned model.")],
    pattern: Annotated[
        str | None, typer.Argument(help="What to prune every layer to, such as '2:4'; or give --plan.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan of `sparsecomp plan`, with a pattern per layer.")] = None,
    criterion: Annotated[
        str | None,
        typer.Option(help="magnitude, wanda, ria or sparsegpt; sparsegpt with --calibration, else magnitude."),
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="A text (UTF-8) to calibrate on.")] = None,
    refine: Annotated[str | None, typer.Option(help="'dsnot': exchange entries of the chosen mask.")] = None,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Tune the kept weights block by block; takes minutes.")
    ] = False,
    sequences: Sequences = 128,
    tokens: Tokens = 128,
    threads: Threads = None,
) -> None:
    """Prune a model and write it to a new folder: dense safetensors with zeros, which any tool reads."""
    with errors_for_people():
        set_threads(threads)
        import sparsecomp
        from sparsecomp.folders import load_model

        # What the user gave is checked before a large model is loaded.
        if (pattern is None) == (plan is None):
            raise ValueError("give either a pattern, such as '2:4', or --plan FILE")
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"{output} exists already: give a new folder for the pruned model")
        wanted = sparsecomp.Plan.load(plan) if plan is not None else sparsecomp.Pattern.parse(pattern or "")
        model = load_model(folder)
        names = sparsecomp.sparsify_(
            model,
            wanted,
            criterion=criterion or ("sparsegpt" if calibration else "magnitude"),
            calibration=None if calibration is None else _batches(model, folder, calibration, sequences, tokens),
            refine=refine,  # type: ignore[arg-type]  # checked there
            reconstruct=reconstruct,
            filter_fn=_all_but_head(model) if plan is None else None,
        )
        sparsecomp.save_checkpoint(model, output, plan=wanted if isinstance(wanted, sparsecomp.Plan) else None)
        _copy_tokenizer(folder, output)
    weights: list[Any] = [model.get_submodule(name).weight for name in names]
    total = sum(weight.numel() for weight in weights)
    zeros = total - sum(int(weight.count_nonzero()) for weight in weights)
    print(f"{len(names)} layers pruned, {zeros / max(total, 1):.1%} of their {total:,} weights are zero: {output}")


def _batches(model: nn.Module, folder: Path, text: Path, sequences: int, tokens: int) -> list[Any]:
    from sparsecomp.folders import check_length, load_tokenizer, text_batches

    check_length(model, tokens)
    return list(text_batches(load_tokenizer(folder), text, sequences=sequences, tokens=tokens))


def _all_but_head(model: Any) -> Any:
    """The layer that gives the logits stays dense: its weight is often the table of embeddings too."""
    head = model.get_output_embeddings()

    def filter_fn(module: nn.Module, name: str) -> bool:
        return module is not head

    return filter_fn


def _copy_tokenizer(folder: Path, output: Path) -> None:
    from sparsecomp.folders import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except ValueError:
        return  # a folder without one, such as that of a vision model
    tokenizer.save_pretrained(output)
