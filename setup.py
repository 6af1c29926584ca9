"""Finds the packages: `passes/` and `targets/` install as `sparsecomp.passes` and `sparsecomp.targets`.

All else is in pyproject.toml. The automatic discovery of setuptools does not follow a `package-dir` mapping, hence
these lines.
"""

from __future__ import annotations

from setuptools import find_packages, setup

packages = ["sparsecomp", *(f"sparsecomp.{name}" for name in find_packages("sparsecomp"))]
for folder in ("passes", "targets"):
    package = f"sparsecomp.{folder}"
    packages += [package, *(f"{package}.{name}" for name in find_packages(folder))]

setup(packages=packages)
