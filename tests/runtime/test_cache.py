"""The cache of compiled kernels: built once, found again, and never loaded where it cannot be trusted."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsecomp.runtime import cache
from sparsecomp.runtime.cache import BuildError, cache_dir, key_of, load_or_build

KEY = key_of("answer")


class Source:
    """A C function that gives a number; counts how often it was asked for."""

    def __init__(self, answer: int = 42) -> None:
        self.answer, self.writes = answer, 0

    def __call__(self, folder: Path) -> Path:
        self.writes += 1
        path = folder / "answer.c"
        path.write_text(f"int answer(void) {{ return {self.answer}; }}\n")
        return path

    def load(self) -> int:
        library = load_or_build(KEY, self)
        return library.answer()


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(tmp_path / "cache", monkeypatch)


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: an own cache folder, and nothing in memory."""
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(folder))
    monkeypatch.setattr(cache, "_loaded", {})


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def restart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go on with a copy of the cache.

    The dynamic loader knows libraries by path and inode and would give back the one it has, whose file must stay as it
    was mapped.
    """
    moved = folder.with_name(folder.name + "x")
    shutil.copytree(folder, moved)
    use(moved, monkeypatch)
    return moved


class TestBuiltOnce:
    def test_in_a_process(self) -> None:
        source = Source()
        assert source.load() == source.load() == 42
        assert source.writes == 1

    def test_on_disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = Source()
        source.load()
        folder = restart(cache_dir(), monkeypatch)
        assert source.load() == 42
        assert source.writes == 1
        assert sorted(path.name for path in (folder / "kernels").iterdir()) == [f"{KEY}.sha256", f"{KEY}.so"]

    def test_without_a_compiler_the_second_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = Source()
        source.load()
        restart(cache_dir(), monkeypatch)
        monkeypatch.setenv("PATH", "")
        monkeypatch.setenv("CC", "")
        assert source.load() == 42

    def test_by_threads_at_once(self) -> None:
        source, answers = Source(), []
        threads = [threading.Thread(target=lambda: answers.append(source.load())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [42] * 4
        assert source.writes == 1

    def test_for_its_owner_only(self) -> None:
        Source().load()
        folder = cache_dir() / "kernels"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())

    def test_other_keys_are_other_files(self) -> None:
        first = load_or_build(key_of("a"), Source(1))
        second = load_or_build(key_of("b"), Source(2))
        assert (first.answer(), second.answer()) == (1, 2)


def _evil(folder: Path) -> Path:
    """A sound library that must never be loaded."""
    path = folder / "evil.so"
    shutil.copy(folder.parent.parent / "evil" / "kernels" / f"{KEY}.so", path)
    return path


def _replaced(so: Path, digest: Path) -> None:
    shutil.copy(_evil(so.parent), so)


def _truncated(so: Path, digest: Path) -> None:
    so.write_bytes(so.read_bytes()[:1000])


def _empty(so: Path, digest: Path) -> None:
    so.write_bytes(b"")


def _digest_missing(so: Path, digest: Path) -> None:
    _replaced(so, digest)
    digest.unlink()


def _digest_garbage(so: Path, digest: Path) -> None:
    digest.write_bytes(b"\xff\xfe\x00garbage")


def _digest_empty(so: Path, digest: Path) -> None:
    digest.write_bytes(b"")


def _digest_of_another(so: Path, digest: Path) -> None:
    digest.write_text(key_of("another") * 2)


def _link(so: Path, digest: Path) -> None:
    evil = _evil(so.parent)
    so.unlink()
    so.symlink_to(evil)
    digest.write_text(digest_of(evil))


def _link_to_nothing(so: Path, digest: Path) -> None:
    so.unlink()
    so.symlink_to("nowhere")


def _digest_link(so: Path, digest: Path) -> None:
    _replaced(so, digest)
    elsewhere = digest.with_suffix(".elsewhere")
    elsewhere.write_text(digest_of(so))
    digest.unlink()
    digest.symlink_to(elsewhere)


def _group_writable(so: Path, digest: Path) -> None:
    _replaced(so, digest)
    digest.write_text(digest_of(so))
    so.chmod(0o620)


def _digest_world_writable(so: Path, digest: Path) -> None:
    _replaced(so, digest)
    digest.write_text(digest_of(so))
    digest.chmod(0o602)


def _folder_group_writable(so: Path, digest: Path) -> None:
    _replaced(so, digest)
    digest.write_text(digest_of(so))
    so.parent.chmod(0o770)


def _of_another_user(so: Path, digest: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give files away")
    _replaced(so, digest)
    digest.write_text(digest_of(so))
    os.chown(so, 12345, -1)


DAMAGES: dict[Callable[[Path, Path], None], str] = {
    _replaced: "its content is not what was written",
    _truncated: "its content is not",
    _empty: "its content is not",
    _digest_missing: ".sha256 is missing",
    _digest_garbage: "its content is not",
    _digest_empty: "its content is not",
    _digest_of_another: "its content is not",
    _link: ".so is a link",
    _link_to_nothing: ".so is a link",
    _digest_link: ".sha256 is a link",
    _group_writable: ".so can be written by other users",
    _digest_world_writable: ".sha256 can be written by other users",
    _folder_group_writable: "kernels can be written by other users",
    _of_another_user: ".so belongs to another user",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__.strip("_"))
def test_what_is_not_sound_is_built_again_and_never_loaded(
    damage: Callable[[Path, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use(tmp_path / "evil", monkeypatch)
    assert Source(666).load() == 666
    use(tmp_path / "cache", monkeypatch)
    source = Source()
    source.load()
    folder = restart(cache_dir(), monkeypatch) / "kernels"
    damage(folder / f"{KEY}.so", folder / f"{KEY}.sha256")
    with caplog.at_level(logging.WARNING, logger="sparsecomp"):
        assert source.load() == 42
    assert source.writes == 2
    (record,) = caplog.records
    assert "is built again: " in record.getMessage()
    assert DAMAGES[damage] in record.getMessage()
    # What replaced it is sound.
    restart(cache_dir(), monkeypatch)
    assert source.load() == 42
    assert source.writes == 2


def test_a_folder_that_is_a_link_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(tmp_path / "evil", monkeypatch)
    assert Source(666).load() == 666
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(tmp_path / "evil" / "kernels")
    use(tmp_path / "cache", monkeypatch)
    source = Source()
    assert source.load() == 42
    assert source.writes == 1


@pytest.mark.parametrize("inside", ["", "deeper/still"])
def test_where_the_cache_cannot_be_written_kernels_are_built_for_the_process(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A file in the place of the folder: that stops root, too.
    (tmp_path / "file").write_text("occupied")
    use(tmp_path / "file" / inside, monkeypatch)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    source = Source()
    with caplog.at_level(logging.WARNING, logger="sparsecomp"):
        assert source.load() == source.load() == 42
    assert source.writes == 1
    (record,) = caplog.records
    assert "cannot be written" in record.getMessage()
    assert str(tmp_path / "sparsecomp.") in record.getMessage()


class TestBuildError:
    def test_names_the_compilers_that_are_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        monkeypatch.setenv("CC", "my-own-cc")
        with pytest.raises(BuildError, match=r"no C compiler found \(looked for my-own-cc, cc, gcc, clang\).*set CC"):
            Source().load()

    def test_says_what_the_compiler_said(self) -> None:
        def write(folder: Path) -> Path:
            path = folder / "wrong.c"
            path.write_text("int answer(void) { return surprise; }\n")
            return path

        with pytest.raises(BuildError, match=r"(?s)wrong\.c .*failed with code 1:.*surprise"):
            load_or_build(KEY, write)
        # And leaves nothing that could be taken for the kernel.
        assert Source().load() == 42

    def test_a_compiler_that_does_not_finish(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compiler = tmp_path / "slow-cc"
        compiler.write_text("#!/bin/sh\nexec sleep 60\n")
        compiler.chmod(0o700)
        monkeypatch.setenv("CC", str(compiler))
        monkeypatch.setattr(cache, "_LINK_SECONDS", 0.2)
        with pytest.raises(BuildError, match=r"slow-cc did not finish within 0\.2 s"):
            Source().load()

    def test_cc_is_preferred(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        compiler = tmp_path / "my-cc"
        compiler.write_text(f'#!/bin/sh\ntouch "{tmp_path}/was-used"\nexec {real} "$@"\n')
        compiler.chmod(0o700)
        monkeypatch.setenv("CC", str(compiler))
        assert Source().load() == 42
        assert (tmp_path / "was-used").exists()


def test_the_variable_chooses_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv(cache.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir().name == "sparsecomp"
    monkeypatch.setenv(cache.CACHE_VARIABLE, "")
    assert cache_dir().name == "sparsecomp"


def test_keys_tell_parts_apart() -> None:
    keys = [key_of("ab", "c"), key_of("a", "bc"), key_of("abc"), key_of("abc", ""), key_of("ab", "c", "")]
    assert len(set(keys)) == len(keys)
    assert key_of("ab", "c") == keys[0]
    assert all(len(key) == 32 and key.isalnum() for key in keys)
