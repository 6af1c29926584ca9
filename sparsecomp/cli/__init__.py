"""The command line: `info`, `calibrate`, `explain`, `plan` and `prune` FOLDER, `inspect`, `optimize` and `bench` MODEL.

torch and the targets are imported inside the commands, so that help is there at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from sparsecomp.cli.machine import calibrate, info
from sparsecomp.cli.onnx import bench, inspect, optimize
from sparsecomp.cli.pruning import plan, prune
from sparsecomp.cli.report import explain

app = typer.Typer(
    help="Sparse neural networks, faster on the hardware that people have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"sparsecomp {version('sparsecomp')}")
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Sparse neural networks, faster on the hardware that people have."""


for command in (info, calibrate, explain, plan, prune, inspect, optimize, bench):
    app.command()(command)
