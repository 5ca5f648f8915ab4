"""Q-Sched on Shapes: what smaller weights cost a few-step model, and what factors of its schedule give back.

A cell is a student, a form of its weights, a number of steps and a seed. Each is drawn twice, with the schedule as it
is and with the factors that a search found for it on training prompts; so is the student in full precision, the
control that tells repair from improvement. Finished cells are kept in the work folder.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.eyes import Eyes
from benchmarks.common.record import BenchOptions, spread
from benchmarks.qsched.published_grid import against_grid, summary
from benchmarks.qsched.weights import published_sizes, speeds
from diffalign.config import EvaluationConfig
from diffalign.core.precision import attention
from diffalign.data.prompts import Prompt, load_prompts
from diffalign.evaluation.score import Evaluation, evaluate_model
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.registry import load_model
from diffalign.quantization.accounting import report
from diffalign.quantization.apply import quantize_model
from diffalign.quantization.backends import BACKENDS
from diffalign.quantization.latency import interleaved
from diffalign.rewards.composition import CompositeReward
from diffalign.schedulers import QSched
from diffalign.tuning.calibration import Calibration
from diffalign.tuning.evaluator import Drawing
from diffalign.tuning.objective import parse
from diffalign.tuning.tune import Settings, tune

STUDENTS = ("shapes-flux-schnell", "shapes-sd-lcm")
STEPS = (2, 4, 8)
OBJECTIVE = "jaq-shapes"
SCORES = ("geneval", "verifier")
"""Of which it is counted what quantising takes and what the factors give back."""


@dataclass(frozen=True)
class Form:
    """Of a denoiser's weights: a backend, none for bfloat16, and options of `quantize_model`."""

    backend: str | None = None
    svd_rank: int = 0
    group_size: int | None = 64
    everywhere: bool = False
    """Ends, time and small layers, too."""

    @property
    def calibrated(self) -> bool:
        """On what the model draws."""
        return self.svd_rank > 0 or self.backend == "int8-static"

    @property
    def options(self) -> dict[str, Any]:
        found = {"svd_rank": self.svd_rank, "group_size": self.group_size}
        return found | ({"skip": (), "min_weights": 0} if self.everywhere else {})


FORMS = {
    "bf16": Form(),
    "int8": Form("int8"),
    "int4": Form("int4"),
    "int4 svd": Form("int4", svd_rank=16),
    "int4 rows": Form("int4", group_size=None, everywhere=True),
    "int4 rows svd": Form("int4", svd_rank=16, group_size=None, everywhere=True),
    "int4 rows svd 32": Form("int4", svd_rank=32, group_size=None, everywhere=True),
}
COARSE, BRANCHED = "int4 rows", ("int4 rows svd", "int4 rows svd 32")
"""The first is what a careful quantiser avoids, one scale for each output and no layer spared: there something is lost
that can be given back, by factors alone or, with the others, by a branch in full precision and factors."""


@dataclass(frozen=True)
class Size:
    """How much is drawn."""

    budget: int = 24
    prompts: int = 96
    images_per_task: int = 48
    grid: int = 50
    grid_images: int = 18
    grid_held_out: int = 192
    grid_seeds: int = 2
    rows: int = 16
    by_task: bool = False
    """As many prompts of each task, as GenEval counts them; otherwise as training prompts are: five of six ask for
    colours of two objects."""
    steps: tuple[int, ...] = STEPS


FULL = Size()
LARGER = {
    "more": Size(budget=48, prompts=384, steps=(2, 4)),
    "more by task": Size(budget=48, prompts=384, by_task=True, steps=(2, 4)),
}
"""Of searches where much is lost: four times the prompts, twice the candidates; `COARSE` of the second student."""
QUICK = Size(
    budget=4,
    prompts=24,
    images_per_task=4,
    grid=4,
    grid_images=12,
    grid_held_out=12,
    steps=(2,),
)


