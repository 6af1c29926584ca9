"""What the commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Threads = Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch; its own default if not given.")]


@contextmanager
def errors_for_people() -> Iterator[None]:
    """End with one line and status 1 for what the user can put right; a mistake of ours keeps its traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def set_threads(threads: int | None) -> None:
    """Set PyTorch's number of threads, if one is given."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def onnx_api() -> Any:
    """The module `sparsecomp.onnx`.

    Raises:
        ValueError: what it needs is not installed.
    """
    try:
        import sparsecomp.onnx
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'sparsecomp[onnx]'") from error
    return sparsecomp.onnx
