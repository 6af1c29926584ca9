"""`sparsecomp info` and `sparsecomp calibrate`: the machine, and its measurement for the cost model."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from sparsecomp.cli.common import errors_for_people


def info(
    target: Annotated[str | None, typer.Option(help="Name of a target; this machine's if not given.")] = None,
) -> None:
    """Print the machine, the target, its calibration and the cache folder."""
    import torch

    from sparsecomp.runtime.cache import cache_dir
    from sparsecomp.targets import get_target

    with errors_for_people():
        chosen = get_target(target)
        for label, value in (
            ("machine", f"{_processor()}, {torch.get_num_threads()} threads"),
            ("torch", torch.__version__),
            ("target", f"{chosen.name}: {chosen.description}"),
            ("cache", cache_dir()),
        ):
            print(f"{label:8} {value}")


def calibrate(
    results: Annotated[
        Path | None,
        typer.Option("--from", help="Take what an exported package measured on a board (its --results) instead."),
    ] = None,
) -> None:
    """Measure this machine and its NVIDIA card for the cost model, in about a minute; the cache folder keeps it."""
    with errors_for_people():
        if results is not None:
            from sparsecomp.targets.arm.calibration import calibrate_from

            _print_factors(calibrate_from(results))
            return
        print("measuring; other work on the machine would spoil the result ...", file=sys.stderr)
        _measure_cpu()
        _measure_card()


def _measure_cpu() -> None:
    from sparsecomp.targets import get_target
    from sparsecomp.targets.arm.machine import ArmMachine

    target = get_target()
    if isinstance(target, ArmMachine):
        from sparsecomp.targets.arm.calibrate import calibrate as measure_arm

        _print_factors(measure_arm(target))
        return
    if (reason := target.why_not_here()) is not None:
        print(f"{target.name} is not measured: {reason}")
        return
    from sparsecomp.targets.x86.calibrate import calibrate as measure

    print(measure())
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime"):
        from sparsecomp.targets.x86.ort_calibrate import calibrate as measure_ort

        print(f"\nONNX Runtime: {measure_ort()}")


def _measure_card() -> None:
    import torch

    if not torch.cuda.is_available():
        return
    from sparsecomp.targets.cuda import cards
    from sparsecomp.targets.cuda.calibrate import calibrate as measure_card
    from sparsecomp.targets.cuda.target import CudaTarget

    try:
        found = cards.card_here()
    except ValueError as error:
        print(f"\nthe GPU is not measured: {error}")
        return
    print(f"\n{found.board}:")
    _print_factors(measure_card(CudaTarget(found)))


def _print_factors(factors: Mapping[str, tuple[float, int]]) -> None:
    for family, (factor, calls) in factors.items():
        print(f"{family:15} takes {factor:.2f} times what was counted (median of {calls} calls)")
    if "dense" not in factors and {"rows", "panel"} & set(factors):
        print("no dense linear was measured; a package of the model before it was pruned has some to compare with")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the name that Python has is the next best
    import platform

    return platform.processor() or platform.machine()
