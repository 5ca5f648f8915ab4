"""Measure weight formats of the students with their original schedule: PSNR, GenEval and FID by bits and rounding."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks.common.record import BenchOptions, spread
from benchmarks.qsched.forms import PLAIN
from benchmarks.qsched.student import FULL, QUICK, STEPS, Student
from diffalign.quantization.accounting import report

HEADLINE = {"psnr_int4": "int4 gptq", "psnr_int3": "int3 gptq", "psnr_int2": "int2 gptq tuned"}
"""Formats whose PSNR at 4 steps is in the headline, that of the worse student."""
IMAGES_PER_TASK = 16


class RoundedStudent(Student):
    """Student in all formats, which is not searched."""

    forms = PLAIN

    def __init__(self, name: str, options: BenchOptions) -> None:
        size = QUICK if options.quick else replace(FULL, images_per_task=IMAGES_PER_TASK)
        super().__init__(name, options, size)

    def cell(self, form: str, steps: int, seed: int) -> dict[str, Any]:
        """Return the scores and the size of one cell, cached in the work folder."""

        def make() -> dict[str, Any]:
            weight = report(self.model(form, steps).denoiser)
            return {**self.scores(form, steps, seed), "ratio_to_bf16": round(weight.ratio, 3)}

        key = [asdict(self.forms[form]), self.size.images_per_task, self.size.prompts]
        return self.options.cached(f"{self.name} plain {form} {steps}", seed, make, key=key)


def compare(
    name: str, options: BenchOptions, *, forms: Iterable[str] = PLAIN, steps: Sequence[int] = STEPS
) -> dict[str, Any]:
    """Return the scores of a student in some formats, by number of steps."""
    student = RoundedStudent(name, options)
    result: dict[str, Any] = {}
    for form in forms:
        cells = {
            str(n): [student.cell(form, n, seed) for seed in range(options.seeds)]
            for n in (student.size.steps if options.quick else steps)
        }
        result[form] = {"steps": {n: _table(scores) for n, scores in cells.items()}}
        # a model is not needed again, and only full precision is compared with all others
        student.models = {k: m for k, m in student.models.items() if k[0] == "bf16"}
    return result


def headline(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the worse student's PSNR by bits, and GenEval of the coarse format."""
    figures = {}
    for name, form in HEADLINE.items():
        medians = []
        for student in results.values():
            steps = student[form]["steps"]
            medians.append(steps.get("4", steps[max(steps, key=int)])["psnr"]["median"])
        figures[name] = min(medians)
    steps = results["shapes-sd-lcm"]["int4 rows gptq"]["steps"]
    if "2" in steps:
        figures["geneval_int4_rows"] = steps["2"]["geneval"]["median"]
    return figures


def gain_over_nearest(results: Mapping[str, Mapping[str, Any]], form: str) -> dict[str, float]:
    """Return the mean gain of PSNR in dB by GPTQ, by number of steps."""
    gains: dict[str, list[float]] = {}
    for student in results.values():
        for n, scores in student[f"{form} gptq"]["steps"].items():
            nearest = student[form]["steps"][n]["psnr"]["median"]
            gains.setdefault(n, []).append(scores["psnr"]["median"] - nearest)
    return {n: round(statistics.mean(values), 2) for n, values in gains.items()}


def _table(cells: list[dict[str, float]]) -> dict[str, Any]:
    return {name: spread(cell[name] for cell in cells) for name in cells[0]}
