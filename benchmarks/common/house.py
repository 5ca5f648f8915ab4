"""Measure the source code: the table of sizes, types, couplings and texts.

Usage: python -m benchmarks.common.house --output benchmarks/results/house.json

The wheel's rooms are measured; tests and benchmarks are not. Types are checked on the built wheel, as `make typecheck`
does, with mypy's strict rules.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.common import language, source
from benchmarks.common.source import Source

ROOMS = {
    "diffalign": "diffalign",
    "pipelines": "diffalign.pipelines",
    "rewards": "diffalign.rewards",
    "scripts": "diffalign.scripts",
}
"""Folders of the wheel, and the packages as which they are installed."""
MAX_LINES, MAX_FUNCTION, MAX_ARGUMENTS = 400, 60, 8
COMMAND_LINE = ("diffalign/cli/",)


def read_sources(root: Path) -> list[Source]:
    """Return the files of the wheel below `root`, with the names of their modules."""
    sources = []
    for folder, package in ROOMS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            name = ".".join((package, *parts))
            sources.append(Source(path, name.removesuffix(".__init__")))
    return sources


def sizes(sources: Sequence[Source], root: Path) -> dict[str, Any]:
    """Measure files, functions and rooms."""
    functions = [
        (f"{_short(s, root)}:{f.name}", source.length(f), len(source.arguments(f)))
        for s in sources
        for f in s.functions
    ]
    files = {_short(s, root): len(s.lines) for s in sources}
    total = sum(files.values())
    rooms: Counter[str] = Counter()
    for name, lines in files.items():
        parts = name.split("/")
        rooms["/".join(parts[:2]) if parts[0] == "diffalign" and len(parts) > 2 else parts[0]] += (
            lines
        )
    room, lines = rooms.most_common(1)[0]
    longest = max(functions, key=lambda f: f[1])
    return {
        "files": len(files),
        "lines": total,
        "median_file": int(statistics.median(files.values())),
        "files_over_400_lines": _over(files, MAX_LINES),
        "functions": len(functions),
        "median_function": int(statistics.median(f[1] for f in functions)),
        "longest_function": {longest[0]: longest[1]},
        "functions_over_60_lines": _over({f[0]: f[1] for f in functions}, MAX_FUNCTION),
        "functions_over_8_arguments": _over({f[0]: f[2] for f in functions}, MAX_ARGUMENTS),
        "largest_room": {room: round(100 * lines / total, 1)},
        "rooms": dict(rooms.most_common()),
    }


def couplings(sources: Sequence[Source], root: Path) -> dict[str, Any]:
    """Measure what the rooms know of each other and of the command line."""
    configurations = [s for s in sources if _short(s, root).startswith("diffalign/config/")]
    classes = {n for n in source.class_names(configurations) if n.endswith("Config")}
    checks = {
        _short(s, root): source.instance_checks(s, classes)
        for s in sources
        if s not in configurations
    }
    own = {n for s in sources if _short(s, root).startswith(COMMAND_LINE) for n in source.flags(s)}
    below = [
        s
        for s in sources
        if not _short(s, root).startswith(COMMAND_LINE) and not source.is_command_line(s)
    ]
    return {
        "isinstance_of_configurations": _over(checks, 0),
        "functions_on_namespaces": sum(
            source.takes_namespace(f) for s in sources for f in s.functions
        ),
        "functions_on_namespaces_below_the_command_line": sum(
            source.takes_namespace(f) for s in below for f in s.functions
        ),
        "flags_below_the_command_line": _over(
            {_short(s, root): sum(flag in own for flag in source.flags(s)) for s in below}, 0
        ),
        "import_cycles": source.cycles(source.import_graph(sources, top_level=True)),
        "import_cycles_with_late_imports": source.cycles(
            source.import_graph(sources, top_level=False)
        ),
        "repeated_lines_percent": round(source.repeated_share(sources), 2),
    }


def texts(sources: Sequence[Source], root: Path) -> dict[str, Any]:
    """Measure docstrings, comments and types."""
    functions = [f for s in sources for f in s.functions]
    comments = sum(line.lstrip().startswith("#") for s in sources for line in s.lines)
    return {
        "texts_that_break_a_rule": _over(
            {_short(s, root): len(list(language.faults(s.path))) for s in sources}, 0
        ),
        "comments_per_100_lines": round(100 * comments / sum(len(s.lines) for s in sources), 1),
        "typed_functions_percent": round(
            100 * sum(source.is_typed(f) for f in functions) / len(functions), 1
        ),
    }


def strict_errors(root: Path) -> dict[str, Any]:
    """Build the wheel, and count mypy's strict errors on it by file."""
    with tempfile.TemporaryDirectory() as folder:
        wheel, types = Path(folder, "wheel"), Path(folder, "types")
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "wheel", "--no-deps", "-w", str(wheel), str(root)], folder)
        file = next(wheel.glob("*.whl"))
        _run([*pip, "install", "--no-deps", "--target", str(types), str(file)], folder)
        options = ["--strict", "--config-file", str(root / "pyproject.toml")]
        command = [sys.executable, "-m", "mypy", *options, "-p", "diffalign"]
        output = _run(command, str(types), allowed=(0, 1))
    files = re.findall(r"^(\S+?\.py):\d+: error:", output, re.M)
    return {"mypy_strict_errors": dict(Counter(files).most_common())}


