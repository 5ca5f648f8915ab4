"""PPO's clipped surrogate, which AWM and Flow-GRPO share (Schulman et al. 2017, eq. 7)."""

from __future__ import annotations

from torch import Tensor

METRICS = ("ratio", "clipped")


def clipped_surrogate(
    log_ratios: Tensor, advantages: Tensor, *, clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the clipped loss (B,) and its metrics.

    The loss is max(-A rho, -A clip(rho, 1 - c, 1 + c)). The metrics `ratio` and `clipped` are (B,).
    """
    ratio = log_ratios.exp()
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = (-advantages * ratio).maximum(-advantages * bounded)
    clipped = (ratio.detach() != bounded.detach()).float()
    return loss, {"ratio": ratio.detach(), "clipped": clipped}
