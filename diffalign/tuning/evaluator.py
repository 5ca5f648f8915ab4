"""Scores of candidates on images from the same prompts and the same noise.

The first prediction does not depend on factors, so it is computed once. Candidates share batches; each row has its own
factors. Scores are stored in a file, so that an interrupted search resumes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.core.fingerprint import of_json
from diffalign.core.interruption import Interrupted, Interruption
from diffalign.data.prompts import Prompt, told
from diffalign.evaluation.score import Score, image_seeds, repeat_prompts
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampler import Sampler
from diffalign.pipelines.sampling import Sampling, generators_of
from diffalign.schedulers import Coefficients, QSched
from diffalign.tuning.objective import Scores

__all__ = ["Drawing", "Evaluator"]

DIGITS = 6
"""Decimal places of factors in the file; smaller differences do not matter."""


class Evaluator:
    """Evaluator of candidates on some prompts.

    Args:
        model: model whose pipeline has a `QSched` as its scheduler.
        prompts: calibration prompts.
        score: function like `CompositeReward.score`; its details contain each of `terms`.
        terms: names of the scores.
        drawing: sampling settings of all images.
        file: file of scores; None stores none.
        key: everything else that scores depend on. Scores of the file with another key are ignored.

    Attributes:
        on_scores: is called with every candidate and its scores, whether they are new or from the file.
        network_rows: rows of the denoiser's forwards; two per image under classifier-free guidance.
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
            raise UsageError("prompts: there is no prompt to calibrate with. Give at least one.")
        if drawing.solver != "default":
            raise UsageError(
                f"solver={drawing.solver}: factors belong to the scheduler's own steps. Set it to default."
            )
        if not isinstance(model.pipeline.scheduler, QSched):
            raise TypeError(
                "The pipeline's scheduler has no factors. Wrap it first with QSched.wrap."
            )
        self.model, self.score, self.terms, self.drawing = model, score, list(terms), drawing
        self.prompts = repeat_prompts(prompts, drawing)
        self.seeds = image_seeds(drawing, len(self.prompts))
        self.sampler = Sampler(model, drawing)
        self.on_scores: Callable[[Coefficients, Scores], object] | None = None
        self.network_rows = 0
        self._first: list[Tensor] | None = None
        self._file = file
        plain = asdict(drawing)
        del plain["micro_batch_size"]
        self.key = of_json([plain, told(self.prompts), self.terms, key], default=str)[:16]
        self._scores = self._read()

    def __call__(self, candidates: Sequence[Coefficients]) -> list[Scores]:
        """Return the scores (P,) of every term for every candidate."""
        names = [self._name(c) for c in candidates]
        new: dict[str, Coefficients] = {}
        for name, candidate in zip(names, candidates, strict=True):
            if name in self._scores:
                self._notify(candidate, self._scores[name])
            else:
                new[name] = candidate
        if new:
            self._evaluate(list(new.values()), list(new))
        return [self._scores[n] for n in names]

    @property
    def scored(self) -> int:
        """Return the number of candidates that have scores."""
        return len(self._scores)

    def _name(self, candidate: Coefficients) -> str:
        return " ".join(f"{v:.{DIGITS}f}" for v in candidate.vector)

    def _evaluate(self, candidates: list[Coefficients], names: list[str]) -> None:
        """Score candidates in batches of (candidate, image) rows.

        The rows of one candidate may lie in several batches.
        """
        each = len(self.prompts)
        if self._first is None:
            self._first = self._first_predictions()
        waiting: dict[str, list[np.ndarray]] = {term: [] for term in self.terms}
        pending, done = 0, 0
        everything = range(len(candidates) * each)
        with Interruption("the current candidate is scored and stored") as interruption:
            for part in self.drawing.batches(len(everything)):
                rows = everything[part]
                output = self._draw(rows, candidates)
                for term in self.terms:
                    waiting[term].append(output[term])
                pending += len(rows)
                # All images of a candidate are scored.
                while pending >= each:
                    joined = {term: np.concatenate(waiting[term]) for term in self.terms}
                    scores = {term: joined[term][:each] for term in self.terms}
                    waiting = {term: [joined[term][each:]] for term in self.terms}
                    pending -= each
                    self._store(names[done], scores)
                    self._notify(candidates[done], scores)
                    done += 1
                    if interruption.number:
                        raise Interrupted(interruption.number, self._progress())

    def _progress(self) -> str:
        if self._file is None:
            return "the scores are lost, since they are stored in no file"
        return f"{len(self._scores)} candidates are scored in {self._file}; the same command resumes from there"

    def _draw(self, rows: range, candidates: list[Coefficients]) -> dict[str, np.ndarray]:
        """Sample and score some rows of (candidate, image)."""
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
        prompts = [self.prompts[i] for i in images]
        output = self.score(pixels, [p.text for p in prompts], [p.metadata for p in prompts])
        return {term: output.details[term] for term in self.terms}

    def count_rows(self, images: int, *, forwards: int) -> None:
        """Add a forward's rows to `network_rows`."""
        rows = self.model.forward_rows(images, self.drawing.guidance_scale)
        self.network_rows += rows * forwards

    def batch(self, images: Sequence[int]) -> tuple[Sampling, list[torch.Generator]]:
        """Return a sampling run and generators for images by number.

        Call it outside of `computing`: the text encoders run in their own precision.
        """
        run = self.sampler.batch([self.prompts[i].text for i in images])
        return run, generators_of([self.seeds[i] for i in images])

    @torch.no_grad()
    def _images(self, images: Sequence[int], first_pred: Tensor) -> Tensor:
        """Sample and decode images (B, 3, H, W) uint8 on the CPU."""
        run, generators = self.batch(images)
        with self.sampler.computing():
            return self.model.decode(run.draw(generators, first_pred=first_pred)).cpu()

    @torch.no_grad()
    def _first_predictions(self) -> list[Tensor]:
        """Return the first prediction (C, H, W) of every image, on the CPU."""
        predictions: list[Tensor] = []
        images = range(len(self.prompts))
        for part in self.drawing.batches(len(images)):
            run, generators = self.batch(images[part])
            with self.sampler.computing():
                predictions.extend(run.predict(0, run.start(generators)).cpu())
            self.count_rows(len(images[part]), forwards=1)
        return predictions

    def _notify(self, candidate: Coefficients, scores: Scores) -> None:
        if self.on_scores is not None:
            self.on_scores(candidate, scores)

    def _read(self) -> dict[str, Scores]:
        """Load cached scores for this key.

        Truncated lines are skipped. Candidates with missing scores are evaluated again, since a reward service may
        have been away.
        """
        by_candidate: dict[str, Scores] = {}
        if self._file is None or not self._file.is_file():
            return by_candidate
        for line in self._file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                scores = {k: np.array(v, np.float32) for k, v in row["scores"].items()}
                key, name = row["key"], row["candidate"]
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
            is_complete = set(scores) == set(self.terms)
            if (
                key == self.key
                and is_complete
                and all(np.isfinite(v).all() for v in scores.values())
            ):
                by_candidate[name] = scores
        return by_candidate

    def _store(self, name: str, scores: Scores) -> None:
        self._scores[name] = scores
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        plain = {k: [float(v) for v in values] for k, values in scores.items()}
        line = json.dumps({"key": self.key, "candidate": name, "scores": plain})
        with self._file.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # A crash can truncate the last line.
                if file.read(1) != b"\n":
                    line = f"\n{line}"
            file.write(f"{line}\n".encode())
