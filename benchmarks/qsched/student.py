"""Few-step students of Shapes in all weight formats, and the cells of the Q-Sched benchmark."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.eyes import Eyes
from benchmarks.common.record import BenchOptions, spread
from benchmarks.qsched.forms import CALIBRATION_STEPS, COARSE, FORMS, built
from benchmarks.qsched.published_grid import against_grid
from diffalign.core.precision import attention
from diffalign.data.prompts import Prompt, load_prompts
from diffalign.evaluation.likeness import psnr
from diffalign.evaluation.score import Evaluation, evaluate_model
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.registry import load_model
from diffalign.quantization.latency import interleaved
from diffalign.rewards.composition import CompositeReward
from diffalign.schedulers import QSched
from diffalign.tuning.calibration import Calibration
from diffalign.tuning.objective import parse
from diffalign.tuning.tune import Settings, tune

STEPS = (2, 4, 8)
OBJECTIVE = "jaq-shapes"


@dataclass(frozen=True)
class Size:
    """Amounts of prompts, candidates and images."""

    budget: int = 24
    prompts: int = 96
    images_per_task: int = 48
    grid: int = 50
    grid_images: int = 18
    grid_held_out: int = 192
    grid_seeds: int = 2
    rows: int = 16
    by_task: bool = False
    """True if every task has the same number of prompts, as in GenEval.

    Otherwise prompts follow the training distribution, where five of six ask for the colours of two objects.
    """
    steps: tuple[int, ...] = STEPS


FULL = Size()
LARGER = {
    "more": Size(budget=48, prompts=384, steps=(2, 4)),
    "more by task": Size(budget=48, prompts=384, by_task=True, steps=(2, 4)),
}
"""Larger searches where much is lost: `COARSE` of the second student.

