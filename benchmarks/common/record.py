"""One form for every benchmark's result: what was run, with what, on what, and the figures."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import BENCHES, PROGRAMS
from diffalign.config import AnyRunConfig, decode, differences, nearest, to_dict
from diffalign.core import locks
from diffalign.core.errors import UsageError
from diffalign.core.files import write_text
from diffalign.core.fingerprint import of_json
from diffalign.core.versions import versions
from diffalign.training.run import run as train
from diffalign.training.run_folder import SUMMARY

CELL = "cell.json"


@dataclass(frozen=True)
class BenchOptions:
    """`quick`: minutes instead of hours, to see that it works; `work`: where runs are kept and resumed; `arms`: only
    these, where not all are wanted."""

    quick: bool
    work: Path
    seeds: int = 3
    arms: tuple[str, ...] | None = None

    def folder(self, arm: str, seed: int) -> Path:
        """Where the run of an arm is kept."""
        return self.work / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"

    def kept(
        self, arm: str, seed: int, make: Callable[[], dict[str, Any]], *, key: Any
    ) -> dict[str, Any]:
        """What `make` found for an arm; from the arm's folder, where it was found before with the same `key` (JSON),
        which is what the caller names of what it depends on."""
        file = self.folder(arm, seed) / CELL
        digest = of_json(key)[:16]
        if file.is_file():
            cell = json.loads(file.read_text(encoding="utf-8"))
            if cell.get("key") == digest:
                return cell["found"]
        with locks.hold(file.parent, setting="work"):
            found = make()
            write_text(file, json.dumps({"key": digest, "found": found}, indent=1))
        return found

    def chosen(self, known: Iterable[str]) -> list[str]:
        """The arms to run, of those that the benchmark knows."""
        names = list(known)
        for arm in self.arms or ():
            if arm not in names:
                raise UsageError(f"--arms: no arm {arm!r}{nearest(arm, names)}")
        return [n for n in names if self.arms is None or n in self.arms]


def run_bench(name: str, options: BenchOptions, *, output: Path | None = None) -> dict[str, Any]:
    """Run a benchmark, write its JSON, and return the headline figures."""
    if name not in BENCHES:
        raise UsageError(f"no benchmark {name!r}{nearest(name, list(BENCHES))}")
    found = importlib.import_module(PROGRAMS[name]).run(options)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record(name, found, quick=options.quick), indent=1)
        output.write_text(text + "\n", encoding="utf-8")
    return found["headline"]


def record(name: str, found: dict[str, Any], *, quick: bool) -> dict[str, Any]:
    """The figures with their provenance."""
    return {
        "bench": name,
        "quick": quick,
        "command": shlex.join(["diffalign", *sys.argv[1:]]),
        **found,
        "machine": machine(),
        "versions": versions(),
    }


def run_once(config: AnyRunConfig) -> dict[str, Any]:
    """The summary of a run: of the folder, where it is finished there, else of training to its end."""
    file = Path(config.output_dir) / SUMMARY
    if file.is_file():
        summary = json.loads(file.read_text(encoding="utf-8"))
        other = [
            line
            for line in differences(to_dict(decode(summary["config"])), to_dict(config))
            if not line.startswith("output_dir")
        ]
        if not other:
            return summary
        raise UsageError(
            f"{file.parent} holds another run (there, here):\n  "
            + "\n  ".join(other)
            + "\nchoose another --work, or delete that folder"
        )
    return train(config)


def machine() -> dict[str, Any]:
    """Processor and accelerator."""
    found: dict[str, Any] = {"system": platform.system(), "cpu_cores": os.cpu_count()}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median, extremes and the values themselves."""
    found = [round(float(v), 4) for v in values]
    return {
        "median": round(statistics.median(found), 4),
        "low": min(found),
        "high": max(found),
        "values": found,
    }
