"""`sparsecomp export`: a model as a package for a board."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsecomp.cli.common import errors_for_people
from sparsecomp.cli.onnx import Exclude, PlanFile, parts_of


def export(
    model: Annotated[
        Path, typer.Argument(help="An ONNX model, or a program of torch.export (.pt2); for cards the latter.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    target: Annotated[
        str,
        typer.Option(
            help="arm; host: the same code for this machine, to test it; hls: an FPGA; cuda: a card, also cuda:h100."
        ),
    ] = "arm",
    cpu: Annotated[str, typer.Option(help="The board's CPU, such as cortex-a53.")] = "cortex-a76",
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="NAME=SIZES",
            help="Sizes of an input, such as input_ids=1x128; input_ids=1x1..128: each run gives the length.",
        ),
    ] = None,
    plan: PlanFile = None,
    exclude: Exclude = None,
    threads: Annotated[int, typer.Option(min=1, help="Most that a call uses, where OpenMP is on.")] = 1,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float16: linears may compute in half precision, on CPUs that can; float32. The model's by default."
        ),
    ] = None,
    ram: Annotated[str | None, typer.Option(help="What the board has for the model, such as 512K or 4M.")] = None,
    flash: Annotated[str | None, typer.Option(help="The same for weights and kernels.")] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(help="cuda: compute capability, such as sm_90; several times for code for several."),
    ] = None,
    part: Annotated[str, typer.Option(help="hls: the device, such as xc7z020.")] = "xczu7ev",
    clock: Annotated[str, typer.Option(help="hls: of the design.")] = "5ns",
    calibration: Annotated[
        Path | None,
        typer.Option(help="hls: an .npz file with samples of the input by its name; quantises a float model."),
    ] = None,
    max_dsp: Annotated[int | None, typer.Option(help="hls: DSP slices that the design may take.")] = None,
    max_latency: Annotated[
        str | None, typer.Option(help="hls: of a call, such as 1ms; the smallest such design.")
    ] = None,
    max_interval: Annotated[
        str | None, typer.Option(help="hls: between calls that follow each other; the smallest such design.")
    ] = None,
    vectors: Annotated[int, typer.Option(help="hls: rows of a call, where the model leaves them open.")] = 1,
    skip: Annotated[
        str | None, typer.Option(help="hls: relu or threshold:P; linears take time for hidden units that stay.")
    ] = None,
    rtl: Annotated[bool, typer.Option("--rtl", help="hls: also DSLX and its Verilog, by XLS, in rtl/.")] = False,
    pareto: Annotated[
        Path | None, typer.Option(help="hls: a picture to write, least latency for every number of DSP slices.")
    ] = None,
) -> None:
    """Write a package of C, objects and weights that runs a model on a board without Python, PyTorch or TVM.

    With --target hls: a project of C++ for high-level synthesis, of an int8 network. With --target cuda: the sparse
    linears alone, as CUDA C++ and cubins with a C++ program that runs, checks and times them on a card.
    """
    with errors_for_people():
        sizes = {
            name: [int(part) if part.isdecimal() else part for part in parts] for name, parts in parts_of(shape).items()
        }
        if arch and not _is_cuda(target):
            raise ValueError("--arch belongs to --target cuda")
        if target == "hls":
            if sizes or plan or exclude or threads != 1 or dtype or ram or flash:
                raise ValueError(
                    "--target hls takes --part, --clock, --calibration, --max-dsp, --max-latency, --max-interval, "
                    "--vectors, --skip, --rtl and --pareto"
                )
            limits = {"max_dsp": max_dsp, "max_latency": max_latency, "max_interval": max_interval}
            _export_hls(model, output, part, clock, calibration, limits, vectors, skip, rtl, pareto)
            return
        if calibration or max_dsp is not None or max_latency or max_interval or skip or rtl or pareto:
            raise ValueError(
                "--calibration, --max-dsp, --max-latency, --max-interval, --skip, --rtl and --pareto belong to "
                "--target hls"
            )
        if _is_cuda(target):
            if sizes or threads != 1 or dtype or ram or flash:
                raise ValueError("--target cuda takes --arch, --plan and --exclude")
            _export_cuda(model, output, target, arch, {"plan": plan, "exclude": exclude})
            return
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
            dtype=dtype,
            ram=ram,
            flash=flash,
        )
    print(report)
    print(f"written to {output}")


def _is_cuda(target: str) -> bool:
    return target.partition(":")[0] == "cuda"


def _export_cuda(model: Path, output: Path, target: str, arch: list[str] | None, options: dict[str, Any]) -> None:
    from sparsecomp.cuda.export import export_cuda

    try:
        report = export_cuda(model, output=output, target=target, arch=arch, options=options)
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error
    print(report)
    print(
        f"written to {output}; cmake -S {output} -B {output / 'build'} prepares its program, see {output / 'README.md'}"
    )


def _export_hls(
    model: Path,
    output: Path,
    part: str,
    clock: str,
    calibration: Path | None,
    limits: dict[str, Any],
    vectors: int,
    skip: str | None,
    rtl: bool,
    pareto: Path | None,
) -> None:
    try:
        from sparsecomp.hls.api import export_hls
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'sparsecomp[onnx]'") from error
    made = export_hls(
        model,
        output=output,
        part=part,
        clock=clock,
        calibration=calibration,
        **limits,
        vectors=vectors,
        skip=skip,
        rtl=rtl,
        pareto=pareto,
    )
    print(made)
    if pareto is not None:
        print(f"drawn in {pareto}")
    print(f"written to {output}; make -C {output} csim simulates it")