class Student:
    """A few-step model in all its forms."""

    def __init__(self, name: str, options: BenchOptions, size: Size | None = None) -> None:
        self.name, self.options = name, options
        self.size = size or (QUICK if options.quick else FULL)
        self.held_out = load_prompts("shapes:held_out")
        self.training = training_prompts(self.size)
        self.objective = parse(OBJECTIVE)
        self.reward = CompositeReward.from_config(self.objective)
        self.models: dict[tuple[str, int], TextToImageModel] = {}
        self.drawn: dict[tuple[int, int], Tensor] = {}
        self.eyes = Eyes()

    def model(self, form: str, steps: int) -> TextToImageModel:
        """With its denoiser in that form; made once. Calibrated forms are made for a number of steps."""
        wanted = FORMS[form]
        key = form, steps if wanted.calibrated else 0
        if key not in self.models:
            found = load_model(self.name)
            if wanted.backend is not None:
                watched = Calibration(found, self.training[::2], Drawing(steps))
                static = BACKENDS[wanted.backend].activations
                quantize_model(
                    found.denoiser,
                    wanted.backend,
                    **wanted.options,
                    input_scales=watched.input_scales() if wanted.svd_rank else None,
                    activations=watched.activation_scales() if static else None,
                )
            self.models[key] = found
        return self.models[key]

    def cell(self, form: str, steps: int, seed: int) -> dict[str, Any]:
        """Scores with the schedule as it is and with the factors found for it; from the work folder, where it is."""
        searched = "" if self.size in (FULL, QUICK) else f" {self.size.budget}x{self.size.prompts}"
        searched += " by task" if self.size.by_task else ""
        arm = f"{self.name} {form} {steps}{searched}"
        file = self.options.folder(arm, seed) / "scores.jsonl"
        return self.options.kept(
            arm,
            seed,
            lambda: self.search(form, steps, seed, file),
            key=self.key(form, "budget", "prompts", "images_per_task", "by_task"),
        )

    def key(self, form: str, *sizes: str) -> Any:
        """What a cell depends on: the objective, the form and these sizes."""
        return [OBJECTIVE, asdict(FORMS[form]), [[s, getattr(self.size, s)] for s in sizes]]

    def search(self, form: str, steps: int, seed: int, file: Path) -> dict[str, Any]:
        """The cell."""
        model = self.model(form, steps)
        model.pipeline.scheduler = QSched.wrap(model.pipeline.scheduler)
        result = tune(
            model,
            self.training,
            self.reward.score,
            Settings(self.objective, budget=self.size.budget, seed=seed),
            Drawing(num_inference_steps=steps, seed=seed),
            reference=None if form == "bf16" else self.model("bf16", steps),
            file=file,
        )
        plain = self.scores(form, steps, seed)
        model.pipeline.scheduler.set_coefficients(result.best)
        best = self.scores(form, steps, seed)
        model.pipeline.scheduler.clear_coefficients()
        accepted = best if result.accepted else plain
        found: dict[str, Any] = {"plain": plain, "best": best, "qsched": accepted}
        found["search"] = {
            "accepted": result.accepted,
            "gain": round(result.gain, 4),
            "interval": [round(v, 4) for v in result.interval],
            "calibration_value": round(result.calibration_value, 4),
            "coefficients": asdict(result.best),
            "network_rows": result.network_rows,
            "seconds": round(result.seconds, 1),
        }
        return found

    def scores(self, form: str, steps: int, seed: int) -> dict[str, float]:
        """Of held-out prompts, with the schedule that the model has now."""
        drawn = self.evaluate(form, steps, seed)
        found = {
            "geneval": drawn.tasks["overall"],
            "fid": self.eyes.fid(drawn.images),
            **{term: drawn.means[term] for term in self.objective},
        }
        found["psnr"] = psnr(drawn.images, self.full_precision(steps, seed))
        return {name: round(float(value), 4) for name, value in found.items()}

    def evaluate(self, form: str, steps: int, seed: int) -> Evaluation:
        return evaluate_model(
            self.model(form, steps),
            self.held_out,
            self.reward.score,
            EvaluationConfig(
                num_inference_steps=steps,
                images_per_task=self.size.images_per_task,
                seed=1000 + seed,
            ),
        )

    def full_precision(self, steps: int, seed: int) -> Tensor:
        """Images of the student in bfloat16, with the schedule as it is."""
        key = steps, seed
        if key not in self.drawn:
            model = self.model("bf16", steps)
            if isinstance(model.pipeline.scheduler, QSched):
                model.pipeline.scheduler.clear_coefficients()
            self.drawn[key] = self.evaluate("bf16", steps, seed).images
        return self.drawn[key]

    @torch.no_grad()
    def latency(self, form: str) -> dict[str, Any]:
        """Of a forward for a few images, over that in bfloat16: eager, turn and turn about."""
        models = [self.model(f, self.size.steps[0]) for f in ("bf16", form)]
        inputs = models[0].random_inputs(self.size.rows, *models[0].default_size)
        device = models[0].device
        with attention(device):
            calls = [lambda m=m: m.forward(*inputs) for m in models]
            base, times = interleaved(calls, device)
        return spread(t / b for t, b in zip(times, base, strict=True))

    def grid(self, seed: int) -> dict[str, Any]:
        """`against_grid`, of weights with which something is lost, in the fewest steps: cheapest there, and there is
        something to find."""
        size = self.size
        prompts, held_out = by_task(size.grid_images, size.grid_held_out)
        return self.options.kept(
            f"{self.name} published grid",
            seed,
            lambda: against_grid(
                self.model(COARSE, size.steps[0]),
                prompts,
                held_out,
                self.reward.score,
                Settings(self.objective, seed=seed),
                Drawing(num_inference_steps=size.steps[0], seed=seed),
                side=size.grid,
            ),
            key=self.key(COARSE, "grid", "grid_images", "grid_held_out"),
        )


