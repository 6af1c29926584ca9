#!/usr/bin/env bash
# Tools of the ARM tests that pip cannot install: QEMU's user-mode emulator, llvm-mca, and a cross compiler with OpenMP. As
# root on a Debian-like system what is missing is installed; elsewhere the tests that need it skip and say so. Never fails.
set -uo pipefail
missing=()
command -v qemu-aarch64 >/dev/null || command -v qemu-aarch64-static >/dev/null || missing+=(qemu-user)
compgen -c llvm-mca >/dev/null || missing+=(llvm-19)
command -v aarch64-linux-gnu-gcc >/dev/null || missing+=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross)
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq || true
    for package in "${missing[@]}"; do
        apt-get install -y -qq --no-install-recommends "$package" >/dev/null 2>&1 || echo "note: $package could not be installed"
    done
else
    echo "note: some tests for ARM will skip: ${missing[*]} (Debian's names) not found"
fi
exit 0
