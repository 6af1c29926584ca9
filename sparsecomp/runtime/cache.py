"""Compiled kernels as shared objects in the user's cache directory.

A file is named by the hash of everything that shaped it and lies beside the SHA-256 of its content. What is damaged,
belongs to somebody else or could be written by others is built again and never loaded; nothing is unpickled. The hash
takes the source text of the kernel modules instead of the printed TIR that they give, which says the same and lets a
warm start pass without importing TVM.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import platformdirs

from sparsecomp.log import log

CACHE_VARIABLE = "SPARSECOMP_CACHE_DIR"
_LINK_SECONDS = 120
_ABSENT = "it is not there"

_loaded: dict[str, ctypes.CDLL] = {}
_lock = threading.Lock()


class BuildError(RuntimeError):
    """A kernel could not be built here; the message says which tool failed and how."""


def cache_dir() -> Path:
    """The directory of kernels and calibrations: `$SPARSECOMP_CACHE_DIR`, or the platform's user cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("sparsecomp"))


def key_of(*parts: str) -> str:
    """Name of a cached object from everything that shapes it."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()[:32]


def load_or_build(key: str, write_input: Callable[[Path], Path], flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The shared object of a key: from this process, from the cache, or linked now.

    Args:
        key: from `key_of`.
        write_input: writes an object or a C source into the folder it is given and returns its path; only called
            when the cache has no sound file.
        flags: for the C compiler.

    Raises:
        BuildError: there is no C compiler, or it failed.
    """
    with _lock:
        if key not in _loaded:
            path = _find_or_make(f"{key}.so", lambda folder: link([write_input(folder)], folder / "linked.so", flags))
            try:
                _loaded[key] = ctypes.CDLL(str(path))
            except OSError as error:
                raise BuildError(
                    f"{path} cannot be loaded ({error}); if its file system is mounted noexec, set {CACHE_VARIABLE} to "
                    f"another folder"
                ) from error
        return _loaded[key]


def built_file(key: str, suffix: str, make: Callable[[Path], Path]) -> Path:
    """The file of a key, from the cache or made now, for what is not loaded here: objects and libraries for others.

    Args:
        key: from `key_of`.
        suffix: of the file, with its dot.
        make: makes the file in the folder it is given and returns its path.

    Raises:
        BuildError: it could not be written.
    """
    with _lock:
        return _find_or_make(f"{key}{suffix}", make)


def _find_or_make(name: str, make: Callable[[Path], Path]) -> Path:
    """The sound file of a name in the cache, or made now."""
    folder = cache_dir() / "kernels"
    path = folder / name
    reason = _unsound(path)
    if reason is None:
        return path
    if reason != _ABSENT:
        log.warning("%s is built again: %s", path, reason)
    return _build(name, folder, make)


def _unsound(path: Path) -> str | None:
    """Why a cached file must not be loaded; None if it may."""
    digest = path.with_suffix(".sha256")
    for file in (path.parent, path, digest):
        try:
            status = file.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return _ABSENT if file != digest else f"{file.name} is missing"
        except OSError as error:
            return f"{file.name} cannot be looked at: {error.strerror}"
        if stat.S_ISLNK(status.st_mode):
            return f"{file.name} is a link"
        if status.st_uid != os.getuid():
            return f"{file.name} belongs to another user"
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"{file.name} can be written by other users"
    if digest.read_bytes().strip() != hashlib.sha256(path.read_bytes()).hexdigest().encode():
        return "its content is not what was written"
    return None


def _build(name: str, folder: Path, make: Callable[[Path], Path]) -> Path:
    """Make a file in the cache; where that cannot be written, in a private folder that lasts as long as the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        work = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=folder))
    except OSError as error:
        work = Path(tempfile.mkdtemp(prefix="sparsecomp."))
        log.warning("the kernel cache %s cannot be written (%s): kernels are kept in %s", folder, error, work)
        folder = work
    path = folder / name
    try:
        made = make(work)
        made.chmod(0o600)
        (work / "digest").write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        (work / "digest").chmod(0o600)
        # Two renames are not one step: a reader between them finds a digest that does not fit, and builds for itself.
        os.replace(work / "digest", path.with_suffix(".sha256"))
        os.replace(made, path)
    except OSError as error:
        raise BuildError(f"a kernel cannot be written to {folder}: {error}") from error
    finally:
        if work != folder:
            shutil.rmtree(work, ignore_errors=True)
    return path


def link(inputs: Sequence[Path], output: Path, flags: Sequence[str] = ()) -> Path:
    """Make a shared object of C sources and object files; returns its path.

    Raises:
        BuildError: there is no C compiler, or it failed.
    """
    compiler = _compiler()
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(output), *map(str, inputs), *flags]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_LINK_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{compiler} did not finish within {_LINK_SECONDS} s: {' '.join(command)}") from error
    if result.returncode:
        raise BuildError(f"{' '.join(command)} failed with code {result.returncode}:\n{result.stderr[:4000]}")
    return output


def _compiler() -> str:
    names = [name for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name]
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(f"no C compiler found (looked for {', '.join(names)}): install one, such as gcc, or set CC")
