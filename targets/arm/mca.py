"""Cycles of the generated inner loops by llvm-mca, for every CPU: what `cycles.json` holds.

`python -m sparsecomp.targets.arm.mca` builds the kernels for each CPU, finds their inner loops and writes the file. It
needs llvm-mca of LLVM 19 or newer: older ones have no good models of these cores.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecomp.kernels import depthwise, dot, panel, rows, tir
from sparsecomp.kernels.epilogue import Epilogue
from sparsecomp.targets.arm.cpu import LANES, ROW_VECTORS, ArmLevel, cpu, cpu_names
from sparsecomp.targets.arm.dot import DOT_TILES, WINDOWS, loop_name
from sparsecomp.targets.arm.kernels import DENSE_V, HALF, PANEL_TILES, SVE, panel_schedule, row_level, row_schedule

LEAST_LLVM = 19
LEVELS = "levels"
_DIVISION = re.compile(r"\s+fdiv\s+v\d+\.4s")
_ITERATIONS = 200
_BRANCH = re.compile(r"\s+(?:b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+,\s*#?\d+,)\s*(\.L\w+)")


class MissingToolError(RuntimeError):
    """There is no llvm-mca that is new enough."""


@dataclass(frozen=True)
class Loop:
    """An inner loop.

    Attributes:
        fmla: multiply-adds of vectors.
        instructions: of one round.
        cycles: of one round, in a steady state.
    """

    fmla: int
    instructions: int
    cycles: float


def find_llvm_mca() -> tuple[str, str]:
    """Path and version of llvm-mca.

    Raises:
        MissingToolError: there is none of LLVM 19 or newer.
    """
    for name in ("llvm-mca", *(f"llvm-mca-{version}" for version in range(29, LEAST_LLVM - 1, -1))):
        path = shutil.which(name)
        if path is None:
            continue
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=60).stdout
        found = re.search(r"LLVM version (\d+)([.\d]*)", text)
        if found and int(found[1]) >= LEAST_LLVM:
            return path, found[1] + found[2]
    raise MissingToolError(f"llvm-mca of LLVM {LEAST_LLVM} or newer was not found; Debian has it in llvm-{LEAST_LLVM}")


def inner_loops(assembly: str) -> list[list[str]]:
    """The instructions of each loop that has none inside, in the order of the text."""
    lines = assembly.splitlines()
    labels: dict[str, int] = {}
    loops = []
    for number, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = number
        branch = _BRANCH.match(line)
        if branch is None or branch[1] not in labels:
            continue
        body = lines[labels[branch[1]] + 1 : number + 1]
        if any(re.match(r"\.LBB", inner) or re.match(r"\s+b[l]?\s", inner) for inner in body):
            continue
        loops.append([inner for inner in body if re.match(r"\s+[a-z]", inner)])
    return loops


def measure(body: list[str], cpu_name: str) -> Loop:
    """What llvm-mca says of a loop.

    Raises:
        MissingToolError: there is no llvm-mca.
        RuntimeError: it failed.
    """
    path, _ = find_llvm_mca()
    command = [path, "-mtriple=aarch64-linux-gnu", f"-mcpu={cpu_name}", f"-iterations={_ITERATIONS}"]
    result = subprocess.run(
        command, input="\n".join(body) + "\n", capture_output=True, text=True, check=False, timeout=60
    )
    found = re.search(r"Total Cycles:\s+(\d+)", result.stdout)
    if result.returncode or not found:
        raise RuntimeError(f"{' '.join(command)} failed with code {result.returncode}: {result.stderr[:1000]}")
    return Loop(multiply_adds(body), len(body), int(found[1]) / _ITERATIONS)


def multiply_adds(body: list[str]) -> int:
    """Multiply-adds among instructions, of 128 bits each: 4 of float32, 8 of float16 or 16 of int8; of SVE two."""
    neon = sum(bool(re.match(r"\s+(fmla\s+v\d+\.(4s|8h)|sdot\s+v\d+\.4s)", line)) for line in body)
    return neon + 2 * sum(bool(re.match(r"\s+fm(la|ad)\s+z\d+\.s", line)) for line in body)


def loops_of(name: str) -> dict[str, Loop]:
    """The inner loops of the kernels for a CPU: `rows_V.shared`, `rows_V.own`, `panel_V_T`, `depthwise_V`.

    With `rows_half_V` for CPUs that multiply float16, `rows_sve_V` for those with SVE, and `int8_V_T_W`,
    `int8_own_V_T_1` and `levels` for those with dot products.
    """
    level = cpu(name).level

    def loops(function: Any, level: ArmLevel = level) -> list[tuple[int, list[str]]]:
        assembly = tir.compile_object(function, "kernel", level.tvm_target)[1]
        return [(multiply_adds(body), body) for body in inner_loops(assembly)]

    def once(found: tuple[int, list[str]], least: int) -> Loop:
        """The loop for one round of the source's loop, whose multiply-adds are given: LLVM may have unrolled it."""
        count, body = found
        times, rest = divmod(count, least)
        if rest or not times:
            raise RuntimeError(f"a loop of {count} multiply-adds was found where {least}, or a multiple, were expected")
        loop = measure(body, cpu(name).mca)
        return Loop(least, round(loop.instructions / times), loop.cycles / times)

    result: dict[str, Loop] = {}
    for kernel in ("rows", *[HALF] * cpu(name).half, *[SVE] * cpu(name).sve):
        units = 2 if kernel == SVE else 1
        for vectors in range(1, ROW_VECTORS + 1):
            # The loop over columns that two rows share comes first in the text.
            function = rows.build(row_schedule(vectors, kernel), Epilogue())
            found = [entry for entry in loops(function, row_level(level, kernel)) if entry[0]]
            result[f"{kernel}_{vectors}.shared"] = once(found[0], 8 * vectors * units)
            result[f"{kernel}_{vectors}.own"] = once(found[1], 4 * vectors * units)
    for v, tiles in PANEL_TILES.items():
        for tokens in tiles:
            schedule = panel_schedule(v, tokens)
            tile = next(entry for entry in loops(panel.build(schedule, Epilogue())) if entry[0])
            result[f"panel_{v}_{tokens}"] = once(tile, schedule.vectors * schedule.tokens)
    if cpu(name).dotprod:
        for schedule_i in int8_schedules():
            step = next(entry for entry in loops(dot.build(schedule_i, Epilogue())) if entry[0])
            fours = 1 if schedule_i.own else 4
            loop = loop_name(schedule_i.v, schedule_i.tokens, schedule_i.window, own=schedule_i.own)
            result[loop] = once(step, fours * schedule_i.vectors * schedule_i.tokens)
        result[LEVELS] = levels_loop(name)
    for vectors in range(1, ROW_VECTORS + 1):
        schedule_d = depthwise.DepthwiseSchedule(LANES, vectors, 1)
        row = next(entry for entry in loops(depthwise.build(schedule_d, Epilogue())) if entry[0])
        result[f"depthwise_{vectors}"] = once(row, vectors)
    return result


