"""Common form of benchmark results: figures with command, machine and versions."""

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
    """Options of one benchmark run.

    Attributes:
        quick: run minutes instead of hours, to check that the benchmark works.
        work: folder of runs, which are resumed.
        seeds: number of seeds.
        arms: arms to run; None runs all.
    """

    quick: bool
    work: Path
    seeds: int = 3
    arms: tuple[str, ...] | None = None

    def folder(self, arm: str, seed: int) -> Path:
        """Return the folder of one run of an arm."""
        return self.work / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"

    def cached(
        self, arm: str, seed: int, make: Callable[[], dict[str, Any]], *, key: Any
    ) -> dict[str, Any]:
        """Return the result of `make` for an arm, cached in the arm's folder.

        The cache is valid for one `key` (JSON): the caller lists in it everything that the result depends on.
        """
        file = self.folder(arm, seed) / CELL
        digest = of_json(key)[:16]
        if file.is_file():
            cell = json.loads(file.read_text(encoding="utf-8"))
            if cell.get("key") == digest:
                return cell["found"]
        with locks.hold(file.parent, setting="work"):
            result = make()
            write_text(file, json.dumps({"key": digest, "found": result}, indent=1))
        return result

    def select(self, available: Iterable[str]) -> list[str]:
        """Return the arms to run, in the order of `available`.

        Raises:
            UsageError: `arms` names an arm that the benchmark does not have.
        """
        names = list(available)
        for arm in self.arms or ():
            if arm not in names:
                raise UsageError(f"arms={arm}: no such arm{nearest(arm, names)}")
        return [n for n in names if self.arms is None or n in self.arms]


def run_bench(name: str, options: BenchOptions, *, output: Path | None = None) -> dict[str, Any]:
    """Run a benchmark, write its result as JSON, and return the headline figures."""
    if name not in BENCHES:
        raise UsageError(f"bench {name}: no such benchmark{nearest(name, list(BENCHES))}")
    result = importlib.import_module(PROGRAMS[name][0]).run(options)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record(name, result, quick=options.quick), indent=1)
        output.write_text(text + "\n", encoding="utf-8")
    return result["headline"]


def record(name: str, result: dict[str, Any], *, quick: bool) -> dict[str, Any]:
    """Return a benchmark's result with its command, machine and versions."""
    return {
        "bench": name,
        "quick": quick,
        "command": shlex.join(["diffalign", *sys.argv[1:]]),
        **result,
        "machine": machine(),
        "versions": versions(),
    }


def run_once(config: AnyRunConfig) -> dict[str, Any]:
    """Return the summary of a run: from its folder if it is finished, else after training it.

    Raises:
        UsageError: the folder holds a run of another configuration.
    """
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
            f"{file.parent} holds a run with another configuration (its value, this value):\n  "
            + "\n  ".join(other)
            + "\nChoose another work folder, or delete this one."
        )
    return train(config)


def machine() -> dict[str, Any]:
    """Describe the operating system, the processor and the accelerator."""
    description: dict[str, Any] = {"system": platform.system(), "cpu_cores": os.cpu_count()}
    if torch.cuda.is_available():
        description["device"] = torch.cuda.get_device_name()
    return description


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Return the median, the extremes and the values."""
    rounded = [round(float(v), 4) for v in values]
    return {
        "median": round(statistics.median(rounded), 4),
        "low": min(rounded),
        "high": max(rounded),
        "values": rounded,
    }
