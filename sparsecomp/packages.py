"""Writing what is exported, for boards and for FPGAs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_package(files: Mapping[str, bytes], output: Path) -> None:
    """Write files into a folder beside their places, then move each there: a failure leaves no half of a file.

    Args:
        files: contents by their paths in the package.
        output: folder, made if it is not there; its other files stay.

    Raises:
        ValueError: output is a file.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give the path of a folder")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".sparsecomp.", dir=output) as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        for name in files:
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(folder) / name, output / name)