def measure(root: Path, *, with_types: bool = True) -> dict[str, Any]:
    """Return all figures of the source tree at `root`.

    Args:
        root: folder of a checkout.
        with_types: run mypy on the built wheel, which takes a minute.
    """
    sources = read_sources(root)
    types = strict_errors(root) if with_types else {}
    return {**sizes(sources, root), **couplings(sources, root), **texts(sources, root), **types}


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table with one row each."""
    rows = ["| figure | value |", "|---|---|"]
    for name, value in figures.items():
        if name != "rooms":
            rows.append(f"| {name.replace('_', ' ')} | {_cell(name, value)} |")
    return "\n".join(rows)


def record(figures: dict[str, Any], root: Path) -> dict[str, Any]:
    """Return the figures with the command, the commit and the versions."""
    commit = _run(["git", "-C", str(root), "describe", "--always", "--dirty"], str(root)).strip()
    return {
        "bench": "house",
        "command": shlex.join(["python", "-m", "benchmarks.common.house", *sys.argv[1:]]),
        "commit": commit,
        "figures": figures,
        "versions": {"python": platform.python_version(), "mypy": version("mypy")},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=language.ROOT, help="a checkout")
    parser.add_argument("--no-mypy", action="store_true", help="leave out mypy's errors")
    parser.add_argument("--output", type=Path, help=".json")
    args = parser.parse_args(argv)
    figures = measure(args.root.resolve(), with_types=not args.no_mypy)
    print(table(figures))
    if args.output is not None:
        text = json.dumps(record(figures, args.root), indent=1)
        args.output.write_text(text + "\n", encoding="utf-8")


def _cell(name: str, value: Any) -> str:
    """Return a figure as text: a name with its number, a sum with the largest parts, or the number."""
    if isinstance(value, dict) and name.startswith(("longest", "largest")):
        key, number = next(iter(value.items()))
        return f"{number} ({key})"
    if isinstance(value, dict):
        parts = sorted(value.items(), key=lambda item: -item[1])[:3]
        counts_entries = name.startswith(("files", "functions"))
        number = len(value) if counts_entries else sum(value.values())
        return f"{number}" + (f" ({', '.join(f'{k} {v}' for k, v in parts)})" if parts else "")
    return str(len(value)) if isinstance(value, list) else str(value)


def _over(values: dict[str, int], limit: int) -> dict[str, int]:
    """Return the entries above a limit."""
    return {name: value for name, value in values.items() if value > limit}


def _short(file: Source, root: Path) -> str:
    return file.path.relative_to(root).as_posix()


def _run(command: Sequence[str], folder: str, *, allowed: Sequence[int] = (0,)) -> str:
    """Run a command in a folder and return its output."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in allowed:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
