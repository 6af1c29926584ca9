"""Programs of `torch.export` from files that need not be trusted."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load_program(path: Path) -> torch.export.ExportedProgram:
    """Read a .pt2 file; tensors in it are read without unpickling code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no program, or one that cannot be read without pickle.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give the path of a program of torch.export")
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PyTorch's own calls that will change
            return torch.export.load(path)
    except Exception as error:  # whatever the loader raises for what is no program
        raise ValueError(f"{path} is no program of torch.export that can be read without pickle: {error}") from error
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before
