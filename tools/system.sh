#!/usr/bin/env bash
# Check what pip cannot install: a C++ compiler with OpenMP and Python's headers, which torch.compile's Inductor calls at
# run time, and the venv module. As root on a Debian-like system the missing packages are installed.
# Usage: tools/system.sh PYTHON
set -euo pipefail
python="${1:-python3}"

if ! command -v "$python" >/dev/null; then
    echo "error: '$python' was not found. Install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3 ..." >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $("$python" --version) is too old; Python 3.10 or newer is needed: make PYTHON=/path/to/python3 ..." >&2
    exit 1
fi

compiler_works() {
    command -v "${CXX:-g++}" >/dev/null || return 1
    printf '#include <vector>\n#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n' |
        "${CXX:-g++}" -x c++ -fopenmp -fsyntax-only - 2>/dev/null
}
headers_there() {
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))'
}
venv_works() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }

version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
missing=()
what=()
if ! compiler_works; then
    missing+=(g++)
    what+=("a C++ compiler with OpenMP (looked for '${CXX:-g++}'; set CXX to use another)")
fi
if ! headers_there; then
    missing+=("python$version-dev")
    what+=("the headers of Python $version (Python.h)")
fi
if ! venv_works; then
    missing+=("python$version-venv")
    what+=("Python's venv module")
fi
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    echo "installing ${missing[*]} with apt-get"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}" || true
fi
if compiler_works && headers_there && venv_works; then
    exit 0
fi
{
    echo "error: missing on this machine:"
    printf '  - %s\n' "${what[@]}"
    echo "On Debian or Ubuntu: sudo apt-get install ${missing[*]}"
    echo "On Fedora: sudo dnf install gcc-c++ python3-devel. Then run make again."
} >&2
exit 1
