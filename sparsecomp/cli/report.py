"""`sparsecomp explain`: what the backend would choose for every layer of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsecomp.cli.common import Threads, errors_for_people, set_threads


def explain(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face model folder: config.json and weights.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a text.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Inputs at a time.")] = 1,
    sparsify: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Prune by magnitude first, such as 'unstructured@0.8'.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Name of a target; this machine's if not given.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Write the plan to this file, for editing and the option `plan`.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file, as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report to this file, as a page.")] = None,
    threads: Threads = None,
) -> None:
    """Print what the backend would choose for every layer of a model, at which predicted times, and why."""
    with errors_for_people():
        set_threads(threads)
        import torch

        import sparsecomp
        from sparsecomp.folders import example_input, load_model

        # What the user gave is checked before a large model is loaded.
        options = sparsecomp.Options.parse({"target": target})
        pattern = None if sparsify is None else sparsecomp.Pattern.parse(sparsify)
        model = load_model(folder)
        if pattern is not None:
            sparsecomp.sparsify_(model, pattern)
        with torch.inference_mode():
            report = sparsecomp.explain(model, example_input(model, batch, tokens), options=options)
    print(report)
    if plan is not None:
        report.plan.save(plan)
    if json is not None:
        json.write_text(report.to_json(), encoding="utf-8")
    if html is not None:
        html.write_text(report.to_html(), encoding="utf-8")
