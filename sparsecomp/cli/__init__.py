"""The command line: `info`, `calibrate`, `explain`, `plan`, `prune`, `inspect`, `optimize`, `export` and `bench`.

torch and the targets are imported inside the commands, so that help is there at once.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sparsecomp.cli.export import export
from sparsecomp.cli.generate import generate
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


for command in (info, calibrate, explain, plan, prune, inspect, optimize, export):
    app.command()(command)


class _Benchmarks(TyperGroup):
    """`bench MODEL` is about an ONNX model, if it does not begin with the name of another benchmark."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["onnx", *args]
        return super().parse_args(ctx, args)


benchmarks = typer.Typer(cls=_Benchmarks, no_args_is_help=True, help="Time an ONNX model, or a language model writing.")
benchmarks.command("onnx")(bench)
benchmarks.command()(generate)
app.add_typer(benchmarks, name="bench")
