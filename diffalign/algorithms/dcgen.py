"""Flow matching in a new latent space for a model whose guidance scale is an input (DC-Gen; Chen et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.diffusion.paths import expand


def guided(model_pred: Tensor, null_pred: Tensor, guidance_scale: Tensor) -> Tensor:
    """The conditional velocity that a guided prediction implies: (v(c, w) - (1 - w) v(empty, 1)) / w.

    Args:
        model_pred: (B, ...) for the prompts at `guidance_scale` (B,).
        null_pred: (B, ...) for the empty prompt at scale 1; no gradient passes through it.
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
    """(B,) mean squared error of the conditional velocity, and metrics (B,).

    At the optimum v(c, w) = v(empty, 1) + w (E[target | c] - v(empty, 1)): real guidance is imprinted again, so that
    the frozen guidance embedding keeps its meaning. Without `guidance_scale` it is plain flow matching.

    Args:
        target: (B, ...) noise - latents.
        null_pred, guidance_scale: of `guided`.
    """
    found = model_pred.float()
    if guidance_scale is not None:
        assert null_pred is not None
        found = guided(found, null_pred.float(), guidance_scale)
    error = (found - target.float()).square().flatten(1).mean(1)
    with torch.no_grad():
        power = target.float().square().flatten(1).mean(1)
    return error, {"loss": error.detach(), "relative_error": error.detach() / power}