def training_prompts(size: Size) -> list[Prompt]:
    """To search and to accept with."""
    if not size.by_task:
        return load_prompts("shapes:train", limit=size.prompts)
    return by_task(size.prompts)[0]


def by_task(*counts: int) -> list[list[Prompt]]:
    """Lists of so many training prompts each, in every one as many of each task. No two share a text; of tasks with few
    texts these repeat."""
    pools: dict[str, list[Prompt]] = {}
    for prompt in load_prompts("shapes:train"):
        pools.setdefault(prompt.task, []).append(prompt)
    found: list[list[Prompt]] = [[] for _ in counts]
    for pool in pools.values():
        random.Random(0).shuffle(pool)
        wanted = [count // len(pools) for count in counts]
        for prompts, dealt, images in zip(found, _deal(pool, wanted), wanted, strict=True):
            prompts.extend(dealt[i % len(dealt)] for i in range(images))
    return found


def _deal(pool: Sequence[Prompt], wanted: Sequence[int]) -> list[list[Prompt]]:
    """In turn to each list that has not enough yet."""
    found: list[list[Prompt]] = [[] for _ in wanted]
    waiting = iter(pool)
    while short := [hand for hand, n in zip(found, wanted, strict=True) if len(hand) < n]:
        for hand in short:
            card = next(waiting, None)
            if card is None:
                return found
            hand.append(card)
    return found


def psnr(images: Tensor, reference: Tensor) -> float:
    """Mean over images (N, 3, H, W) uint8, dB; of equal images 78."""
    error = (images.float() - reference.float()).square().flatten(1).mean(1).clamp_min(1e-3)
    return float((10 * torch.log10(255**2 / error)).mean())


def run(options: BenchOptions) -> dict[str, Any]:
    """All students, forms and steps over all seeds; `options.arms` chooses among students, "larger", "sizes" and
    "speeds"."""
    chosen = options.chosen((*STUDENTS, "larger", "sizes", "speeds"))
    found: dict[str, Any] = {"size": asdict(QUICK if options.quick else FULL)}
    headline: dict[str, Any] = {}
    students = {n: Student(n, options) for n in STUDENTS if n in chosen}
    found["students"] = {n: measure(s, options.seeds) for n, s in students.items()}
    if students:
        found["recovered"] = {
            form: {score: recovered(found["students"].values(), score, form) for score in SCORES}
            for form in FORMS
            if FORMS[form].backend is not None
        }
        for form in BRANCHED:
            name = f"{COARSE}, with a branch of rank {FORMS[form].svd_rank}"
            found["recovered"][name] = {
                score: recovered(found["students"].values(), score, COARSE, repaired=form)
                for score in SCORES
            }
        headline["quality_recovered"] = {
            form: {"share": g["share"], "lost": g["means"]["lost"]}
            for form, g in ((f, rows["geneval"]) for f, rows in found["recovered"].items())
        }
        grids = [g for s in found["students"].values() for g in s["grid"]]
        headline["network_calls_vs_grid"] = summary(grids)
    if "larger" in chosen and not options.quick:
        found["larger"] = {name: larger(options, size) for name, size in LARGER.items()}
    if "sizes" in chosen:
        found["sizes"] = published_sizes()
        headline["bytes_ratio"] = {
            name: sizes["int4"]["ratio"] for name, sizes in found["sizes"].items()
        }
    if "speeds" in chosen:
        found["speeds"] = speeds(quick=options.quick)
        headline["int8_latency_vs_bf16"] = found["speeds"]["int8_latency_vs_bf16"]
    return {"headline": headline, **found}


def measure(student: Student, seeds: int) -> dict[str, Any]:
    """Cells of all forms, their bytes, and the grid."""
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
            "steps": {steps: table(found) for steps, found in cells.items()},
        }
    return {
        "forms": forms,
        "grid": [student.grid(s) for s in range(min(seeds, student.size.grid_seeds))],
    }


def larger(options: BenchOptions, size: Size) -> dict[str, Any]:
    """Searches of more prompts and candidates, and what they give back."""
    usual, student = Student(STUDENTS[1], options), Student(STUDENTS[1], options, size)
    forms = {
        form: {
            "steps": {
                str(steps): table([of.cell(form, steps, s) for s in range(options.seeds)])
                for steps in size.steps
            }
        }
        for form, of in (("bf16", usual), (COARSE, student))
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
    """Of one form and number of steps: with the schedule as it is, with the best candidate, and with that where it was
    accepted; and what the searches found."""
    return {
        **{
            how: {name: spread(c[how][name] for c in cells) for name in cells[0][how]}
            for how in ("plain", "best", "qsched")
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
    """What the factors give back of a score that quantising took, over all students, seeds and steps (or these);
    `means`, over cells, tell how much there was to give back; `control` is what they give to the student in full
    precision. `repaired` is the form that stands in for `form` with them."""
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
