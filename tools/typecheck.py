"""Run mypy on the package as it installs.

`passes/` and `targets/` install as `sparsecomp.passes` and `sparsecomp.targets`. An editable install maps them by an
import hook, which no type checker follows, so this lays out the installed package with symbolic links under build/types
and checks it there. Arguments go to mypy; messages name the files at their real places.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "types"


def lay_out() -> None:
    """Make build/types/sparsecomp: links to the entries of sparsecomp/ and, beside them, to passes/ and targets/."""
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "sparsecomp"
    package.mkdir(parents=True)
    for entry in (ROOT / "sparsecomp").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name in ("passes", "targets"):
        (package / name).symlink_to(ROOT / name)


def main() -> int:
    """Check the package; the exit status is mypy's."""
    lay_out()
    command = [sys.executable, "-m", "mypy", "-p", "sparsecomp", *sys.argv[1:]]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    text = re.sub(r"build/types/sparsecomp/(passes|targets)/", r"\1/", result.stdout)
    sys.stdout.write(text.replace("build/types/sparsecomp/", "sparsecomp/"))
    sys.stderr.write(result.stderr)
    return result.returncode


if __name__ == "__main__":
    raise SystemExit(main())
