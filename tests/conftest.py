"""What every test shares: random numbers, a fresh Dynamo, a cache folder, and skips for what this machine lacks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# Tests import `models` and the benchmarks' helpers by name, from wherever pytest is started.
ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "tests", ROOT / "benchmarks"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# Not the user's cache folder: a calibration in it would change what is chosen. It is kept between runs, since kernels
# are found by the hash of what shaped them.
os.environ.setdefault("SPARSECOMP_CACHE_DIR", str(ROOT / "build" / "test-cache"))


# A first example may import or compile something; no test is about time.
hypothesis.settings.register_profile("sparsecomp", deadline=None)
hypothesis.settings.load_profile("sparsecomp")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    # A test that compiled must not leave its recompile counts, or its hooks on a backend, to the next one.
    torch._dynamo.reset()


@pytest.fixture
def threads() -> Iterator[None]:
    """Put back PyTorch's number of threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; none is visible to PyTorch"))
