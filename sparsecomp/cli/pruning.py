"""`sparsecomp plan` and `sparsecomp prune`: from a dense model to a pruned one, as a Hugging Face folder or in ONNX."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsecomp.cli.common import Threads, errors_for_people, onnx_api, set_threads
from sparsecomp.cli.onnx import Exclude

if TYPE_CHECKING:
    from torch import nn

    from sparsecomp import Pattern, Plan

Model = Annotated[
    Path, typer.Argument(help="A Hugging Face model folder (config.json, weights and tokenizer), or an ONNX model.")
]
Sequences = Annotated[int, typer.Option(min=1, help="Sequences of the calibration text that are used, at most.")]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")]
_CALIBRATION = "A text (UTF-8) like those of the task; for ONNX an .npz file with the model's inputs by name."


def plan(
    model: Model,
    calibration: Annotated[Path, typer.Option(help=_CALIBRATION)],
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
    exclude: Exclude = None,
    sequences: Sequences = 128,
    tokens: Tokens = 128,
    threads: Threads = None,
) -> None:
    """Choose a pattern for every layer of a model, under a budget: give exactly one of the three."""
    with errors_for_people():
        set_threads(threads)
        shared: dict[str, Any] = {
            "max_quality_loss": max_quality_loss,
            "max_latency": max_latency,
            "speedup": speedup,
            "patterns": pattern or None,
            "criterion": criterion,
        }
        if _is_onnx(model):
            if skip:
                raise ValueError("--skip is for model folders; for ONNX see sparsecomp optimize --skip")
            result = onnx_api().plan(model, calibration, options={"target": target, "exclude": exclude}, **shared)
        else:
            result = _plan_folder(model, calibration, sequences, tokens, target, skip or [], exclude, shared)
        result.save(output)
    print(result)
    print(f"written to {output}; next: sparsecomp prune {model} --plan {output} -o OUTPUT", file=sys.stderr)


def _plan_folder(
    folder: Path,
    text: Path,
    sequences: int,
    tokens: int,
    target: str | None,
    skips: list[str],
    exclude: list[str] | None,
    shared: dict[str, Any],
) -> Plan:
    import sparsecomp
    from sparsecomp.folders import load_model

    model = load_model(folder)
    filter_fn = _all_but_head(model, exclude)
    batches = _batches(model, folder, text, sequences, tokens)
    inputs = {"input_ids": batches[0]["input_ids"][:1, : 1 if skips else None]}
    return sparsecomp.plan(model, batches, target=target, skips=skips, inputs=inputs, filter_fn=filter_fn, **shared)


def prune(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the pruned model; for ONNX a file.")],
    pattern: Annotated[
        str | None, typer.Argument(help="What to prune every layer to, such as '2:4'; or give --plan.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan of `sparsecomp plan`, with a pattern per layer.")] = None,
    criterion: Annotated[
        str | None,
        typer.Option(help="magnitude, wanda, ria or sparsegpt; sparsegpt with --calibration, else magnitude."),
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help=_CALIBRATION)] = None,
    refine: Annotated[str | None, typer.Option(help="'dsnot': exchange entries of the chosen mask.")] = None,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Tune the kept weights block by block; takes minutes.")
    ] = False,
    exclude: Exclude = None,
    sequences: Sequences = 128,
    tokens: Tokens = 128,
    threads: Threads = None,
) -> None:
    """Prune a model and write it anew: dense weights with zeros, which any tool reads."""
    with errors_for_people():
        set_threads(threads)
        import sparsecomp

        # What the user gave is checked before a large model is loaded.
        if (pattern is None) == (plan is None):
            raise ValueError("give either a pattern, such as '2:4', or --plan FILE")
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"{output} exists already: give a new path for the pruned model")
        wanted = sparsecomp.Plan.load(plan) if plan is not None else sparsecomp.Pattern.parse(pattern or "")
        if plan is not None and exclude:
            raise ValueError("a plan says which layers stay dense: give --exclude to sparsecomp plan")
        shared: dict[str, Any] = {"refine": refine}  # checked there
        if _is_onnx(model):
            if reconstruct:
                raise ValueError("--reconstruct is for model folders: ONNX models cannot be trained")
            shared |= {"criterion": criterion, "calibration": calibration, "exclude": exclude or ()}
            names = onnx_api().prune(model, output, wanted, **shared)
            what = f"{len(names)} layers pruned"
        else:
            shared |= {"criterion": criterion or ("sparsegpt" if calibration else "magnitude")}
            shared |= {"reconstruct": reconstruct}
            what = _prune_folder(model, output, wanted, calibration, sequences, tokens, exclude, shared)
    print(f"{what}: {output}")


def _prune_folder(
    folder: Path,
    output: Path,
    wanted: Pattern | Plan,
    text: Path | None,
    sequences: int,
    tokens: int,
    exclude: list[str] | None,
    shared: dict[str, Any],
) -> str:
    """Prune a model folder; returns what was done."""
    import sparsecomp
    from sparsecomp.folders import load_model

    model = load_model(folder)
    plan = wanted if isinstance(wanted, sparsecomp.Plan) else None
    filter_fn = None if plan is not None else _all_but_head(model, exclude)
    calibration = None if text is None else _batches(model, folder, text, sequences, tokens)
    names = sparsecomp.sparsify_(model, wanted, calibration=calibration, filter_fn=filter_fn, **shared)
    sparsecomp.save_checkpoint(model, output, plan=plan)
    _copy_tokenizer(folder, output)
    weights: list[Any] = [model.get_submodule(name).weight for name in names]
    total = sum(weight.numel() for weight in weights)
    zeros = total - sum(int(weight.count_nonzero()) for weight in weights)
    return f"{len(names)} layers pruned, {zeros / max(total, 1):.1%} of their {total:,} weights are zero"


def _is_onnx(model: Path) -> bool:
    return model.suffix == ".onnx"


def _batches(model: nn.Module, folder: Path, text: Path, sequences: int, tokens: int) -> list[Any]:
    from sparsecomp.folders import check_length, load_tokenizer, text_batches

    check_length(model, tokens)
    return list(text_batches(load_tokenizer(folder), text, sequences=sequences, tokens=tokens))


def _all_but_head(model: Any, exclude: list[str] | None) -> Any:
    """The layer that gives the logits stays dense too: its weight is often the table of embeddings."""
    from sparsecomp.options import Options

    head, options = model.get_output_embeddings(), Options.parse({"exclude": exclude})

    def filter_fn(module: nn.Module, name: str) -> bool:
        return module is not head and options.excluding(name) is None

    return filter_fn


def _copy_tokenizer(folder: Path, output: Path) -> None:
    from sparsecomp.folders import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except ValueError:
        return  # a folder without one, such as that of a vision model
    tokenizer.save_pretrained(output)
