"""Flow matching in a new latent space with guidance as input (DC-Gen, Chen 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.diffusion.paths import expand


def guided(model_pred: Tensor, null_pred: Tensor, guidance_scale: Tensor) -> Tensor:
    """Return the conditional velocity that a guided prediction implies.

    It is (v(c, w) - (1 - w) v(empty, 1)) / w.

    Args:
        model_pred: predictions (B, ...) for the prompts at `guidance_scale`.
        null_pred: predictions (B, ...) for the empty prompt at scale 1; no gradient passes through them.
        guidance_scale: guidance scales w (B,).
    """
    w = expand(guidance_scale, model_pred)
    return (model_pred - (1 - w) * null_pred.detach()) / w


def dcgen_loss(
    model_pred: Tensor,
    target: Tensor,
    *,
    null_pred: Tensor | None = None,
    guidance_scale: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean squared error (B,) of the conditional velocity, and metrics (B,).

    At the optimum v(c, w) = v(empty, 1) + w (E[target | c] - v(empty, 1)): the model learns real guidance again, so
    that the frozen guidance embedding keeps its meaning. Without `guidance_scale` it is plain flow matching.

    Args:
        model_pred: predictions (B, ...).
        target: noise - latents (B, ...).
        null_pred: as in `guided`; required with `guidance_scale`.
        guidance_scale: as in `guided`.
    """
    velocity = model_pred.float()
    if guidance_scale is not None:
        assert null_pred is not None
        velocity = guided(velocity, null_pred.float(), guidance_scale)
    error = (velocity - target.float()).square().flatten(1).mean(1)
    with torch.no_grad():
        power = target.float().square().flatten(1).mean(1)
    return error, {"loss": error.detach(), "relative_error": error.detach() / power}
