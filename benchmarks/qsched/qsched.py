"""Benchmark Q-Sched on Shapes: the loss from quantization and the gain from schedule factors.

A cell is a student, a weight format, a number of steps and a seed. Each cell is sampled with the original schedule and
with the factors that a search on training prompts selected. The student in full precision is the control that
separates repair from improvement. Finished cells are cached in the work folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from benchmarks.common.record import BenchOptions, spread
from benchmarks.qsched import folding
from benchmarks.qsched.forms import BITS, BRANCHED, COARSE, FORMS
from benchmarks.qsched.published_grid import summary
from benchmarks.qsched.rounding import compare, gain_over_nearest
from benchmarks.qsched.rounding import headline as rounding_headline
from benchmarks.qsched.student import FULL, LARGER, QUICK, Size, Student
from benchmarks.qsched.weights import published_sizes, speeds
from diffalign.quantization.accounting import report

STUDENTS = ("shapes-flux-schnell", "shapes-sd-lcm")
SCORES = ("geneval", "verifier")
"""Scores for which the loss from quantization and the gain from the factors are reported."""


def run(options: BenchOptions) -> dict[str, Any]:
    """Run all students, weight formats and steps over all seeds.

    The option `arms` selects among the students, "rounding", "bits", "folding", "larger", "sizes" and "speeds". The arm
    "rounding" draws both students in more formats, without searches; "bits" is its part at 4 steps, and runs only if
    named. The arm "folding" folds scales of channels into the modulation (RepQuant).
    """
    selected = options.select(
        (*STUDENTS, "rounding", "bits", "folding", "larger", "sizes", "speeds")
    )
    result: dict[str, Any] = {"size": asdict(QUICK if options.quick else FULL)}
    headline: dict[str, Any] = {}
    students = {n: Student(n, options) for n in STUDENTS if n in selected}
    result["students"] = {n: measure(s, options.seeds) for n, s in students.items()}
    if students:
        result["recovered"] = {
            form: {score: recovered(result["students"].values(), score, form) for score in SCORES}
            for form in FORMS
            if FORMS[form].backend is not None
        }
        for form in BRANCHED:
            name = f"{COARSE}, with a branch of rank {FORMS[form].svd_rank}"
            result["recovered"][name] = {
                score: recovered(result["students"].values(), score, COARSE, repaired=form)
                for score in SCORES
            }
        headline["quality_recovered"] = {
            form: {"share": g["share"], "lost": g["means"]["lost"]}
            for form, g in ((f, rows["geneval"]) for f, rows in result["recovered"].items())
        }
        grids = [g for s in result["students"].values() for g in s["grid"]]
        headline["network_calls_vs_grid"] = summary(grids)
    if "rounding" in selected or "bits" in selected:
        part = {} if "rounding" in selected else {"forms": BITS, "steps": (4,)}
        result["rounding"] = {name: compare(name, options, **part) for name in STUDENTS}
        result["gptq_gain_db"] = {
            form: gain_over_nearest(result["rounding"], form) for form in ("int4", "int3")
        }
        headline |= rounding_headline(result["rounding"])
    if "folding" in selected:
        result["folding"] = folding.compare(options)
        headline["folding_gain_db"] = folding.headline(result["folding"])
    if "larger" in selected and not options.quick:
        result["larger"] = {name: larger(options, size) for name, size in LARGER.items()}
    if "sizes" in selected:
        result["sizes"] = published_sizes()
        headline["bytes_ratio"] = {
            name: sizes["int4"]["ratio"] for name, sizes in result["sizes"].items()
        }
    if "speeds" in selected:
        result["speeds"] = speeds(quick=options.quick)
        headline["int8_latency_vs_bf16"] = result["speeds"]["int8_latency_vs_bf16"]
    return {"headline": headline, **result}


def measure(student: Student, seeds: int) -> dict[str, Any]:
    """Measure the cells of all formats, their bytes, and the searches against the grid."""
    forms: dict[str, Any] = {}
    for form in FORMS:
        weight = report(student.model(form, student.size.steps[0]).denoiser)
        cells = {
            str(steps): [student.cell(form, steps, seed) for seed in range(seeds)]
            for steps in student.size.steps
        }
        forms[form] = {
            "bytes": weight.bytes,
            "ratio_to_bf16": round(weight.ratio, 3),
            "quantised_fraction": round(weight.quantised_fraction, 4),
            "latency_ratio": student.latency(form),
            "steps": {steps: table(rows) for steps, rows in cells.items()},
        }
    return {
        "forms": forms,
        "grid": [student.grid(s) for s in range(min(seeds, student.size.grid_seeds))],
    }


def larger(options: BenchOptions, size: Size) -> dict[str, Any]:
    """Run the larger searches and return their scores and recovered quality."""
    usual, student = Student(STUDENTS[1], options), Student(STUDENTS[1], options, size)
    forms = {
        form: {
            "steps": {
                str(steps): table([owner.cell(form, steps, s) for s in range(options.seeds)])
                for steps in size.steps
            }
        }
        for form, owner in (("bf16", usual), (COARSE, student))
    }
    return {
        "size": asdict(size),
        "steps": forms[COARSE]["steps"],
        "recovered": {
            steps: {
                score: recovered([{"forms": forms}], score, COARSE, steps=[steps])
                for score in SCORES
            }
            for steps in forms["bf16"]["steps"]
        },
    }


def table(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Collect the cells of one format and number of steps.

    The table has the scores with the original schedule (`plain`), with the best candidate (`best`), and with the
    candidate if it was accepted (`qsched`), as well as the searches' results.
    """
    return {
        **{
            schedule: {
                name: spread(c[schedule][name] for c in cells) for name in cells[0][schedule]
            }
            for schedule in ("plain", "best", "qsched")
        },
        "searches": [c["search"] for c in cells],
    }


def recovered(
    students: Any,
    score: str,
    form: str,
    *,
    repaired: str | None = None,
    steps: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Return the share of a quantization loss that the factors recover.

    Sums run over all students and seeds, and over all steps or `steps`.

    Args:
        students: results of `measure`.
        score: name of the score.
        form: quantized weight format.
        repaired: format that is used together with factors; `form` if None.
        steps: numbers of steps; all if None.

    Returns:
        The `share`, None if nothing was lost, and means over cells: `lost`, `gained`, and `control`, the gain of the
            factors in full precision.
    """
    lost = gained = control = 0.0
    cells = 0
    for student in students:
        full, small = (student["forms"][f]["steps"] for f in ("bf16", form))
        for n in steps or full:
            cells += len(full[n]["plain"][score]["values"])
            lost += _sum(full[n]["plain"], score) - _sum(small[n]["plain"], score)
            after = student["forms"][repaired or form]["steps"][n]["qsched"]
            gained += _sum(after, score) - _sum(small[n]["plain"], score)
            control += _sum(full[n]["qsched"], score) - _sum(full[n]["plain"], score)
    return {
        "share": round(gained / lost, 3) if lost > 0 else None,
        "means": {
            name: round(total / cells, 4)
            for name, total in (("lost", lost), ("gained", gained), ("control", control))
        },
    }


def _sum(scores: dict[str, Any], name: str) -> float:
    return sum(scores[name]["values"])
