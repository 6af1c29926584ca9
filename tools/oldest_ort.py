"""Run models that this checkout writes in the oldest ONNX Runtime that they are said to run in.

`python tools/oldest_ort.py` writes models with their libraries, installs that version into a virtual environment of its
own (which needs a package index), and compares there: the original, the written model without its library, and with it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5
CALLS = 6  # in the first ones a library counts the threads of its session


def write(folder: Path) -> None:
    """Models of every kernel family and of two real networks, each in a folder with inputs."""
    sys.path.insert(0, str(ROOT / "tests"))
    import onnx
    import onnx_cases as cases

    import sparsecomp.onnx

    x = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    weight, bias = cases.sparse_array(96, 128, density=0.2), np.ones(128, np.float32)
    for kernel in ("rows", "gather", "mask", "panel"):
        matrix = cases.panel_array(96, 128) if kernel == "panel" else weight
        for opset in (9, 13, 19):
            model, place = cases.linear_model(matrix, bias, opset=opset), folder / f"{kernel}, opset {opset}"
            place.mkdir()
            cases.optimized(model, place, kernel=kernel)
            onnx.save(model, place / "original.onnx")
            np.savez(place / "inputs.npz", x=x)
    images = np.random.default_rng(1).random((1, 224, 224, 3)).astype(np.float32) * 255 - 110
    real = {
        "paraphrase": (cases.paraphrase(), cases.token_feeds(1, 64)),
        "OpenNSFW": (cases.opennsfw(), {"input:0": images}),
    }
    for name, (model, feeds) in real.items():
        pruned, place = cases.pruned(model, 0.85), folder / name
        place.mkdir()
        sparsecomp.onnx.optimize(pruned, place / "model.sparse.onnx")
        onnx.save(pruned, place / "original.onnx")
        np.savez(place / "inputs.npz", **feeds)


def run(folder: Path) -> int:
    """Compare what `write` left; the number of models that differ."""
    import onnxruntime

    print(f"ONNX Runtime {onnxruntime.__version__}")
    wrong = 0
    for place in sorted(folder.iterdir()):
        feeds = dict(np.load(place / "inputs.npz"))
        expected = onnxruntime.InferenceSession(place / "original.onnx").run(None, feeds)
        worst = 0.0
        for library in (None, place / "model.sparse.so"):
            for threads in (1, 2):
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = threads
                if library is not None:
                    options.register_custom_ops_library(str(library))
                session = onnxruntime.InferenceSession(place / "model.sparse.onnx", options)
                given = [session.run(None, feeds) for _ in range(CALLS)][-1]
                worst = max(worst, *(_difference(a, b) for a, b in zip(given, expected, strict=True)))
        print(f"{place.name}: largest difference {worst:.1e}")
        wrong += not worst <= TOLERANCE
    return wrong


def _difference(given: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(given.astype(float) - expected).max() / max(np.abs(expected).max(), 1e-9))


def main() -> int:
    """Write, install, and run there."""
    if sys.argv[1:2] == ["--run"]:
        return run(Path(sys.argv[2]))
    found = re.search(r'"onnxruntime>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    if found is None:
        raise ValueError('pyproject.toml does not say which onnxruntime is the oldest: expected "onnxruntime>=VERSION"')
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "models").mkdir()
        write(folder / "models")
        venv.create(folder / "venv", with_pip=True)
        python = str(folder / "venv" / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "-q", f"onnxruntime=={found[1]}.0", "numpy<2"], check=True)
        return subprocess.run([python, __file__, "--run", str(folder / "models")], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
