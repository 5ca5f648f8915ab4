"""Distil a base model into a student that samples in few steps.

The base model (teacher) samples whole trajectories; a LoRA on it (student) learns to follow them in few steps. Teacher
and student share the base model's weights, so there is no second copy of them. Prompts are the only training data.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from diffalign import lora
from diffalign.algorithms.distillation import subdivide
from diffalign.config import DistillationRunConfig, EvaluationConfig
from diffalign.core.errors import UsageError
from diffalign.core.seeds import STATES, stream
from diffalign.data.prompts import Prompt
from diffalign.diffusion.inversion import integrate, inversion_grid
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.cards import DrawingCard
from diffalign.pipelines.compiled import CompiledSizes
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampler import Sampler
from diffalign.pipelines.sampling import generators_of
from diffalign.training.denoise import predict
from diffalign.training.inputs import Inputs
from diffalign.training.plan import Plan, check_prompts, check_share, make_plan
from diffalign.training.sums import Sums, accumulate, micro_batches
from diffalign.training.trainer import Trainer
from diffalign.types import PromptEmbeds


def student_scheduler(model: TextToImageModel, method: str) -> Any:
    """Return the diffusers scheduler that a student of this method samples with.

    For "reflow" a flow model has its own scheduler, and a noise predictor has DDIM with "trailing" timesteps, which
    begins at pure noise. For "consistency" a flow model has FlowMatchLCM, and a noise predictor has LCM.
    """
    own = model.pipeline.scheduler
    flow = isinstance(model.noise, RectifiedFlow)
    if method == "reflow" and flow:
        return own
    if method == "reflow":
        return diffusers.DDIMScheduler.from_config(
            own.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
        )
    kind = diffusers.FlowMatchLCMScheduler if flow else diffusers.LCMScheduler
    return kind.from_config(own.config)


@dataclass
class Trajectories:
    """Trajectories of B images, sampled by the teacher.

    Attributes:
        states: states (K + 1, B, C, H, W) float32 on the falling grid, from noise to clean.
        embeds: embeddings of the prompts (B rows).
        image: index of each image within the update (B,).
    """

    states: Tensor
    embeds: PromptEmbeds
    image: list[int]

    def __getitem__(self, rows: slice) -> Trajectories:
        return Trajectories(self.states[:, rows], self.embeds[rows], self.image[rows])


@dataclass
class DistillationTrainer(Trainer):
    """Trainer of distillation runs. The policies are the student's; the reference is the teacher.

    A subclass has the losses of one kind of student.
    """

    config: DistillationRunConfig
    prompts: Sequence[Prompt]

    @classmethod
    def taken_from(cls, inputs: Inputs) -> dict[str, Any]:
        return {"prompts": inputs.train}

    def __post_init__(self) -> None:
        super().__post_init__()
        c, world = self.config, self.accelerator.num_processes
        check_share(c.teacher.prompts_per_update, world, setting="teacher.prompts_per_update")
        check_prompts(self.prompts, c)
        if self.model.costs_a_forward(c.evaluation.guidance_scale):
            raise UsageError(
                f"evaluation.guidance_scale: a student of {c.model.name} learns the teacher's guidance "
                "(teacher.guidance_scale) and samples without guidance. Remove the setting"
            )
        self.scheduler = student_scheduler(self.model, c.algorithm.type)
        self.coarse = self._student_grid()
        steps = len(self.coarse) - 1
        parts = -(-c.teacher.num_inference_steps // steps)
        self.grid = subdivide(self.coarse, parts)
        self.sampler = Sampler(
            self.model,
            Drawing(
                c.teacher.num_inference_steps,
                c.teacher.guidance_scale,
                self.size,
                micro_batch_size=c.teacher.micro_batch_size,
                mixed_precision=c.training.mixed_precision,
            ),
        )
        # Guidance that costs a second forward is the teacher's alone; an embedded one is part of the student's input.
        embedded = self.model.guidance_is_embedded
        self.guidance_scale = c.evaluation.guidance_scale if embedded else None

    def _student_grid(self) -> Tensor:
        """Return the student's timesteps (N + 1,), from noise to the clean end."""
        with self._student():
            scheduler = self.model.scheduler_at(
                self.config.evaluation.num_inference_steps, self.size
            )
        return inversion_grid(scheduler.timesteps).flip(0)

    def full_batches(self) -> CompiledSizes:
        c = self.config
        share = -(-c.teacher.prompts_per_update // self.accelerator.num_processes)
        trained = min(c.training.micro_batch_size, share) * c.algorithm.states_per_image
        sampled = min(c.teacher.micro_batch_size, share)
        plain = {
            self.model.forward_rows(sampled, c.teacher.guidance_scale),
            c.teacher.micro_batch_size,
            self.model.forward_rows(c.teacher.micro_batch_size, c.teacher.guidance_scale),
        }
        return CompiledSizes({trained}, plain | {trained} if self.bootstraps else plain)

    @property
    def bootstraps(self) -> bool:
        """True if the averaged student predicts the targets of the student."""
        return False

    def learn(self, number: int) -> tuple[int, dict[str, Any]]:
        """Sample the teacher's trajectories of new prompts, and train one optimizer step on them."""
        started = time.perf_counter()
        c = self.config
        plan = make_plan(
            self.prompts, c.teacher, seed=c.training.seed, update=number, tasks=c.prompts
        )
        trajectories = self.draw(plan)
        teacher_seconds = time.perf_counter() - started
        sums = Sums(["loss", "relative_error"], self.accelerator.device)
        states = len(plan) * c.algorithm.states_per_image
        self.optimizer.zero_grad()
        accumulate(
            micro_batches(len(trajectories.image), c.training.micro_batch_size),
            lambda rows: (
                self.losses(trajectories[rows.start : rows.stop], sums, update=number).sum()
                / states
            ),
            self.accelerator.device,
        )
        return len(plan), self.descend(number, sums) | {"teacher_seconds": teacher_seconds}

    def draw(self, plan: Plan) -> Trajectories:
        """Sample this process's share of the teacher's trajectories."""
        mine = self.share(len(plan))
        prompt_embeds = self.sampler.embed([p.text for p in plan.prompts])
        embeds = prompt_embeds[plan.prompt_index[mine.start : mine.stop].to(self.model.device)]
        seeds = plan.seeds[mine.start : mine.stop]
        parts = []
        with lora.policy(self.model.denoiser, lora.REFERENCE):
            for rows in self.sampler.drawing.batches(len(embeds)):
                parts.append(self._trajectory(embeds[rows], seeds[rows]))
        states = torch.cat(parts, dim=1)
        return Trajectories(states, embeds, list(mine))

    def _trajectory(self, embeds: PromptEmbeds, seeds: Sequence[int]) -> Tensor:
        """Sample one micro-batch of the teacher's trajectories, from the noise of `seeds`.

        The states are (K + 1, B, C, H, W) float32.
        """
        batch = self.sampler.batch(embeds)
        latents = batch.noise(generators_of(seeds), dtype=torch.float32)

        def field(noisy: Tensor, times: Tensor) -> Tensor:
            return predict(
                self.model,
                noisy,
                times,
                embeds,
                mixed_precision=self.config.training.mixed_precision,
                guidance_scale=self.config.teacher.guidance_scale,
                negative_embeds=batch.negative_embeds,
            )

        solver = self.config.teacher.solver
        return torch.stack(integrate(field, latents, self.grid, self.model.noise, solver=solver))

    @abstractmethod
    def losses(self, trajectories: Trajectories, sums: Sums, *, update: int) -> Tensor:
        """Return the losses (B * S,) of S states of each trajectory.

        Their metrics are added to `sums`.
        """

    def rows_of_states(self, trajectories: Trajectories) -> Tensor:
        """Return the row of the trajectory (B * S,) of each of its S states."""
        count = self.config.algorithm.states_per_image
        return torch.arange(len(trajectories.image)).repeat_interleave(count)

    def predict(self, noisy: Tensor, times: Tensor, embeds: PromptEmbeds) -> Tensor:
        """Return the prediction with the student's guidance, which costs no second forward."""
        return predict(
            self.model,
            noisy,
            times,
            embeds,
            mixed_precision=self.config.training.mixed_precision,
            guidance_scale=self.guidance_scale,
        )

    def choices(
        self, images: Sequence[int], kinds: int, update: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw random choices for S states of every image.

        Returns:
            A number below `kinds` for each state (B * S,), spread evenly for each image, and two uniform numbers in
            [0, 1), (B * S,) each.
        """
        count = self.config.algorithm.states_per_image
        picks, numbers = [], []
        for image in images:
            seed = stream(STATES, self.config.training.seed, update, image)
            generator = torch.Generator().manual_seed(seed)
            places = (torch.arange(count) + torch.rand(1, generator=generator)) / count
            picks.append((places * kinds).long().clamp(max=kinds - 1))
            numbers.append(torch.rand(2, count, generator=generator))
        pair = torch.cat(numbers, dim=1)
        return torch.cat(picks), pair[0], pair[1]

    @contextmanager
    def _student(self) -> Iterator[None]:
        """Give the pipeline the student's scheduler while the context lasts."""
        own = self.model.pipeline.scheduler
        self.model.pipeline.scheduler = self.scheduler
        try:
            yield
        finally:
            self.model.pipeline.scheduler = own

    @contextmanager
    def drawing(self, policy: str) -> Iterator[None]:
        with super().drawing(policy):
            if policy == lora.REFERENCE:
                yield
            else:
                with self._student():
                    yield

    def evaluation(self, policy: str) -> EvaluationConfig:
        """Return the sampling settings of a policy: the student's, or the teacher's for the reference."""
        c = self.config
        if policy != lora.REFERENCE:
            return c.evaluation
        return replace(
            c.evaluation,
            num_inference_steps=len(self.grid) - 1,
            guidance_scale=c.teacher.guidance_scale,
        )

    def export(self, folder: Path) -> None:
        """Save the LoRA, the student's scheduler and its sampling settings.

        The student needs this scheduler, and the number of steps that it was trained for.
        """
        super().export(folder)
        self.scheduler.save_pretrained(folder / "scheduler")
        evaluation = self.config.evaluation
        DrawingCard(evaluation.num_inference_steps, evaluation.guidance_scale).save(
            folder / "scheduler"
        )

    def headline(self, row: dict[str, Any]) -> dict[str, str]:
        return {
            "relative_error": f"{row['relative_error']:.4f}",
            "images_per_s": f"{row['images_per_second']:.1f}",
        }

    def facts(self) -> dict[str, Any]:
        return {
            "student_scheduler": type(self.scheduler).__name__,
            "student_timesteps": self.coarse.tolist(),
            "teacher_steps": len(self.grid) - 1,
        }
