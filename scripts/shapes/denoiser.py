"""Pretrains a Shapes denoiser from nothing: flow matching on rendered images, through the same `TextToImageModel` that
the algorithms use. Resumable; Muon for matrices and AdamW for the rest, because a laptop has no hours to waste.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.core.precision import compute
from diffalign.diffusion.paths import Path as NoisePath
from diffalign.diffusion.paths import VariancePreserving, training_timesteps
from diffalign.pipelines.base import TextToImageModel
from diffalign.scripts.shapes.evaluation import NO_GUIDANCE, NULL_PROMPT, evaluate_shapes
from diffalign.scripts.shapes.semantics import (
    SemanticHead,
    image_tokens,
    middle_block,
    semantic_loss,
    semantic_map,
    tokens_per_side,
)
from diffalign.shapes.prompts import prompts, sample_prompts
from diffalign.shapes.text import WIDTH
from diffalign.shapes.world import render, sample_scene
from diffalign.types import PromptEmbeds

EMBEDS = ("embeds", "long_embeds")
MAX_WEIGHT = 25.0
LONG_PADDING = 256
LONG_SHARE = 0.03
"""Share of batches with T5 tokens padded to LONG_PADDING. A stock call then draws well, too."""
LONG_DIVISOR = 4
"""Divisor of the images in a batch with long padding, whose attention is expensive."""
TASK_WEIGHTS = {
    "single_object": 1,
    "two_object": 2,
    "counting": 3,
    "colors": 1,
    "position": 4,
    "color_attr": 4,
}
"""Relative number of training images per task: relations and bindings are what is hardest to learn."""


def build_sd3_transformer() -> SD3Transformer2DModel:
    """SD3.5's layout (RMS norm of queries and keys): 64 image tokens, 16 CLIP and 16 T5 tokens."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def build_flux_transformer() -> FluxTransformer2DModel:
    """FLUX.1-dev's layout: 64 packed tokens of 16 values, rotary positions, guidance embedding."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def build_sd_unet() -> UNet2DConditionModel:
    """SD1.5's kind of U-Net with two resolutions: 16 x 16 latents, and 8 x 8, where attention is affordable."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # heads: what diffusers' U-Nets mean by it
    )


@dataclass
class PretrainConfig:
    """Settings of the pretraining of a denoiser."""

    steps: int = 6000
    batch_size: int = 64
    images: int = 96000
    lr: float = 2e-3
    """Peak learning rate of AdamW; Muon's is ten times as high."""
    warmup: int = 200
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    prompt_dropout: float = 0.1
    alignment: float = 0.1
    """Weight of the semantic map's cross-entropy beside the squared error; 0 leaves it out."""
    sigma_mean: float = 0.4
    """Mean of the logit-normal noise levels of a flow. Above 0 there is more noise."""
    seed: int = 0
    eval_every: int = 1000
    save_every: int = 250
    compile: bool = True
    stop_after_seconds: float | None = None
    """Anneal and finish early when this much time has passed."""


@dataclass
class Captioned:
    """Latents of images, with their prompts and semantic maps.

    `latents`: (N, C, H, W) bf16. `rows`: (N,) rows of their prompts in `embeds`; row 0 is the null prompt.

    `long_embeds`: the same prompts padded as a pipeline pads them when it is not told otherwise.
    `maps`: (N, 2, tokens) uint8, the semantic map of each image.
    """

    latents: Tensor
    rows: Tensor
    embeds: PromptEmbeds
    long_embeds: PromptEmbeds
    maps: Tensor

    def save(self, file: Path) -> None:
        """Write all tensors to a safetensors file, aside first."""
        tensors = {"latents": self.latents, "rows": self.rows, "maps": self.maps}
        for name in EMBEDS:
            embeds = getattr(self, name)
            tensors[f"{name}.prompt_embeds"] = embeds.prompt_embeds
            if embeds.pooled_prompt_embeds is not None:
                tensors[f"{name}.pooled_prompt_embeds"] = embeds.pooled_prompt_embeds
        aside = file.with_suffix(".tmp")
        save_file({key: value.contiguous() for key, value in tensors.items()}, aside)
        aside.rename(file)

    @classmethod
    def load(cls, file: Path) -> Captioned:
        """Read what `save` wrote."""
        tensors = load_file(file)
        embeds = {
            name: PromptEmbeds(
                tensors[f"{name}.prompt_embeds"], tensors.get(f"{name}.pooled_prompt_embeds")
            )
            for name in EMBEDS
        }
        return cls(tensors["latents"], tensors["rows"], maps=tensors["maps"], **embeds)

    @property
    def has_long(self) -> bool:
        """True if there are two lengths. CLIP alone has one."""
        return self.long_embeds.prompt_embeds.shape != self.embeds.prompt_embeds.shape

    def padded_like(self, embeds: PromptEmbeds) -> PromptEmbeds:
        """All prompts, with as many tokens as `embeds`."""
        length = self.embeds.prompt_embeds.shape[1]
        return self.embeds if embeds.prompt_embeds.shape[1] == length else self.long_embeds


