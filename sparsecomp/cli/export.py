"""`sparsecomp export`: a model as a package for a board."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsecomp.cli.common import errors_for_people
from sparsecomp.cli.onnx import Exclude, PlanFile, Shapes, sizes_of


def export(
    model: Annotated[Path, typer.Argument(help="An ONNX model, or a program of torch.export (.pt2).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    target: Annotated[str, typer.Option(help="arm; host builds the same code for this machine, to test it.")] = "arm",
    cpu: Annotated[str, typer.Option(help="The board's CPU, such as cortex-a53.")] = "cortex-a76",
    shape: Shapes = None,
    plan: PlanFile = None,
    exclude: Exclude = None,
    threads: Annotated[int, typer.Option(min=1, help="Most that a call uses, where OpenMP is on.")] = 1,
    ram: Annotated[str | None, typer.Option(help="What the board has for the model, such as 512K or 4M.")] = None,
    flash: Annotated[str | None, typer.Option(help="The same for weights and kernels.")] = None,
) -> None:
    """Write a package of C, objects and weights that runs a model on a board without Python, PyTorch or TVM."""
    with errors_for_people():
        sizes = sizes_of(shape)
        try:
            from sparsecomp.exporting.api import export as write
        except ModuleNotFoundError as error:
            raise ValueError(f"{error.name} is not installed: pip install 'sparsecomp[onnx]'") from error
        report = write(
            model,
            output=output,
            target=target,
            cpu_name=cpu,
            shapes=sizes or None,
            options={"plan": plan, "exclude": exclude},
            threads=threads,
            ram=ram,
            flash=flash,
        )
    print(report)
    print(f"written to {output}")
