"""Writing packages: whole files, in place of older ones, and nothing left beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsecomp.packages import write_package


def test_files_replace_older_ones_and_others_stay(tmp_path: Path) -> None:
    output = tmp_path / "new" / "package"
    write_package({"a.c": b"old", "kernels/k.o": b"1"}, output)
    (output / "notes.txt").write_text("mine")
    write_package({"a.c": b"new"}, output)
    found = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert found == {"a.c": b"new", "kernels/k.o": b"1", "notes.txt": b"mine"}


def test_a_file_in_the_place_of_the_folder_is_refused_and_kept(tmp_path: Path) -> None:
    output = tmp_path / "package"
    output.write_bytes(b"a file")
    with pytest.raises(ValueError, match="is a file; give the path of a folder"):
        write_package({"a.c": b""}, output)
    assert output.read_bytes() == b"a file"