def error_weight(path: NoisePath, timesteps: Tensor) -> Tensor:
    """(B,) what an error counts: 1, but for a model that predicts the noise as much as the same error of a velocity
    would, up to MAX_WEIGHT: what is shown is decided where hardly anything but noise is seen, and an error of the noise
    is small there."""
    if not isinstance(path, VariancePreserving) or path.prediction_type != "epsilon":
        return torch.ones_like(timesteps, dtype=torch.float32)
    return path.scales(timesteps)[0].square().reciprocal().clamp(max=MAX_WEIGHT)


@torch.no_grad()
def make_dataset(model: TextToImageModel, n: int, *, seed: int) -> Captioned:
    """Render `n` scenes for training prompts, by TASK_WEIGHTS, and encode them."""
    rng = np.random.default_rng(seed)
    side = tokens_per_side(model)
    texts = [NULL_PROMPT, *(entry["prompt"] for entry in prompts("train"))]
    row_of = {text: i for i, text in enumerate(texts)}
    rows, latents, maps = [], [], []
    for start in range(0, n, 256):
        entries = sample_prompts(rng, min(256, n - start), task_weights=TASK_WEIGHTS)
        scenes = [sample_scene(e, rng) for e in entries]
        images = np.stack([render(scene) for scene in scenes])
        maps.append(np.stack([semantic_map(scene, side=side).reshape(2, -1) for scene in scenes]))
        with compute(model.device):
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(model.device)
            latents.append(model.encode(pixels).bfloat16().cpu())
        rows += [row_of[e["prompt"]] for e in entries]
    embeds = model.encode_prompt(texts).to("cpu")
    short, model.max_sequence_length = model.max_sequence_length, LONG_PADDING
    long_embeds = model.encode_prompt(texts).to("cpu")
    model.max_sequence_length = short
    labels = torch.from_numpy(np.concatenate(maps))
    return Captioned(torch.cat(latents), torch.tensor(rows), embeds, long_embeds, labels)


