"""Measure time and memory of AWM's updates by phase, at published sizes.

Weights are random and the device is CUDA; the denoiser's blocks run both compiled and eager. A phase is one of the
trainer's own calls on random latents and embeddings. Text encoders are left out: they encode each prompt once and may
run elsewhere. Rewards have their own benchmark.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
from torch import Tensor

from benchmarks.common.peak_memory import peak_bytes
from benchmarks.common.record import BenchOptions, spread
from benchmarks.dcgen.latency import kl_autoencoder, tensors_of
from diffalign import lora
from diffalign.config import RunConfig, load, to_dict
from diffalign.core import processes
from diffalign.core.precision import attention
from diffalign.data.prompts import Prompt
from diffalign.methods.online.forward_update import ForwardProcessUpdate
from diffalign.methods.online.trainer import OnlineTrainer
from diffalign.methods.online.update import TrainingBatch
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.compiled import compile_blocks
from diffalign.pipelines.published import denoiser
from diffalign.pipelines.registry import wrap_pipeline
from diffalign.pipelines.sampling import Sampling
from diffalign.quantization.latency import interleaved
from diffalign.shapes.text import build_clip_tokenizer
from diffalign.training.run_folder import RunFolder
from diffalign.training.sums import Sums
from diffalign.types import PromptEmbeds, no_reward

NAME = "phases"
RECIPES = {"sd3.5-medium": "awm-sd3.5-medium", "flux.1-dev": "awm-flux.1-dev"}
REPEATS = 3
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Phase:
    """One part of an update.

    Attributes:
        call: runs the phase once.
        rows: images of a call, or rows of the denoiser's forward.
        calls: number of calls per update in one process.
        inputs: tensors that the call reads.
    """

    call: Callable[[], Any]
    rows: int
    calls: int
    inputs: tuple[Tensor | PromptEmbeds, ...] = ()


def measure(options: BenchOptions) -> dict[str, Any]:
    """Measure every model on CUDA, cached by device. Return {} without CUDA."""
    if not torch.cuda.is_available():
        return {}
    device = torch.cuda.get_device_name()
    configs = {name: load(recipe) for name, recipe in RECIPES.items()}
    models = {
        name: options.cached(
            f"{NAME} {name}",
            0,
            partial(_real_size, name, config),
            key=[device, to_dict(config), REPEATS],
        )
        for name, config in configs.items()
    }
    return {NAME: models}


def _real_size(name: str, config: RunConfig) -> dict[str, Any]:
    """Measure one model on CUDA. Return no figures if its float32 weights do not fit."""
    figures: dict[str, Any] = {"eager": None}
    with suppress(torch.OutOfMemoryError):
        figures = by_phase(published(name, device="cuda"), config)
    # Hooks keep the model in a reference cycle, and the next model is larger.
    gc.collect()
    torch.cuda.empty_cache()
    return figures


def published(name: str, *, device: str = "meta", **changes: Any) -> TextToImageModel:
    """Build a model of published size with random weights and without text encoders.

    On the meta device there are no weights. `changes` override settings of the denoiser's configuration.
    """
    parts: dict[str, Any] = {"transformer": denoiser(name, device=device, **changes).eval()}
    parts["vae"] = kl_autoencoder()[0].eval()
    if device != "meta":
        parts["vae"].to_empty(device=device)
        for weight in parts["vae"].parameters():
            torch.nn.init.normal_(weight, std=0.02)
    clip = build_clip_tokenizer()
    clip.model_max_length = CLIP_TOKENS
    if name.startswith("flux"):
        kind, encoders, shift = FluxPipeline, 2, {"use_dynamic_shifting": True}
    else:
        kind, encoders, shift = StableDiffusion3Pipeline, 3, {}
        parts["tokenizer_2"] = clip
    for i in range(encoders):
        parts[f"text_encoder_{i + 1}" if i else "text_encoder"] = None
    # T5's tokenizer is missing, so the model uses its default prompt length.
    parts[f"tokenizer_{encoders}"] = None
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, **shift)
    pipeline = kind(tokenizer=clip, scheduler=scheduler, **parts)
    return wrap_pipeline(pipeline, default_size=(1024, 1024))


def by_phase(
    model: TextToImageModel, config: RunConfig, *, repeats: int = REPEATS
) -> dict[str, Any]:
    """Measure seconds and bytes of every phase, eager and, if possible, with compiled blocks.

    The recipe's adapter is attached and trained. From `config.model` only gradient checkpointing is used.
    """
    trainer = make_trainer(model, config)
    parts = phases(trainer)
    figures = {"eager": _measured(trainer, parts, repeats=repeats)}
    if compile_blocks(model.denoiser, trainer.full_batches()):
        figures["compiled"] = _measured(trainer, parts, repeats=repeats)
    return {"images": config.rollout.images_per_update, **figures}


def make_trainer(model: TextToImageModel, config: RunConfig) -> OnlineTrainer:
    """Return the recipe's trainer around a loaded model. It reads no prompts and writes no files."""
    for part in (model.denoiser, model.pipeline.vae):
        part.requires_grad_(False)
    if config.model.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    return OnlineTrainer(
        config,
        model,
        processes.make_accelerator(),
        RunFolder(config.output_dir),
        no_reward,
        [Prompt(str(i)) for i in range(config.rollout.prompts_per_update)],
    )


