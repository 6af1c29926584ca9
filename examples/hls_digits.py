"""Train a digits classifier, prune it to 2:4, and export it for an FPGA: accuracy in int8, and C simulation.

Run with `python examples/hls_digits.py [--output build/digits]`; it takes under a minute. The data comes with
scikit-learn (`pip install scikit-learn`): 1797 pictures of 8 x 8 pixels.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

import sparsecomp
from sparsecomp.hls.api import export_hls


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures `[n, 1, 8, 8]` and labels to train on, then those to test on."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("this example needs the digits of scikit-learn: pip install scikit-learn") from None
    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1297], y[:1297], x[1297:], y[1297:]


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for part in order.split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimiser.step()


def exported(model: nn.Module, x: Tensor) -> onnx.ModelProto:
    with torch.no_grad():
        made = torch.onnx.export(model.eval(), (x[:1],), dynamo=True, verbose=False, input_names=["x"])
    return made.model_proto


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--output", type=Path, default=Path("build/digits"))
    arguments.add_argument("--pattern", default="2:4", help="of all layers but the first, such as 2:4 or 1:4")
    arguments.add_argument("--part", default="xc7z020")
    arguments.add_argument("--max-dsp", type=int, default=100)
    given = arguments.parse_args()

    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    dense = network()
    train(dense, x, y, 30)
    sparse = copy.deepcopy(dense)
    sparsecomp.sparsify_(sparse, given.pattern, filter_fn=lambda _, name: name != "0")
    with sparsecomp.freeze_masks(sparse):
        train(sparse, x, y, 15)
        train(sparse, x, y, 15)  # a new optimiser: 1:4 needs it

    design = export_hls(
        exported(sparse, x), output=given.output, part=given.part, calibration={"x": x.numpy()}, max_dsp=given.max_dsp
    )
    print(design)
    quantised = design.network.quantise(test_x.numpy()).reshape(len(test_x), 64, 1)
    guesses = np.array([design.network.run(picture)[0].argmax() for picture in quantised])
    with torch.no_grad():
        for name, model in (("float dense", dense), (f"float {given.pattern}", sparse)):
            print(f"{name:14} {float((model(test_x).argmax(1) == test_y).float().mean()):.4f} of {len(test_y)} right")
    print(f"{'int8 design':14} {float((guesses == test_y.numpy()).mean()):.4f}")
    subprocess.run(["make", "-s", "-C", str(given.output), "csim"], check=True)


if __name__ == "__main__":
    main()
