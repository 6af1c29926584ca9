"""The logger of the package, and the debug files that `SPARSECOMP_DEBUG` asks for.

`TORCH_LOGS="+sparsecomp"` (debug), `"sparsecomp"` (info) and `"-sparsecomp"` (errors) set the level of the logger, as
for torch's own. `SPARSECOMP_DEBUG` writes files, one folder per compiled graph, under `SPARSECOMP_DEBUG_DIR` (default:
`sparsecomp_debug` in the current directory):

| level | files |
| --- | --- |
| 1 | `plan.json` and `plan.txt`: what was chosen for every site, and why |
| 2 | also the graph of the front end before and after, and the sparse graph before and after every pass |
| 3 | also the generated code of every kernel |
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from pathlib import Path

import torch._logging._internal as torch_logging

log = logging.getLogger("sparsecomp")

# Known to torch under this name, so that torch._logging.set_logs(modules={"sparsecomp": ...}) reaches it too.
# TORCH_LOGS itself is read while torch is imported, where the name of any importable module is accepted.
torch_logging.register_log("sparsecomp", "sparsecomp")

PLAN, GRAPHS, CODE = 1, 2, 3

_folders = itertools.count()
_UNSAFE = re.compile(r"[^A-Za-z0-9_.#-]+")


def debug_level() -> int:
    """The level that `SPARSECOMP_DEBUG` asks for, 0 to 3; a value that is no level is reported and taken as 0."""
    text = os.environ.get("SPARSECOMP_DEBUG", "").strip()
    if text in ("", "0"):
        return 0
    if text in ("1", "2", "3"):
        return int(text)
    log.warning(
        "SPARSECOMP_DEBUG is %r: expected 0, 1 (plan), 2 (and graphs) or 3 (and generated code); nothing is written",
        text,
    )
    return 0


class DebugFolder:
    """Writes the debug files of one compiled graph; does nothing for what is above the level.

    A folder that cannot be written is reported once and then left alone: debugging must not break a compilation.

    Attributes:
        level: what `debug_level` gave when the folder was made.
        path: the folder, made when the first file is written; None while there is none.
    """

    def __init__(self) -> None:
        self.level = debug_level()
        self.path: Path | None = None
        self._files = itertools.count()
        self._broken = False

    def wants(self, level: int) -> bool:
        """Whether files of that level are written; ask before a text that is costly to make."""
        return self.level >= level and not self._broken

    def write(self, level: int, name: str, text: str, *, numbered: bool = False) -> None:
        """Write a file if the level asks for it.

        Args:
            level: of the file: `PLAN`, `GRAPHS` or `CODE`.
            name: of the file; characters that do not belong in one become underscores.
            text: its content.
            numbered: put a running number before the name, for files whose order matters.
        """
        if not self.wants(level):
            return
        try:
            if self.path is None:
                self.path = self._make()
            stem = _UNSAFE.sub("_", name)
            if numbered:
                stem = f"{next(self._files):02d}_{stem}"
            (self.path / stem).write_text(text, encoding="utf-8")
        except OSError as error:
            self._broken = True
            log.warning("SPARSECOMP_DEBUG: cannot write %s: %s", name, error)

    @staticmethod
    def _make() -> Path:
        root = Path(os.environ.get("SPARSECOMP_DEBUG_DIR") or "sparsecomp_debug")
        while True:
            path = root / f"process_{os.getpid()}_graph_{next(_folders):03d}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:  # left by an earlier process of the same number
                continue
            log.info("debug files in %s", path)
            return path
