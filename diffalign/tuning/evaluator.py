"""The images that candidates draw, and their scores: same prompts, same noise, each candidate's factors.

The first prediction depends on no factor, so it is made once; candidates share batches, each row with its own; and what
was scored is kept in a file, so that a search that was killed goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.core.fingerprint import of_json
from diffalign.core.interruption import Interrupted, Interruption
from diffalign.core.precision import compute
from diffalign.core.seeds import EVALUATION, stream
from diffalign.data.prompts import Prompt, told
from diffalign.evaluation.score import Score
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.sampling import EmbedCache, Sampling
from diffalign.schedulers import Coefficients, QSched
from diffalign.tuning.objective import Scores

DIGITS = 6
"""Of factors in the file: finer differences are no difference."""


@dataclass(frozen=True)
class Drawing:
    """How calibration images are drawn; sizes in pixels, None is the model's own."""

    num_inference_steps: int = 4
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    images_per_prompt: int = 1
    seed: int = 0
    micro_batch_size: int = 64
    mixed_precision: str = "bf16"

    def __post_init__(self) -> None:
        for name, flag in (
            ("num_inference_steps", "num_inference_steps"),
            ("images_per_prompt", "images_per_prompt"),
            ("micro_batch_size", "batch_size"),
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{flag} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise UsageError(f"seed must be at least 0, got {self.seed}")


class Evaluator:
    """Scores candidates on some prompts.

    Args:
        model: its pipeline's scheduler is a `QSched`.
        prompts: of calibration.
        score: as `CompositeReward.score`; each of `terms` is among its details.
        drawing: of all images.
        file: where scores are kept, or None.
        key: what else scores depend on; with another key nothing of the file is used.

    `on_scores` is called with every candidate and its scores, whether they were drawn now or lay in the file.

    `network_rows` counts rows of the denoiser's forwards, two an image under classifier-free guidance.
    """

    def __init__(
        self,
        model: TextToImageModel,
        prompts: Sequence[Prompt],
        score: Score,
        terms: Sequence[str],
        drawing: Drawing,
        *,
        file: Path | None = None,
        key: Any = None,
    ) -> None:
        if not prompts:
            raise UsageError("prompts: there is no prompt to calibrate with")
        if not isinstance(model.pipeline.scheduler, QSched):
            raise TypeError("wrap the pipeline's scheduler first: QSched.wrap")
        self.model, self.score, self.terms, self.drawing = model, score, list(terms), drawing
        self.prompts = [p for p in prompts for _ in range(drawing.images_per_prompt)]
        count = range(len(self.prompts))
        self.seeds = [stream(EVALUATION, drawing.seed, i) for i in count]
        self.embed = EmbedCache(model)
        self.on_scores: Callable[[Coefficients, Scores], object] | None = None
        self.network_rows = 0
        self._first: list[Tensor] | None = None
        self._file = file
        plain = asdict(drawing)
        del plain["micro_batch_size"]
        self.key = of_json([plain, told(self.prompts), self.terms, key], default=str)[:16]
        self._known = self._read()

    def __call__(self, candidates: Sequence[Coefficients]) -> list[Scores]:
        """Scores (P,) of every term for every candidate."""
        names = [self._name(c) for c in candidates]
        new: dict[str, Coefficients] = {}
        for name, candidate in zip(names, candidates, strict=True):
            if name in self._known:
                self._tell(candidate, self._known[name])
            else:
                new[name] = candidate
        if new:
            self._evaluate(list(new.values()), list(new))
        return [self._known[n] for n in names]

    @property
    def known(self) -> int:
        """Candidates that have scores."""
        return len(self._known)

    def _name(self, candidate: Coefficients) -> str:
        return " ".join(f"{v:.{DIGITS}f}" for v in candidate.vector)

    def _evaluate(self, candidates: list[Coefficients], names: list[str]) -> None:
        """Rows are (candidate, image) pairs; those of one candidate may lie in several batches."""
        each = len(self.prompts)
        if self._first is None:
            self._first = self._first_predictions()
        waiting: dict[str, list[np.ndarray]] = {term: [] for term in self.terms}
        held, done = 0, 0
        size = self.drawing.micro_batch_size
        with Interruption("the candidate in hand is scored and kept") as interruption:
            for start in range(0, len(candidates) * each, size):
                rows = range(start, min(start + size, len(candidates) * each))
                output = self._draw(rows, candidates)
                for term in self.terms:
                    waiting[term].append(output[term])
                held += len(rows)
                while held >= each:  # a candidate is whole
                    joined = {term: np.concatenate(waiting[term]) for term in self.terms}
                    scores = {term: joined[term][:each] for term in self.terms}
                    waiting = {term: [joined[term][each:]] for term in self.terms}
                    held -= each
                    self._keep(names[done], scores)
                    self._tell(candidates[done], scores)
                    done += 1
                    if interruption.number:
                        raise Interrupted(interruption.number, self._kept())

    def _kept(self) -> str:
        if self._file is None:
            return "scores are kept in no file"
        return f"{len(self._known)} candidates are scored in {self._file}; the same command goes on from there"

    def _draw(self, rows: range, candidates: list[Coefficients]) -> dict[str, np.ndarray]:
        """Scores of some rows."""
        each = len(self.prompts)
        images = [r % each for r in rows]
        columns = [candidates[r // each] for r in rows]
        factors = [
            torch.tensor([getattr(c, name) for c in columns], dtype=torch.float32).T
            for name in ("sample", "model_output")
        ]
        assert self._first is not None
        first = torch.stack([self._first[i] for i in images]).to(self.model.device)
        with self.model.pipeline.scheduler.trial(*factors):
            pixels = self._images(images, first)
        self.count_rows(len(rows), forwards=self.drawing.num_inference_steps - 1)
        asked = [self.prompts[i] for i in images]
        output = self.score(pixels, [p.text for p in asked], [p.metadata for p in asked])
        return {term: output.details[term] for term in self.terms}

    def count_rows(self, images: int, *, forwards: int) -> None:
        """Add to `network_rows`."""
        rows = self.model.forward_rows(images, self.drawing.guidance_scale)
        self.network_rows += rows * forwards

    def batch(self, images: Sequence[int]) -> tuple[Sampling, list[torch.Generator]]:
        """These numbers of images, ready to be drawn."""
        d = self.drawing
        guided = self.model.costs_a_forward(d.guidance_scale)
        size = self.model.default_size
        run = Sampling(
            self.model,
            self.embed([self.prompts[i].text for i in images]),
            d.num_inference_steps,
            d.height or size[0],
            d.width or size[1],
            d.guidance_scale,
            self.embed([""]).repeat_first(len(images)) if guided else None,
        )
        return run, [torch.Generator().manual_seed(self.seeds[i]) for i in images]

    @torch.no_grad()
    def _images(self, images: Sequence[int], first_pred: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 on the CPU."""
        with compute(self.model.device, self.drawing.mixed_precision):
            run, generators = self.batch(images)
            return self.model.decode(run.draw(generators, first_pred=first_pred)).cpu()

    @torch.no_grad()
    def _first_predictions(self) -> list[Tensor]:
        """One (C, H, W) an image, on the CPU."""
        found: list[Tensor] = []
        size = self.drawing.micro_batch_size
        for start in range(0, len(self.prompts), size):
            part = range(start, min(start + size, len(self.prompts)))
            with compute(self.model.device, self.drawing.mixed_precision):
                run, generators = self.batch(part)
                found.extend(run.predict(0, run.start(generators)).cpu())
            self.count_rows(len(part), forwards=1)
        return found

    def _tell(self, candidate: Coefficients, scores: Scores) -> None:
        if self.on_scores is not None:
            self.on_scores(candidate, scores)

    def _read(self) -> dict[str, Scores]:
        """Of this key; a line that a crash cut is left out, and what could not be scored is tried again: a service may
        have been away."""
        found: dict[str, Scores] = {}
        if self._file is None or not self._file.is_file():
            return found
        for line in self._file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                scores = {k: np.array(v, np.float32) for k, v in row["scores"].items()}
                key, name = row["key"], row["candidate"]
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
            whole = set(scores) == set(self.terms)
            if key == self.key and whole and all(np.isfinite(v).all() for v in scores.values()):
                found[name] = scores
        return found

    def _keep(self, name: str, scores: Scores) -> None:
        self._known[name] = scores
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        plain = {k: [float(v) for v in values] for k, values in scores.items()}
        line = json.dumps({"key": self.key, "candidate": name, "scores": plain})
        with self._file.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the last line was cut
                    line = f"\n{line}"
            file.write(f"{line}\n".encode())
