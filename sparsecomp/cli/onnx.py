"""`sparsecomp inspect`, `optimize` and `bench`: ONNX models for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsecomp.cli.common import Threads, errors_for_people, onnx_api, set_threads

Model = Annotated[Path, typer.Argument(help="An ONNX model.")]
TargetName = Annotated[str | None, typer.Option(help="Name of a target; this machine's if not given.")]
PlanFile = Annotated[Path | None, typer.Option(help="A plan to follow where the weights allow it.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape", metavar="NAME=SIZES", help="Sizes of an input that the times are for, such as input_ids=1x128."
    ),
]
_SHAPE_FORM = "expected NAME=SIZES, such as input_ids=1x128"
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="REGEX", help="Sites whose name this matches stay dense; several times.")
]


def inspect(
    model: Model,
    target: TargetName = None,
    plan: PlanFile = None,
    shape: Shapes = None,
    exclude: Exclude = None,
    save_plan: Annotated[Path | None, typer.Option(help="Write the plan to this file, to be edited.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file, as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report to this file, as a page.")] = None,
    threads: Threads = None,
) -> None:
    """Print the sites of an ONNX model: zeros, patterns, what each would gain on this machine, and why not."""
    with errors_for_people():
        set_threads(threads)
        sizes = sizes_of(shape)
        options = {"target": target, "plan": plan, "exclude": exclude}
        report = onnx_api().inspect(model, options=options, shapes=sizes)
    print(report)
    if save_plan is not None:
        report.plan.save(save_plan)
    if json is not None:
        json.write_text(report.to_json(), encoding="utf-8")
    if html is not None:
        html.write_text(report.to_html(), encoding="utf-8")


def optimize(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The model to write, such as model.sparse.onnx; beside it model.sparse.so."
        ),
    ],
    target: TargetName = None,
    plan: PlanFile = None,
    shape: Shapes = None,
    exclude: Exclude = None,
    max_quality_loss: Annotated[float | None, typer.Option(help="Prune: loss that the model may have.")] = None,
    max_latency: Annotated[str | None, typer.Option(help="Prune: of one call, such as '8 ms'.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Prune: over the dense model, at least.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="An .npz file with the model's inputs by name, samples along the first axis.")
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(help="magnitude, wanda, ria or sparsegpt; sparsegpt with --calibration, else magnitude."),
    ] = None,
    skip: Annotated[
        str | None, typer.Option(metavar="block:T", help="FFN blocks that turn the stream little are skipped at times.")
    ] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="Only standard operations: remove dead units and channels, no library.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Write a model whose sparse layers run in kernels of their own, and the library for ONNX Runtime with these.

    With a budget the model is pruned first; give one of the three, and calibration.
    """
    with errors_for_people():
        set_threads(threads)
        sizes = sizes_of(shape)
        if portable:
            others = (target, plan, max_quality_loss, max_latency, speedup, criterion)
            if exclude or any(given is not None for given in others):
                raise ValueError(
                    "--portable chooses no kernels and prunes nothing: it takes --shape, or --skip with --calibration"
                )
            for found in onnx_api().shrink(model, output, shapes=sizes or None, skip=skip, calibration=calibration):
                print(found)
            print(f"written to {output}, in standard operations")
            return
        options = {"target": target, "plan": plan, "exclude": exclude}
        report = onnx_api().optimize(
            model,
            output,
            options=options,
            shapes=sizes or None,
            max_quality_loss=max_quality_loss,
            max_latency=max_latency,
            speedup=speedup,
            calibration=calibration,
            criterion=criterion,
            skip=skip,
        )
        library = onnx_api().library_of(output)
    if report.plan.budget is not None:
        print(report.plan)
    print(report)
    if report.rewritten:
        print(f"written to {output} and {library}; use: options.register_custom_ops_library({str(library)!r})")
    else:
        print(f"written to {output}; nothing was replaced, so that there is no library")


def bench(
    model: Model,
    target: TargetName = None,
    plan: PlanFile = None,
    shape: Shapes = None,
    exclude: Exclude = None,
    rounds: Annotated[int, typer.Option(min=2, help="Calls of each form that are timed, in turn.")] = 30,
    threads: Threads = None,
) -> None:
    """Time an ONNX model in ONNX Runtime beside its optimised form, with the library and without."""
    with errors_for_people():
        set_threads(threads)
        sizes = sizes_of(shape)
        options = {"target": target, "plan": plan, "exclude": exclude}
        timings = onnx_api().bench(model, options=options, shapes=sizes, rounds=rounds)
    print(f"{'':32} {'ms':>9} {'speed-up':>9} {'difference':>11} {'load ms':>9}")
    for row in timings:
        print(f"{row.name:32} {row.ms:9.3f} {row.speedup:8.2f}x {row.difference:11.1e} {row.load_ms:9.0f}")
    if len(timings) == 1:
        print("nothing was replaced: no layer would gain (see sparsecomp inspect)")


def parts_of(given: list[str] | None) -> dict[str, list[str]]:
    """What `--shape` gives for each dimension, with x or commas between, by the name of an input.

    Raises:
        ValueError: a text has another form.
    """
    parts: dict[str, list[str]] = {}
    for text in given or []:
        name, _, sizes = text.rpartition("=")
        if not name or not sizes:
            raise ValueError(f"--shape {text!r}: {_SHAPE_FORM}")
        parts[name] = sizes.split(",") if "," in sizes else sizes.lower().split("x")
    return parts


def sizes_of(given: list[str] | None) -> dict[str, list[int]]:
    """The sizes that `--shape` gives, by the name of an input.

    Raises:
        ValueError: a text has another form.
    """
    sizes: dict[str, list[int]] = {}
    for name, parts in parts_of(given).items():
        if not all(part.isdecimal() for part in parts):
            raise ValueError(f"--shape '{name}={'x'.join(parts)}': {_SHAPE_FORM}")
        sizes[name] = [int(part) for part in parts]
    return sizes