def int8_schedules() -> list[dot.DotSchedule]:
    """The forms of the int8 kernel: of sparse panels, of dense ones, of rows with columns of their own."""
    shapes = [(v, tokens, w, False) for v, tiles in DOT_TILES.items() for tokens in tiles for w in WINDOWS]
    shapes += [(DENSE_V, tokens, 1, own) for own in (False, True) for tokens in DOT_TILES[DENSE_V]]
    return [dot.DotSchedule(v, tokens, window, own, native=True) for v, tokens, window, own in shapes]


def levels_loop(name: str) -> Loop:
    """The loop of the int8 kernel that makes sixteen values int8, for a CPU: a division of four values bounds it."""
    function = dot.build(dot.DotSchedule(DENSE_V, 4, 1, own=False, native=True), Epilogue())
    assembly = tir.compile_object(function, "kernel", cpu(name).level.tvm_target)[1]
    divided = [(sum(bool(_DIVISION.match(line)) for line in body), body) for body in inner_loops(assembly)]
    count, body = next(entry for entry in divided if entry[0])
    loop = measure(body, cpu(name).mca)
    return Loop(0, round(4 * loop.instructions / count), 4 * loop.cycles / count)


def main() -> None:
    """Write `cycles.json`."""
    _, version = find_llvm_mca()
    cpus = {
        name: {loop: [entry.fmla, entry.instructions, round(entry.cycles, 3)] for loop, entry in loops_of(name).items()}
        for name in cpu_names()
    }
    document = {
        "comment": "Inner loops: multiply-adds of 128 bits, instructions and cycles of one round, by llvm-mca.",
        "llvm_mca": version,
        "cpus": cpus,
    }
    text = json.dumps(document, indent=1)
    text = re.sub(r"\[\s+(\d+),\s+(\d+),\s+([\d.]+)\s+\]", r"[\1, \2, \3]", text)
    Path(__file__).with_name("cycles.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
