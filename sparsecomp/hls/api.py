"""Export for an FPGA: an ONNX model becomes a project for high-level synthesis."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from sparsecomp.frontends.onnx_load import load
from sparsecomp.hls.cpp import project
from sparsecomp.hls.dead_units import without_dead_units
from sparsecomp.hls.design import Design, design
from sparsecomp.hls.importing import network_of
from sparsecomp.hls.network import HIGH, LOW, Network
from sparsecomp.hls.pareto import front
from sparsecomp.hls.quantise import is_quantised, quantise
from sparsecomp.hls.rtl import rtl_project
from sparsecomp.hls.skipping import with_skips
from sparsecomp.packages import write_package
from sparsecomp.targets.hls import part as part_of

DEFAULT_PART = "xczu7ev"
DEFAULT_CLOCK_NS = 5.0
_RECORDED = 8
_PICTURES = (".png", ".svg", ".pdf")
_UNITS = {"ns": 1.0, "us": 1e3, "ms": 1e6, "s": 1e9}


def export_hls(
    model: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    *,
    output: str | os.PathLike[str],
    part: str = DEFAULT_PART,
    clock: float | str = DEFAULT_CLOCK_NS,
    calibration: Mapping[str, npt.NDArray[Any]] | str | os.PathLike[str] | None = None,
    max_dsp: int | None = None,
    max_latency: float | str | None = None,
    max_interval: float | str | None = None,
    patterns: Sequence[str] | None = None,
    vectors: int = 1,
    skip: str | None = None,
    rtl: bool = False,
    pareto: str | os.PathLike[str] | None = None,
) -> Design:
    """Write a project of HLS C++ for an ONNX model.

    Args:
        model: a chain of layers, in QDQ form or float.
        output: the folder to write; files of a project that lie in it are replaced.
        part: the device, one of `sparsecomp.targets.hls.part_names()`.
        clock: nanoseconds, also as "5ns".
        calibration: samples of the input by its name along the first axis, or an .npz file with them; a float model is
            quantised on them, and the first are recorded for the testbench, which has random values otherwise.
        max_dsp: DSP slices that the design may take; those of the part if None. It is made as fast as they allow.
        max_latency: of one call, nanoseconds or as "1ms"; the design is made as small as it allows.
        max_interval: between calls that follow each other, as max_latency.
        patterns: printed patterns that may be used; every one that a weight satisfies if None.
        vectors: rows of one call, where the model leaves them open.
        skip: "relu" or "threshold:P": linears leave out hidden units through a queue, and take time for those that stay
            (`sparsecomp.hls.skipping.with_skips`); how many, is estimated on the first calibration samples.
        rtl: whether the folder `rtl` gets the design as DSLX and as the Verilog that XLS makes of it.
        pareto: a picture to write, .png, .svg or .pdf: the least latency for every number of DSP slices of the part
            (`sparsecomp.hls.pareto.front`).

    Returns:
        The design: its network is the integer reference, its options say what was chosen.

    Raises:
        ValueError: the model, an option or the part is bad, an operation is not supported (the message names the node),
            or the design does not fit. Nothing is written.
        FileNotFoundError: there is no such file.
    """
    device = part_of(part)
    clock_ns = _nanoseconds("clock", clock)
    cycles, interval = (
        None if given is None else int(_nanoseconds(name, given) / clock_ns)
        for name, given in (("max_latency", max_latency), ("max_interval", max_interval))
    )
    for name, value in (("max_dsp", max_dsp), ("vectors", vectors)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, given {value}")
    picture = None if pareto is None else _picture(Path(pareto))
    title = Path(model).name if isinstance(model, (str, os.PathLike)) else "the model"
    samples = _samples(calibration)
    loaded = load(model)
    if not is_quantised(loaded):
        loaded = quantise(loaded, title, samples)
    network = without_dead_units(network_of(loaded, title, vectors))
    recorded = _recorded(network, samples)
    if skip is not None:
        network = with_skips(network, skip, recorded)
    made = design(network, device, max_dsp=max_dsp, max_cycles=cycles, max_interval=interval, patterns=patterns)
    files = project(made, recorded, clock_ns=clock_ns)
    if rtl:
        files |= {f"rtl/{name}": content for name, content in rtl_project(made).items()}
    if picture is not None:
        front(made, clock_ns=clock_ns, patterns=patterns).plot().figure.savefig(picture)
    write_package(files, Path(output))
    return made


def _picture(path: Path) -> Path:
    """The path, if a picture can be written there."""
    if path.suffix.lower() not in _PICTURES:
        raise ValueError(f"pareto must end in {', '.join(_PICTURES)}, given {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"pareto: there is no folder {str(path.parent)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("pareto draws with matplotlib: pip install 'sparsecomp[plot]'")
    return path


def _nanoseconds(name: str, given: float | str) -> float:
    found = re.fullmatch(r"\s*([0-9.]{1,20})\s*(ns|us|ms|s)?\s*", str(given))
    try:
        value = float(found[1]) * _UNITS[found[2] or "ns"] if found else 0.0
    except ValueError:
        value = 0.0
    if not value > 0 or not isfinite(value):
        raise ValueError(f"{name} must be a time such as '5ns' or '1ms', given {given!r}")
    return value


def _samples(given: Any) -> Mapping[str, npt.NDArray[Any]] | None:
    if given is None or isinstance(given, Mapping):
        return given
    path = Path(given)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give an .npz file with samples of the input by its name")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # whatever NumPy raises for what is no archive
        raise ValueError(f"{path} is no .npz file of arrays: {error}") from error


def _recorded(network: Network, samples: Mapping[str, npt.NDArray[Any]] | None) -> npt.NDArray[np.int8]:
    """Inputs for the testbench, `[calls, vectors, width]`."""
    shape = network.shape
    if samples is None:
        random = np.random.default_rng(0).integers(LOW, HIGH + 1, (_RECORDED, shape.vectors, shape.width))
        return random.astype(np.int8)
    values = np.concatenate([np.asarray(given, np.float32).reshape(-1) for given in samples.values()])
    calls = min(_RECORDED, values.size // shape.values)
    if calls < 1:
        raise ValueError(f"the calibration data has {values.size} values, a call takes {shape.values}")
    real = values[: calls * shape.values]
    if shape.height:
        real = real.reshape(calls, shape.width, shape.vectors).transpose(0, 2, 1)
    return network.quantise(real.reshape(calls, shape.vectors, shape.width))
