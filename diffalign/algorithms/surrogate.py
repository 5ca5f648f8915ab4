"""PPO's clipped surrogate, which AWM and Flow-GRPO share. (Schulman et al. 2017, eq. 7)"""

from __future__ import annotations

from torch import Tensor

METRICS = ("ratio", "clipped")


def clipped_surrogate(
    log_ratios: Tensor, advantages: Tensor, *, clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) loss max(-A rho, -A clip(rho, 1 - c, 1 + c)) and the metrics `ratio` and `clipped`, each (B,)."""
    ratio = log_ratios.exp()
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = (-advantages * ratio).maximum(-advantages * bounded)
    clipped = (ratio.detach() != bounded.detach()).float()
    return loss, {"ratio": ratio.detach(), "clipped": clipped}
