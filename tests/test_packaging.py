"""The package as it installs: mapped folders, entry point, data files."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import sparsecomp

ROOT = Path(__file__).resolve().parent.parent


def test_top_level_folders_install_as_subpackages() -> None:
    import sparsecomp.passes
    import sparsecomp.targets

    assert Path(sparsecomp.passes.__file__).parent.name == "passes"
    assert Path(sparsecomp.targets.__file__).parent.name == "targets"


def test_the_backend_is_found_through_its_entry_point() -> None:
    (found,) = entry_points(group="torch_dynamo_backends", name="sparse")
    assert found.value == "sparsecomp.backend:sparse"
    assert callable(found.load())


def test_every_public_name_is_there() -> None:
    for name in sparsecomp.__all__:
        assert getattr(sparsecomp, name) is not None, name


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_data_file(tmp_path: Path) -> None:
    # From a copy: setuptools leaves its build folder in the source.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("sparsecomp", "passes", "targets"):
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                copy = source / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-c",
        "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])",
    ]
    result = subprocess.run([*command, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for path in source.rglob("*"):
        if path.is_file() and path.name != "setup.py":
            relative = path.relative_to(source)
            if relative.parts[0] not in ("sparsecomp", "passes", "targets"):
                continue
            inside = relative.as_posix() if relative.parts[0] == "sparsecomp" else f"sparsecomp/{relative.as_posix()}"
            assert inside in held
