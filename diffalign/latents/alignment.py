"""Where a denoiser's first and last layers should stand in another latent space: least squares, in closed form.

Patch embedders map latents to tokens linearly, pooling and interpolation commute with maps of channels, so every
objective of DC-Gen's embedding alignment (average, downsample, upsample in any mode) is an ordinary least-squares
problem: one pass over the data gives the optimum that gradient descent approaches. With the embedder in place the
last layer is linear in the features before it, so that it is a second one.
(DC-Gen: Chen et al. 2025, arXiv 2509.25180.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.core.errors import UsageError

OBJECTIVES = ("downsample", "upsample", "average")
"""The new tokens against the mean of the old ones they replace; the new ones interpolated against each old one; the
means over an image."""
MODES = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class LinearFit:
    """y = weight x + bias: `weight` (D, d) and `bias` (D,) float32; `r2` is the share of the variance of y that is
    explained, `error` the mean square that is left of a number of y."""

    weight: Tensor
    bias: Tensor
    r2: float
    error: float


class Statistics:
    """Sums over rows (x, y) that least squares needs, in float64: they add up over batches, shards and processes.

    Args:
        inputs: d, numbers of x.
        outputs: D, numbers of y.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self.xx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.xy = torch.zeros(inputs + 1, outputs, dtype=torch.float64)
        self.yy = torch.zeros(outputs, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Rows so far."""
        return int(self.xx[-1, -1])

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x (N, d) and y (N, D)."""
        x = torch.cat([x.double(), x.new_ones(len(x), 1, dtype=torch.float64)], dim=1)
        y = y.double()
        self.xx += (x.T @ x).cpu()
        self.xy += (x.T @ y).cpu()
        self.yy += y.square().sum(0).cpu()

    def merge(self, other: Statistics) -> None:
        """Add the rows of another."""
        self.xx += other.xx
        self.xy += other.xy
        self.yy += other.yy

    def covariance(self) -> Tensor:
        """(d, d) of x."""
        mean = self.xx[:-1, -1] / self.xx[-1, -1]
        return self.xx[:-1, :-1] / self.xx[-1, -1] - torch.outer(mean, mean)

    def tensors(self) -> tuple[Tensor, ...]:
        """What to sum over processes, in place."""
        return self.xx, self.xy, self.yy

    def solve(self, *, ridge: float = 0.0) -> LinearFit:
        """The least-squares map, with `ridge` added to the diagonal of the covariance of x.

        A ridge of E s^2 / E (1 - s)^2 over the noise levels s of a flow makes the map the best for x with that noise
        on it. Directions in which x does not vary are left at 0.

        Raises:
            UsageError: there is no row.
        """
        if not self.count:
            raise UsageError("there is nothing to align with: no image was read")
        n = self.xx[-1, -1]
        mean_x, mean_y = self.xx[:-1, -1] / n, self.xy[-1] / n
        cov_x = self.covariance()
        cov_xy = self.xy[:-1] / n - torch.outer(mean_x, mean_y)
        total = (self.yy / n - mean_y.square()).sum()
        loaded = cov_x + ridge * torch.eye(len(cov_x), dtype=torch.float64)
        weight = torch.linalg.lstsq(loaded, cov_xy, driver="gelsd").solution.T
        left = total - 2 * (weight * cov_xy.T).sum() + ((weight @ cov_x) * weight).sum()
        bias = mean_y - weight @ mean_x
        r2 = float(1 - left / total) if total > 0 else 1.0
        return LinearFit(weight.float(), bias.float(), r2, float(left / len(mean_y)))


def noise_ridge(sigmas: Tensor) -> float:
    """E s^2 / E (1 - s)^2 over noise levels (N,) of a flow."""
    return float(sigmas.square().mean() / (1 - sigmas).square().mean())


def ratio(old: tuple[int, int], new: tuple[int, int]) -> int:
    """How many old tokens a new one replaces along a side, for grids (rows, columns).

    Raises:
        UsageError: not a whole number, or not the same along both sides.
    """
    k = old[0] // new[0] if new[0] else 0
    if k < 1 or (new[0] * k, new[1] * k) != tuple(old):
        raise UsageError(
            f"a grid of {old[0]}x{old[1]} tokens cannot be replaced by one of {new[0]}x{new[1]}: there must be a whole "
            "number of old tokens for each new one, the same along both sides"
        )
    return k


def aligned_rows(
    old: Tensor, new: Tensor, *, objective: str = "downsample", mode: str = "bilinear"
) -> tuple[Tensor, Tensor]:
    """Rows x of the new space and y of the old embedder for `Statistics`.

    Args:
        old: the frozen embedder's tokens (B, D, h k, w k).
        new: patches of the new latents (B, d, h, w), or these interpolated: it makes no difference.
        objective: one of `OBJECTIVES`; `mode` is that of "upsample".
    """
    k = ratio(tuple(old.shape[2:]), tuple(new.shape[2:]))  # type: ignore[arg-type]
    if objective == "average":
        return new.flatten(2).mean(2), old.flatten(2).mean(2)
    if objective == "upsample":
        new = interpolated(new, k, mode)
    elif objective == "downsample":
        old = F.avg_pool2d(old, k) if k > 1 else old
    else:
        raise ValueError(f"unknown objective {objective!r}")
    return _rows(new), _rows(old)


def interpolated(grid: Tensor, k: int, mode: str) -> Tensor:
    """(B, C, h, w) to (B, C, h k, w k)."""
    options: dict[str, Any] = {} if mode == "nearest" else {"align_corners": False}
    return F.interpolate(grid, scale_factor=float(k), mode=mode, **options)


def _rows(grid: Tensor) -> Tensor:
    return grid.movedim(1, -1).flatten(0, -2)


class GradientAlignment:
    """The released form, for comparison: AdamW (betas 0.9, 0.95) on a Xavier-initialised layer.

    Args:
        inputs, outputs: as of `Statistics`.
    """

    def __init__(
        self, inputs: int, outputs: int, *, learning_rate: float = 1e-4, seed: int = 0
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = nn.Linear(inputs, outputs)
            nn.init.xavier_uniform_(self.layer.weight)
            nn.init.zeros_(self.layer.bias)
        self.optimizer = torch.optim.AdamW(
            self.layer.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def step(self, x: Tensor, y: Tensor) -> float:
        """One step on rows x (N, d) and y (N, D); the loss before it."""
        loss = F.mse_loss(self.layer(x.float()), y.float())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def error(self, x: Tensor, y: Tensor) -> float:
        """Mean square that is left of rows."""
        return F.mse_loss(self.layer(x.float()), y.float()).item()


@dataclass(frozen=True)
class Moments:
    """How much of the variance of embedded tokens is image, and how much noise: traces of covariances. Unit noise in
    the latents is weight weight^T in the tokens, for an embedder's matrix."""

    image: float
    noise: float


def signal_shift(old: Moments, new: Moments) -> float:
    """r such that new tokens at the noise level r s / (1 + (r - 1) s) carry as much noise for their signal as the old
    ones at s: the root of the ratio of their image-to-noise ratios."""
    return ((new.image / new.noise) / (old.image / old.noise)) ** 0.5
