"""What the CUDA kernels take of a multiprocessor, as NVRTC's assembler says; needs no GPU.

`python benchmarks/bench_cuda.py` compiles every kernel for every architecture (about a minute); what spills is in the
table. The registers and shared memory go to `targets/cuda/kernels.json` too, from which the prices take the occupancy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from timing import Results, Row

from sparsecomp.cuda.library import FFN, KERNELS
from sparsecomp.cuda.nvrtc import ARCHITECTURES, Resources, compile_kernel, resources

DATA = Path(__file__).resolve().parents[1] / "targets" / "cuda" / "kernels.json"
COMMENT = (
    "Registers of a thread and bytes of static shared memory of a block, as ptxas reports them; by architecture and "
    "kernel. Written by benchmarks/bench_cuda.py."
)


def entries() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Name, source, defines and entry point of each kernel; an FFN has two."""
    for kernel in KERNELS:
        yield kernel.name, kernel.source, kernel.defines, kernel.entry
    for ffn in FFN:
        for entry in (ffn.hidden_entry, ffn.down_entry):
            yield f"{ffn.name}, {entry}", ffn.source, ffn.defines, entry


def compiled() -> dict[str, dict[str, Resources]]:
    """What each kernel takes, by its name and the architecture."""
    return {
        name: {arch: resources(compile_kernel(source, arch, defines)[2], entry) for arch in ARCHITECTURES}
        for name, source, defines, entry in entries()
    }


def main() -> None:
    """Compile all of them, print the table, and write the results and the data of the prices."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    nvrtc = f"nvidia-cuda-nvrtc {version('nvidia-cuda-nvrtc')}"
    results = Results(
        "cuda",
        notes=[
            f"compiled by {nvrtc}; nothing ran on a card",
            "registers of a thread / bytes of static shared memory of a block",
        ],
    )
    found = compiled()
    for name, taken in found.items():
        details = {arch: f"{item.registers} / {item.shared}" for arch, item in taken.items()}
        spilled = max(item.spilled for item in taken.values())
        results.add(Row(f"{name}: spilled, worst architecture", spilled, "bytes", 0, at_most=True, details=details))
    taken_of = {
        arch: {name: [of[arch].registers, of[arch].shared] for name, of in found.items()} for arch in ARCHITECTURES
    }
    lines = [f'  "{arch}": {json.dumps(taken)}' for arch, taken in taken_of.items()]
    head = f' "comment": {json.dumps(COMMENT)},\n "compiler": {json.dumps(nvrtc)}'
    kernels = ",\n".join(lines)
    DATA.write_text(f'{{\n{head},\n "kernels": {{\n{kernels}\n }}\n}}\n', encoding="utf-8")
    results.finish()


if __name__ == "__main__":
    main()