def phases(trainer: OnlineTrainer) -> dict[str, Phase]:
    """Return the phases of one process's update, in an order in which they can run."""
    c, update = trainer.config, trainer.policy_update
    assert isinstance(update, ForwardProcessUpdate)
    images, micro = c.rollout.images_per_update, c.training.micro_batch_size
    batches = math.ceil(images / micro)
    phases_by_name = _rollout_phases(trainer, calls=math.ceil(images / c.rollout.micro_batch_size))
    latents, _, embeds = trainer.model.random_inputs(micro, trainer.size)
    batch = TrainingBatch(
        latents=latents,
        embeds=embeds,
        prompt_index=torch.arange(micro),
        advantages=torch.linspace(-1, 1, micro),
        image=list(range(micro)),
        total=images,
        trained=images,
    )
    # The distances are phases of their own, so the policy phase is an update without them.
    config = replace(update.config, kl_beta=0.0, ema_kl_beta=0.0)
    alone = ForwardProcessUpdate(trainer.model, config, update.settings, update.algorithm)

    def policy() -> None:
        sums = Sums(alone.metrics, latents.device)
        loss = alone.micro_batch(batch, range(micro), sums, update=1, inner=0)
        with attention(latents.device):
            loss.backward()

    inner = c.training.updates_per_rollout
    rows = micro * update.config.timesteps_per_image
    phases_by_name["policy"] = Phase(policy, rows, batches * inner, (latents, embeds))
    for _, weight, other in update.distances:
        # An off-policy loss computes the lagged policy's prediction in any case.
        is_computed = other == lora.LAGGED and update.off_policy
        if weight and not is_computed:
            phases_by_name[other] = _distance(trainer, other, calls=batches * inner)
    phases_by_name["optimizer"] = Phase(lambda: trainer.step(1, index=0), 0, inner)
    return phases_by_name


def _rollout_phases(trainer: OnlineTrainer, *, calls: int) -> dict[str, Phase]:
    """Return the phases of one rollout micro-batch: all denoising steps, then decoding."""
    c, model = trainer.config, trainer.model
    settings = c.rollout
    rows = min(settings.micro_batch_size, settings.images_per_update)
    noise, _, embeds = model.random_inputs(rows, trainer.size)
    sampler = trainer.rollouts.sampler

    def rollout() -> Tensor:
        policy = trainer.policy_update.rollout_policy
        with trainer.drawing(policy), sampler.computing():
            negative_embeds = embeds if sampler.guided else None
            batch = Sampling(model, embeds, sampler.drawing, negative_embeds)
            return batch.draw(latents=noise)

    def decode() -> Any:
        with sampler.computing():
            return model.decode_checked(noise)

    return {
        "rollout": Phase(rollout, rows, calls, (noise, embeds)),
        "decode": Phase(decode, rows, calls, (noise,)),
    }


def _distance(trainer: OnlineTrainer, policy: str, *, calls: int) -> Phase:
    """Return the phase of another policy's forward at the distance timesteps of a micro-batch."""
    update, model = trainer.policy_update, trainer.model
    assert isinstance(update, ForwardProcessUpdate)
    rows = trainer.config.training.micro_batch_size * update.config.kl_timesteps
    noisy, times, embeds = model.random_inputs(rows, trainer.size)
    guidance = update.reference_guidance_scale if policy == lora.REFERENCE else None

    def forward() -> Tensor:
        with torch.no_grad(), lora.policy(model.denoiser, policy):
            return update.predict(noisy, times, embeds, guidance)

    return Phase(forward, model.forward_rows(rows, guidance), calls, (noisy, embeds))


def _measured(trainer: OnlineTrainer, parts: dict[str, Phase], *, repeats: int) -> dict[str, Any]:
    """Time all phases and sum them to one update. The sum is None if a phase ran out of memory."""
    rows = {name: _timed(trainer, part, repeats=repeats) for name, part in parts.items()}
    update = None
    if all(row["seconds"] is not None for row in rows.values()):
        update = round(sum(row["calls"] * row["seconds"]["median"] for row in rows.values()), 3)
    return {"update_seconds": update, "phases": rows}


def _timed(trainer: OnlineTrainer, part: Phase, *, repeats: int) -> dict[str, Any]:
    """Time a phase after warm-up calls, then count its bytes. Return no figures if memory runs out."""
    row: dict[str, Any] = {"rows": part.rows, "calls": part.calls, "seconds": None}
    try:
        seconds = interleaved([part.call], trainer.model.device, repeats=repeats)[0]
        return {**row, "seconds": spread(seconds), **_bytes(trainer, part)}
    except torch.OutOfMemoryError:
        return row


def _bytes(trainer: OnlineTrainer, part: Phase) -> dict[str, int]:
    """Return the memory that a phase adds at its peak (`added_bytes`).

    On CUDA, return also `peak_bytes`: the peak with weights, adapters, gradients, optimizer moments and all inputs.
    """
    if trainer.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        part.call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return {"peak_bytes": peak, "added_bytes": peak - before}
    allocated = [trainer.model.denoiser, trainer.model.pipeline.vae]
    allocated += [p.grad for p in trainer.parameters if p.grad is not None]
    allocated += tensors_of(list(s.values()) for s in trainer.optimizer.state.values())
    allocated += tensors_of(
        list(vars(i).values()) if isinstance(i, PromptEmbeds) else i for i in part.inputs
    )
    return {"added_bytes": peak_bytes(part.call, allocated, backward=True)}