def make_optimizers(
    model: nn.Module, config: PretrainConfig, *, head: nn.Module | None = None
) -> list[torch.optim.Optimizer]:
    """Return Muon on the matrices of the transformer blocks, and AdamW on everything else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = list(head.parameters()) if head is not None else []
    for name, parameter in model.named_parameters():
        inside = "blocks." in name and parameter.ndim == 2 and "norm" not in name
        (matrices if inside else rest).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=10 * config.lr, momentum=0.95, weight_decay=config.weight_decay
        ),
        torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay),
    ]


def lr_factor(step: int, config: PretrainConfig, progress: float) -> float:
    """Linear warm-up, flat, then linear to zero over the last 30 % of `progress` (0..1)."""
    return min(1.0, (step + 1) / config.warmup, max(0.0, (1 - progress) / 0.3))


@dataclass
class Pretraining:
    """State of a run: everything that a resumed run needs."""

    model: TextToImageModel
    config: PretrainConfig
    folder: Path
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    evaluated_guidance: ClassVar[float] = NO_GUIDANCE
    aligned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        torch.manual_seed(self.config.seed)
        self.device = self.model.device
        self.rng = torch.Generator().manual_seed(self.config.seed)
        self.denoiser = self.model.denoiser.train().float()
        self.head = self._semantic_head() if self.aligned and self.config.alignment else None
        if self.head is not None:
            self.head.to(self.device)
        self.optimizers = make_optimizers(self.denoiser, self.config, head=self.head)
        self.base_lr = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.ema = {k: v.detach().clone() for k, v in self.denoiser.state_dict().items()}
        self.forward = torch.compile(self._loss) if self.config.compile else self._loss

    def _semantic_head(self) -> SemanticHead:
        """Return a fresh head, and make the middle block leave its hidden states for it."""

        def keep(_block: nn.Module, _inputs: Any, output: Any) -> None:
            self.hidden = image_tokens(output)

        self.hook = middle_block(self.denoiser).register_forward_hook(keep)
        config = self.denoiser.config
        if isinstance(self.denoiser, UNet2DConditionModel):
            return SemanticHead(config.block_out_channels[-1])
        return SemanticHead(config.num_attention_heads * config.attention_head_dim)

    def _loss(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        embeds: PromptEmbeds,
        maps: Tensor,
    ) -> Tensor:
        noisy = self.model.noise.add_noise(latents, noise, timesteps)
        pred = self.model.predict(noisy, timesteps, embeds, guidance_scale=NO_GUIDANCE)
        errors = (pred.float() - self.model.noise.target(latents, noise, timesteps)).square()
        loss = (errors.flatten(1).mean(1) * error_weight(self.model.noise, timesteps)).mean()
        if self.head is None:
            return loss
        return loss + self.config.alignment * semantic_loss(self.head(self.hidden), maps)

    def progress(self) -> float:
        limit = self.config.stop_after_seconds
        done = self.step / self.config.steps
        return max(done, self.seconds / limit) if limit else done

    def batch(self, data: Captioned) -> tuple[Any, ...]:
        """Return the arguments of the loss. They are drawn on the CPU, whatever the device."""
        long = torch.rand((), generator=self.rng).item() < LONG_SHARE and data.has_long
        n = max(1, self.config.batch_size // (LONG_DIVISOR if long else 1))
        index = torch.randint(len(data.rows), (n,), generator=self.rng)
        latents = data.latents[index].float()
        rows = data.rows[index]
        rows[torch.rand(n, generator=self.rng) < self.config.prompt_dropout] = 0
        noise = torch.randn(latents.shape, generator=self.rng)
        mean = self.config.sigma_mean
        timesteps = training_timesteps(self.model.noise, n, mean=mean, generator=self.rng)
        embeds = (data.long_embeds if long else data.embeds)[rows]
        parts = (latents, noise, timesteps, embeds, data.maps[index])
        return tuple(part.to(self.device) for part in parts)

    def update(self, data: Captioned) -> float:
        factor = lr_factor(self.step, self.config, self.progress())
        for optimizer, lr in zip(self.optimizers, self.base_lr, strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        batch = self.batch(data)
        short = batch[3].prompt_embeds.shape[1] == data.embeds.prompt_embeds.shape[1]
        with compute(self.device):
            # long batches are too rare to be worth a compilation of their own
            loss = (self.forward if short else self._loss)(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            state = self.denoiser.state_dict()
            keys = [k for k, v in state.items() if v.is_floating_point()]
            torch._foreach_lerp_([self.ema[k] for k in keys], [state[k] for k in keys], 1 - decay)
        self.step += 1
        return loss.item()

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "denoiser": self.denoiser.state_dict(),
            "head": self.head.state_dict() if self.head is not None else None,
            "ema": self.ema,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "rng": self.rng.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
        }
        # plain tensors and numbers only: read back with weights_only
        torch.save(state, self.folder / "state.tmp")
        (self.folder / "state.tmp").rename(self.folder / "state.pt")

    def resume(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.denoiser.load_state_dict(state["denoiser"])
        if self.head is not None:
            self.head.load_state_dict(state["head"])
        self.ema = {key: value.to(self.device) for key, value in state["ema"].items()}
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.set_state(state["rng"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = state["history"]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Lend the denoiser its averaged weights, for evaluation and saving."""
        backup = {k: v.detach().clone() for k, v in self.denoiser.state_dict().items()}
        self.denoiser.load_state_dict(self.ema)
        try:
            yield
        finally:
            self.denoiser.load_state_dict(backup)

    def run(self, data: Captioned) -> None:
        losses = []
        while self.progress() < 1:
            start = time.perf_counter()
            losses.append(self.update(data))
            self.seconds += time.perf_counter() - start
            if self.step % self.config.save_every == 0:
                self.save()
            if self.step % self.config.eval_every == 0 or self.progress() >= 1:
                with self.averaged():
                    score = evaluate_shapes(
                        self.model, seed=1, guidance_scale=self.evaluated_guidance
                    )
                row = {"step": self.step, "loss": float(np.mean(losses)), "seconds": self.seconds}
                self.history.append({**row, **score})
                losses = []
                print({k: round(v, 3) for k, v in self.history[-1].items()}, flush=True)
                self.save()
        if self.head is not None:
            self.hook.remove()
        with self.averaged():
            self.denoiser.save_pretrained(self.folder / "transformer")
