"""Write RESULTS.md from the JSON files of the benchmarks that were run here; sections of others stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
NAMES = ("kernels", "models", "conv", "conv_quality", "cost_model", "pruning", "planner", "generate", "onnx")
NAMES += ("arm", "cuda", "cuda_cost", "hls", "hls_rtl", "hls_forms")

HEAD = """# Results

Written by `make bench` (`benchmarks/write_results.py`), which leaves the sections of benchmarks that it did not run;
each says on what machine and when. What is compared takes turns in one process; numbers are medians.
"""


def section(content: dict[str, Any]) -> str:
    """One benchmark as Markdown."""
    machine = content["machine"]
    extensions = " ".join(machine["extensions"]) or "no vector extensions"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "tvm", "sparsecomp"))
    lines = [
        f"## {content['name']}",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {extensions}, {machine['system']}; {machine['date']}.",
        f"Versions: {versions}.",
        "",
        *(f"- {note}" for note in content["notes"]),
        "",
    ]
    rows = content["rows"]
    if content["name"] in ("pruning", "conv_quality"):
        return "\n".join(lines + pruning_tables(rows))
    lines += ["| case | value | unit | goal | verdict | details |", "| --- | ---: | --- | ---: | --- | --- |"]
    # Of a long grid only the summary is for people; the JSON has all.
    if content["name"] == "cost_model":
        rows = rows[-1:]
    for row in rows:
        goal = "" if row["goal"] is None else f"{'<=' if row['at_most'] else '>='} {row['goal']:g}"
        details = ", ".join(f"{key} {number(value)}" for key, value in row["details"].items())
        lines.append(
            f"| {row['case']} | {number(row['value'])} | {row['unit']} | {goal} | {row['verdict']} | {details} |"
        )
    return "\n".join(lines) + "\n"


def pruning_tables(rows: list[dict[str, Any]]) -> list[str]:
    """For every model a table of patterns by methods, each entry with its goal where it has one."""
    lines = []
    for model in dict.fromkeys(row["case"].split(",")[0] for row in rows):
        own = [row for row in rows if row["case"].split(",")[0] == model]
        dense = "".join(f", dense {number(row['value'])}" for row in own if "pattern" not in row["details"])
        cells = {
            (row["details"]["pattern"], row["details"]["method"]): row for row in own if "pattern" in row["details"]
        }
        methods = list(dict.fromkeys(method for _, method in cells))
        goals = "; in brackets what was to be reached" if any(row["goal"] is not None for row in own) else ""
        lines += [f"{model}, {own[0]['unit']}{dense}{goals}:", ""]
        lines += [f"| pattern | {' | '.join(methods)} |", f"| --- |{' ---: |' * len(methods)}"]
        for pattern in dict.fromkeys(pattern for pattern, _ in cells):
            texts = []
            for method in methods:
                row = cells.get((pattern, method))
                goal = "" if row is None or row["goal"] is None else f" ({row['goal']:g}{missed(row)})"
                texts.append("" if row is None else f"{number(row['value'])}{goal}")
            lines.append(f"| {pattern} | {' | '.join(texts)} |")
        lines.append("")
    return lines


def missed(row: dict[str, Any]) -> str:
    """A word for a goal that was not reached."""
    return ", missed" if row["verdict"] == "missed" else ""


def number(value: Any) -> str:
    """A number with three digits; other values as they are."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def main() -> None:
    """Write the file.

    Raises:
        FileNotFoundError: no benchmark was run.
    """
    files = {name: path for name in NAMES if (path := FOLDER / "results" / f"{name}.json").is_file()}
    if not files:
        raise FileNotFoundError("benchmarks/results holds no results: run `make bench`")
    target = FOLDER / "RESULTS.md"
    sections = kept(target.read_text(encoding="utf-8")) if target.is_file() else {}
    sections |= {name: section(json.loads(path.read_text(encoding="utf-8"))) for name, path in files.items()}
    target.write_text("\n".join([HEAD, *(sections[name] for name in NAMES if name in sections)]), encoding="utf-8")


def kept(text: str) -> dict[str, str]:
    """The sections of an earlier file, by the name of their benchmark."""
    parts = text.split("\n## ")[1:]
    return {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in parts}


if __name__ == "__main__":
    main()