They have four times the prompts and twice the candidates.
"""
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
    """Few-step model in all weight formats."""

    forms = FORMS

    def __init__(self, name: str, options: BenchOptions, size: Size | None = None) -> None:
        self.name, self.options = name, options
        self.size = size or (QUICK if options.quick else FULL)
        self.held_out = load_prompts("shapes:held_out")
        self.training = training_prompts(self.size)
        self.objective = parse(OBJECTIVE)
        self.reward = CompositeReward.from_config(self.objective)
        self.models: dict[tuple[str, int], TextToImageModel] = {}
        self.images: dict[tuple[int, int], Tensor] = {}
        self.eyes = Eyes()

    def model(self, form: str, steps: int) -> TextToImageModel:
        """Return the student with its denoiser in one format, built once.

        A format that is calibrated for timesteps is built per number of steps.
        """
        spec = self.forms[form]
        key = form, steps if spec.by_steps else 0
        if key not in self.models:
            model = load_model(self.name)
            if spec.backend is not None:
                number = steps if spec.by_steps else CALIBRATION_STEPS
                built(model, spec, Calibration(model, self.training[::2], Drawing(number)))
            self.models[key] = model
        return self.models[key]

    def cell(self, form: str, steps: int, seed: int) -> dict[str, Any]:
        """Return the scores of one cell, from the work folder if they are cached.

        The scores are with the original schedule and with the factors of a search.
        """
        suffix = "" if self.size in (FULL, QUICK) else f" {self.size.budget}x{self.size.prompts}"
        suffix += " by task" if self.size.by_task else ""
        arm = f"{self.name} {form} {steps}{suffix}"
        file = self.options.folder(arm, seed) / "scores.jsonl"
        return self.options.cached(
            arm,
            seed,
            lambda: self.search(form, steps, seed, file),
            key=self.key(form, "budget", "prompts", "images_per_task", "by_task"),
        )

    def key(self, form: str, *sizes: str) -> Any:
        """Return everything that a cell depends on: the objective, the format and these sizes."""
        return [OBJECTIVE, asdict(self.forms[form]), [[s, getattr(self.size, s)] for s in sizes]]

    def search(self, form: str, steps: int, seed: int, file: Path) -> dict[str, Any]:
        """Compute one cell: search, then score the original schedule and the factors."""
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
        cell: dict[str, Any] = {"plain": plain, "best": best, "qsched": accepted}
        cell["search"] = {
            "accepted": result.accepted,
            "gain": round(result.gain, 4),
            "interval": [round(v, 4) for v in result.interval],
            "calibration_value": round(result.calibration_value, 4),
            "coefficients": asdict(result.best),
            "network_rows": result.network_rows,
            "seconds": round(result.seconds, 1),
        }
        return cell

    def scores(self, form: str, steps: int, seed: int) -> dict[str, float]:
        """Score held-out prompts with the model's current schedule."""
        evaluation = self.evaluate(form, steps, seed)
        scores = {
            "geneval": evaluation.tasks["overall"],
            "fid": self.eyes.fid(evaluation.images),
            **{term: evaluation.means[term] for term in self.objective},
        }
        scores["psnr"] = psnr(evaluation.images, self.full_precision(steps, seed))
        return {name: round(float(value), 4) for name, value in scores.items()}

    def evaluate(self, form: str, steps: int, seed: int) -> Evaluation:
        return evaluate_model(
            self.model(form, steps),
            self.held_out,
            self.reward.score,
            Drawing(
                num_inference_steps=steps,
                images_per_task=self.size.images_per_task,
                seed=1000 + seed,
            ),
        )

    def full_precision(self, steps: int, seed: int) -> Tensor:
        """Return images of the student in bfloat16 with the original schedule."""
        key = steps, seed
        if key not in self.images:
            model = self.model("bf16", steps)
            if isinstance(model.pipeline.scheduler, QSched):
                model.pipeline.scheduler.clear_coefficients()
            self.images[key] = self.evaluate("bf16", steps, seed).images
        return self.images[key]

    @torch.no_grad()
    def latency(self, form: str) -> dict[str, Any]:
        """Time a forward for a few images relative to bfloat16, eager and interleaved."""
        models = [self.model(f, self.size.steps[0]) for f in ("bf16", form)]
        inputs = models[0].random_inputs(self.size.rows, models[0].default_size)
        device = models[0].device
        with attention(device):
            calls = [lambda m=m: m.forward(*inputs) for m in models]
            base, times = interleaved(calls, device)
        return spread(t / b for t, b in zip(times, base, strict=True))

    def grid(self, seed: int) -> dict[str, Any]:
        """Run `against_grid` with coarse weights and the fewest steps.

        There a search is cheapest, and there is a loss to repair.
        """
        size = self.size
        prompts, held_out = by_task(size.grid_images, size.grid_held_out)
        return self.options.cached(
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
    """Load the prompts for searching and for accepting its result."""
    if not size.by_task:
        return load_prompts("shapes:train", limit=size.prompts)
    return by_task(size.prompts)[0]


def by_task(*counts: int) -> list[list[Prompt]]:
    """Return one list of training prompts per count, balanced over tasks.

    No two lists share a text. A task with few texts repeats them.
    """
    pools: dict[str, list[Prompt]] = {}
    for prompt in load_prompts("shapes:train"):
        pools.setdefault(prompt.task, []).append(prompt)
    lists: list[list[Prompt]] = [[] for _ in counts]
    for pool in pools.values():
        random.Random(0).shuffle(pool)
        per_task = [count // len(pools) for count in counts]
        for prompts, dealt, images in zip(lists, _deal(pool, per_task), per_task, strict=True):
            prompts.extend(dealt[i % len(dealt)] for i in range(images))
    return lists


def _deal(pool: Sequence[Prompt], counts: Sequence[int]) -> list[list[Prompt]]:
    """Deal prompts in turn to the lists that are still shorter than their count."""
    hands: list[list[Prompt]] = [[] for _ in counts]
    waiting = iter(pool)
    while short := [hand for hand, n in zip(hands, counts, strict=True) if len(hand) < n]:
        for hand in short:
            card = next(waiting, None)
            if card is None:
                return hands
            hand.append(card)
    return hands
