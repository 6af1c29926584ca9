"""A pruned FFN as a package for NVIDIA cards, made on a machine without one.

`python examples/cuda_export.py [FOLDER]` writes sources, cubins, weights and a C++ program for two architectures; the
program checks and times the layers on a card, see FOLDER/README.md. Needs NVRTC: pip install 'sparsecomp[cuda,arm]'.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import sparsecomp


def main() -> None:
    """Prune to panels of 16 rows that keep 1 of 8 columns, and export for one token."""
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "cuda_package")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2048, 5632), nn.SiLU(), nn.Linear(5632, 2048)).half().eval()
    sparsecomp.sparsify_(model, "16:1:8", criterion="magnitude")
    token = torch.randn(1, 2048).half()
    print(sparsecomp.export(model, [token], target="cuda:h100", arch=["sm_90", "sm_80"], output=output))
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>10} {path.relative_to(output)}")


if __name__ == "__main__":
    main()
