"""Train a diffusers autoencoder in one of the three phases of DC-AE.

1. `reconstruct`: all weights, at a low resolution.
2. `latent`: only the layers around the latents, at the resolution of use. These layers generalise badly across
   resolutions.
3. `refine`: the decoder's last layers against a discriminator, at a low resolution.

Source: Chen et al. 2024, "Deep Compression Autoencoder", arXiv 2410.10733, section 3.3. The reconstruction loss needs
no perceptual network, so nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from torch import Tensor, nn

from diffalign.config.checks import check, one_of
from diffalign.core import console
from diffalign.core.errors import UserError
from diffalign.core.interruption import Interrupted, Interruption
from diffalign.core.seeds import IMAGES, stream
from diffalign.latents.codec import encoded
from diffalign.training import checkpoint, optimizers

Autoencoder = Any
"""AutoencoderDC or AutoencoderKL."""
Images = Callable[[int, int], Tensor]
"""Source of training images: a function (update, batch size) -> (B, 3, H, W) uint8.

It is a pure function of its arguments, so that a resumed run sees the same images.
"""

PHASES: dict[str, tuple[str, ...]] = {
    "reconstruct": ("",),
    "latent": ("encoder.conv_out", "decoder.conv_in", "quant_conv", "post_quant_conv"),
    "refine": ("decoder.norm_out", "decoder.conv_norm_out", "decoder.conv_out"),
}
"""Name prefixes of the parameters that each phase trains."""
OLD_STATE = "state.pt"
"""Checkpoint file of earlier versions, a pickle that this version refuses to load."""


class AutoencoderError(UserError, RuntimeError):
    """Training of an autoencoder that cannot start or continue."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """Settings of one training phase of an autoencoder.

    The learning rate warms up over 5 % of the updates and then falls along a cosine to 0. The setting
    `adversarial_weight` acts in the phase "refine" only.
    """

    phase: str = "reconstruct"
    num_updates: int = 2000
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    squared_weight: float = 1.0
    difference_weight: float = 0.5
    kl_weight: float = 1e-6
    adversarial_weight: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0
    mixed_precision: str = "bf16"
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        one_of(self.phase, list(PHASES), "phase")
        for name in ("num_updates", "batch_size", "learning_rate", "checkpoint_every"):
            check(0 < getattr(self, name) < math.inf, f"--{name}", "must be positive and finite")


def reconstruction_loss(pixels: Tensor, target: Tensor, config: AutoencoderConfig) -> Tensor:
    """Return the reconstruction loss, a scalar.

    It sums the mean absolute error, the weighted mean squared error, and the weighted mean absolute value of the
    error's finite differences along height and width.

    Args:
        pixels: reconstructions (B, 3, H, W) in -1..1.
        target: original images (B, 3, H, W) in -1..1.
    """
    error = pixels.float() - target.float()
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return (
        error.abs().mean()
        + config.squared_weight * error.square().mean()
        + config.difference_weight * (across + down)
    )


class PatchDiscriminator(nn.Sequential):
    """Patch discriminator that returns real-or-fake logits on a grid eight times coarser.

    Source: Isola et al. 2017, arXiv 1611.07004.
    """

    def __init__(self, width: int = 32) -> None:
        def layer(c: int, d: int) -> list[nn.Module]:
            return [nn.Conv2d(c, d, 4, 2, 1), nn.GroupNorm(1, d), nn.LeakyReLU(0.2)]

        super().__init__(
            *layer(3, width)[::2],
            *layer(width, 2 * width),
            *layer(2 * width, 4 * width),
            nn.Conv2d(4 * width, 1, 3, 1, 1),
        )


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return a discriminator's hinge loss, given its logits of real and fake images."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


class AutoencoderTrainer:
    """Trainer of one phase of one autoencoder.

    Args:
        vae: trained in place, in float32.
        images: source of training images, see `Images`.
        folder: holds the checkpoints; the same call resumes from the newest one.
        key: further values that identify the run; a checkpoint with another key is refused.

    Raises:
        AutoencoderError: the phase has nothing to train in this autoencoder.
    """

    def __init__(
        self,
        vae: Autoencoder,
        images: Images,
        config: AutoencoderConfig,
        *,
        folder: Path,
        key: Mapping[str, Any] | None = None,
    ) -> None:
        self.vae = vae.float().train().requires_grad_(False)
        self.vae.to(memory_format=torch.channels_last)
        self.images, self.config, self.folder = images, config, folder
        self.key = {**asdict(config), **(key or {})}
        prefixes = PHASES[config.phase]
        self.parameters = [p for n, p in vae.named_parameters() if n.startswith(prefixes)]
        if not self.parameters:
            raise AutoencoderError(
                f"phase: {config.phase}: {type(vae).__name__} has none of {prefixes}"
            )
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        for module in vae.modules():
            if isinstance(module, nn.GroupNorm) and module.weight.requires_grad:
                module.register_forward_pre_hook(_with_gradient)
        self.optimizers = {"autoencoder": self._optimizer(self.parameters, config.learning_rate)}
        self.adversary: PatchDiscriminator | None = None
        if config.phase == "refine" and config.adversarial_weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.adversary = PatchDiscriminator().to(vae.device)
            rate = 2 * config.learning_rate
            self.optimizers["adversary"] = self._optimizer(list(self.adversary.parameters()), rate)
        self.update, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []

    def _optimizer(self, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        decay = self.config.weight_decay
        group = {"params": parameters, "initial_lr": rate}
        return torch.optim.AdamW([group], lr=rate, betas=(0.9, 0.99), weight_decay=decay)

    def run(self) -> Autoencoder:
        """Resume from the newest checkpoint, train to the end and return the autoencoder.

        Raises:
            AutoencoderError: the loss, a gradient or the weights are not finite, or the folder belongs to another run.
            Interrupted: a signal arrived, and the checkpoint was written.
        """
        self.resume()
        bar = console.progress(
            self.config.phase, self.config.num_updates, unit="update", initial=self.update
        )
        with bar, Interruption("the update in hand is finished and saved") as interruption:
            while self.update < self.config.num_updates:
                started = time.perf_counter()
                last = self.step()
                self.seconds += time.perf_counter() - started
                bar.set_postfix({k: f"{v:.4f}" for k, v in last.items()}, refresh=False)
                bar.update()
                if self.update % self.config.checkpoint_every == 0 or interruption.number:
                    self.history.append({"update": self.update, "seconds": self.seconds, **last})
                    self.save()
                if interruption.number:
                    raise Interrupted(
                        interruption.number,
                        f"update {self.update} is saved in {self.folder}; the same command goes on from there",
                    )
        return self.vae.eval()

    def step(self) -> dict[str, float]:
        """Run one update and return its metrics."""
        pixels, decoded, loss = self._reconstruct()
        metrics = {"loss": loss.item()}
        if self.adversary is not None:
            self.adversary.requires_grad_(False)
            with self._autocast():
                loss = loss - self.config.adversarial_weight * self.adversary(decoded).mean()
        self._apply("autoencoder", loss, self.parameters)
        if self.adversary is not None:
            self.adversary.requires_grad_(True)
            with self._autocast():
                logits = self.adversary(torch.cat([pixels, decoded.detach().to(pixels.dtype)]))
            adversary_loss = hinge_loss(*logits.float().chunk(2))
            self._apply("adversary", adversary_loss, list(self.adversary.parameters()))
            metrics["adversary"] = adversary_loss.item()
        self.update += 1
        return metrics

    def _reconstruct(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the images of the next update, their reconstructions and the loss."""
        images = self.images(self.update, self.config.batch_size).to(self.vae.device)
        pixels = to_signed(images).contiguous(memory_format=torch.channels_last)
        with self._seeded(), self._autocast():
            latents, penalty = encoded(self.vae, pixels, sample=True)
            decoded = self.vae.decode(latents).sample
        loss = reconstruction_loss(decoded, pixels, self.config) + self.config.kl_weight * penalty
        return pixels, decoded, loss

    def _apply(self, name: str, loss: Tensor, parameters: list[nn.Parameter]) -> None:
        optimizer = self.optimizers[name]
        if not torch.isfinite(loss):
            raise self._ruined(f"the loss of update {self.update + 1} is not finite")
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        if not torch.isfinite(norm):
            raise self._ruined(
                f"the gradient of update {self.update + 1} is not finite and was not applied"
            )
        factor = rate_factor(self.update, self.config.num_updates)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad()

    def _ruined(self, problem: str) -> AutoencoderError:
        good = checkpoint.latest(self.folder)
        return AutoencoderError(
            f"{problem}; the last checkpoint is {good or 'none'}. The same command would meet it again: start"
            f"{' in another output_dir' if good else ''} with a lower learning_rate"
        )

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Seed torch's random numbers with the run's seed and the number of the update."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(IMAGES, self.config.seed, self.update))
            yield

    def _autocast(self) -> torch.autocast:
        kind = self.vae.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.config.mixed_precision == "bf16")

    def save(self) -> None:
        """Write a checkpoint atomically.

        Raises:
            AutoencoderError: the weights give a loss that is not finite; nothing is written.
            CheckpointError: the checkpoint cannot be written.
        """
        with torch.no_grad():
            loss = self._reconstruct()[-1]
        if not torch.isfinite(loss):
            raise self._ruined(f"update {self.update} has ruined the weights and was not saved")
        tensors = {"autoencoder": dict(self.vae.state_dict())}
        if self.adversary is not None:
            tensors["adversary"] = dict(self.adversary.state_dict())
        for name, optimizer in self.optimizers.items():
            tensors[f"{name}_optimizer"] = optimizers.state_tensors(optimizer)
        state = {"key": self.key, "seconds": self.seconds, "history": self.history}
        checkpoint.save(self.folder, self.update, tensors, state, keep=2)

    def resume(self) -> None:
        """Restore the newest intact checkpoint of the folder, if there is one.

        Raises:
            AutoencoderError: the checkpoint belongs to another run, or was pickled by an earlier version.
            CheckpointError: the folder has checkpoints, and all are damaged.
        """
        path = checkpoint.load_newest(self.folder)
        if path is None:
            if (self.folder / OLD_STATE).is_file():
                raise AutoencoderError(
                    f"{self.folder / OLD_STATE} is of an older version, which alone can go on with it; delete it to "
                    "start again"
                )
            return
        update, tensors, state = checkpoint.load(path)
        if state["key"] != json.loads(json.dumps(self.key)):
            raise AutoencoderError(
                f"{path} is of a run with other settings; use them, another output_dir, or delete {self.folder}"
            )
        self.vae.load_state_dict(tensors["autoencoder"])
        if self.adversary is not None:
            self.adversary.load_state_dict(tensors["adversary"])
        for name, optimizer in self.optimizers.items():
            optimizers.restore(optimizer, tensors[f"{name}_optimizer"])
        self.update, self.seconds, self.history = update, state["seconds"], state["history"]


