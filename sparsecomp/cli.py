"""The command line: `sparsecomp info`, `sparsecomp calibrate`, `sparsecomp explain FOLDER`.

torch and the targets are imported inside the commands, so that help is there at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor, nn

app = typer.Typer(
    help="Sparse neural networks, faster on the hardware that people have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@contextmanager
def _errors_for_people() -> Iterator[None]:
    """End with one line and status 1 for what the user can put right; a mistake of ours keeps its traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


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


Threads = Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch; its own default if not given.")]


@app.command()
def info(
    target: Annotated[str | None, typer.Option(help="Name of a target; this machine's if not given.")] = None,
) -> None:
    """Print the machine, the target, its calibration and the cache folder."""
    import torch

    from sparsecomp.runtime.cache import cache_dir
    from sparsecomp.targets import get_target

    with _errors_for_people():
        chosen = get_target(target)
        for label, value in (
            ("machine", f"{_processor()}, {torch.get_num_threads()} threads"),
            ("torch", torch.__version__),
            ("target", f"{chosen.name}: {chosen.description}"),
            ("cache", cache_dir()),
        ):
            print(f"{label:8} {value}")


@app.command()
def calibrate() -> None:
    """Measure this machine for the cost model, in under a minute; the result is kept in the cache folder."""
    with _errors_for_people():
        from sparsecomp.targets.x86.calibrate import calibrate as measure

        print("measuring; other work on the machine would spoil the result ...", file=sys.stderr)
        print(measure())


@app.command()
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
    with _errors_for_people():
        _set_threads(threads)
        import torch

        import sparsecomp

        # What the user gave is checked before a large model is loaded.
        options = sparsecomp.Options.parse({"target": target})
        pattern = None if sparsify is None else sparsecomp.Pattern.parse(sparsify)
        model = _load(folder)
        if pattern is not None:
            sparsecomp.sparsify_(model, pattern)
        with torch.inference_mode():
            report = sparsecomp.explain(model, _example(model, batch, tokens), options=options)
    print(report)
    if plan is not None:
        report.plan.save(plan)
    if json is not None:
        json.write_text(report.to_json(), encoding="utf-8")
    if html is not None:
        html.write_text(report.to_html(), encoding="utf-8")


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the name that Python has is the next best
    import platform

    return platform.processor() or platform.machine()


def _load(folder: Path) -> nn.Module:
    """The model of a Hugging Face folder, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no config.json.
        ValueError: transformers is missing or cannot read it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the one that holds config.json and the weights")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give the folder of a Hugging Face model")
    try:
        import transformers
    except ImportError as error:
        raise ValueError("reading a model folder needs transformers: pip install 'sparsecomp[models]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model: Any = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"transformers cannot read {folder}: {error}") from error
    result: nn.Module = model.eval()
    return result


def _example(model: Any, batch: int, tokens: int) -> Tensor:
    """An input for a model: token numbers `[batch, tokens]`, or pictures `[batch, channels, size, size]`.

    Raises:
        ValueError: the model takes something else, or fewer tokens.
    """
    import torch

    config = model.config
    if model.main_input_name == "input_ids":
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise ValueError(f"the model takes at most {limit} tokens, given --tokens {tokens}")
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, config.vocab_size, (batch, tokens), generator=generator)
    if model.main_input_name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        return torch.zeros(batch, getattr(config, "num_channels", 3), config.image_size, config.image_size)
    raise ValueError(
        f"the model's input is {model.main_input_name!r}; this command makes texts (input_ids) and pictures "
        f"(pixel_values); for others call sparsecomp.explain(model, *inputs) from Python"
    )