def _with_gradient(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Make the input of a group norm require a gradient; a forward pre-hook."""
    # torch 2.13 crashes on CPUs in a group norm's backward if its channels-last input needs no gradient
    first = args[0]
    if torch.is_grad_enabled() and not first.requires_grad:
        first = first.detach().requires_grad_()
    return (first, *args[1:])


def rate_factor(update: int, total: int) -> float:
    """Return the factor of the learning rate: linear warm-up over 5 %, then a cosine to 0."""
    warmup = max(1, total // 20)
    if update < warmup:
        return (update + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(1, total - warmup)))


def to_signed(images: Tensor) -> Tensor:
    """Convert images (B, 3, H, W) from uint8 to float32 in -1..1."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def set_scale(vae: Autoencoder, images: Tensor) -> None:
    """Write the scale of the latents into the autoencoder's configuration.

    For an AutoencoderDC the scale gives latents a mean square of 1. For an AutoencoderKL scale and shift give them
    mean 0 and variance 1.

    Args:
        images: (B, 3, H, W) uint8, encoded to measure the latents.
    """
    latents, _ = encoded(vae, to_signed(images.to(vae.device)))
    if isinstance(vae, AutoencoderDC):
        vae.register_to_config(scaling_factor=round(1 / latents.square().mean().sqrt().item(), 4))
        return
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4),
        shift_factor=round(latents.mean().item(), 4),
    )
