"""Closed-form alignment of a denoiser's first and last layers with another latent space.

Patch embedders map latents to tokens linearly, and pooling and interpolation commute with channel maps. So every
objective of DC-Gen's embedding alignment (average, downsample, upsample in any mode) is an ordinary least-squares
problem: one pass over the data gives the optimum that gradient descent approaches. With the embedder fixed, the last
layer is linear in the features before it, which gives a second such problem. (DC-Gen: Chen et al. 2025, arXiv
2509.25180.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.core.errors import UsageError

OBJECTIVES = ("downsample", "upsample", "average")
"""Objectives of the embedding alignment.

The objective "downsample" fits new tokens to the mean of the old tokens that they replace, "upsample" fits
interpolated new tokens to each old token, and "average" fits means over an image.
"""
MODES = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class LinearFit:
    """Linear map y = weight x + bias with its quality of fit.

    Attributes:
        weight: (D, d) float32.
        bias: (D,) float32.
        r2: share of the variance of y that is explained.
        error: mean squared residual per number of y.
    """

    weight: Tensor
    bias: Tensor
    r2: float
    error: float


class Statistics:
    """Sums over rows (x, y) for least squares, in float64.

    The sums add up over batches, shards and processes.

    Args:
        inputs: numbers d per x.
        outputs: numbers D per y.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self.xx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.xy = torch.zeros(inputs + 1, outputs, dtype=torch.float64)
        self.yy = torch.zeros(outputs, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Number of rows so far."""
        return int(self.xx[-1, -1])

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x (N, d) and y (N, D)."""
        x = torch.cat([x.double(), x.new_ones(len(x), 1, dtype=torch.float64)], dim=1)
        y = y.double()
        self.xx += (x.T @ x).cpu()
        self.xy += (x.T @ y).cpu()
        self.yy += y.square().sum(0).cpu()

    def merge(self, other: Statistics) -> None:
        """Add the rows of other statistics."""
        self.xx += other.xx
        self.xy += other.xy
        self.yy += other.yy

    def covariance(self) -> Tensor:
        """Return the covariance (d, d) of x."""
        mean = self.xx[:-1, -1] / self.xx[-1, -1]
        return self.xx[:-1, :-1] / self.xx[-1, -1] - torch.outer(mean, mean)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the sums, which processes add up in place."""
        return self.xx, self.xy, self.yy

    def solve(self, *, ridge: float = 0.0) -> LinearFit:
        """Return the least-squares map, with `ridge` added to the diagonal of the covariance of x.

        A ridge of E s^2 / E (1 - s)^2 over the noise levels s of a flow makes the map optimal for x with that noise.
        Directions in which x does not vary get weight 0.

        Raises:
            UsageError: there is no row.
        """
        if not self.count:
            raise UsageError(
                "latents: no image was read to align with. Check the source of the images."
            )
        n = self.xx[-1, -1]
        mean_x, mean_y = self.xx[:-1, -1] / n, self.xy[-1] / n
        cov_x = self.covariance()
        cov_xy = self.xy[:-1] / n - torch.outer(mean_x, mean_y)
        total = (self.yy / n - mean_y.square()).sum()
        loaded = cov_x + ridge * torch.eye(len(cov_x), dtype=torch.float64)
        weight = torch.linalg.lstsq(loaded, cov_xy, driver="gelsd").solution.T
        residual = total - 2 * (weight * cov_xy.T).sum() + ((weight @ cov_x) * weight).sum()
        bias = mean_y - weight @ mean_x
        r2 = float(1 - residual / total) if total > 0 else 1.0
        return LinearFit(weight.float(), bias.float(), r2, float(residual / len(mean_y)))


def noise_ridge(sigmas: Tensor) -> float:
    """Return E s^2 / E (1 - s)^2 over noise levels (N,) of a flow."""
    return float(sigmas.square().mean() / (1 - sigmas).square().mean())


def ratio(old: tuple[int, int], new: tuple[int, int]) -> int:
    """Return how many old tokens per side one new token replaces, for grids (rows, columns).

    Raises:
        UsageError: the number is not whole, or not the same along both sides.
    """
    k = old[0] // new[0] if new[0] else 0
    if k < 1 or (new[0] * k, new[1] * k) != tuple(old):
        raise UsageError(
            f"a grid of {old[0]}x{old[1]} tokens cannot be replaced by one of {new[0]}x{new[1]}: there must be a whole "
            "number of old tokens per new one, the same along both sides. Use another image size or patch size."
        )
    return k


def aligned_rows(
    old: Tensor, new: Tensor, *, objective: str = "downsample", mode: str = "bilinear"
) -> tuple[Tensor, Tensor]:
    """Return rows x of the new space and y of the old embedder for `Statistics`.

    Args:
        old: tokens of the frozen embedder (B, D, h k, w k).
        new: patches of the new latents (B, d, h, w), interpolated or not: the result is the same.
        objective: one of `OBJECTIVES`.
        mode: interpolation mode of "upsample".

    Raises:
        ValueError: unknown objective.
        UsageError: the grids do not fit (`ratio`).
    """
    k = ratio(tuple(old.shape[2:]), tuple(new.shape[2:]))  # type: ignore[arg-type]
    if objective == "average":
        return new.flatten(2).mean(2), old.flatten(2).mean(2)
    if objective == "upsample":
        new = interpolated(new, k, mode)
    elif objective == "downsample":
        old = F.avg_pool2d(old, k) if k > 1 else old
    else:
        raise ValueError(f"Unknown objective {objective!r}.")
    return _rows(new), _rows(old)


def interpolated(grid: Tensor, k: int, mode: str) -> Tensor:
    """Interpolate (B, C, h, w) to (B, C, h k, w k)."""
    options: dict[str, Any] = {} if mode == "nearest" else {"align_corners": False}
    return F.interpolate(grid, scale_factor=float(k), mode=mode, **options)


def _rows(grid: Tensor) -> Tensor:
    return grid.movedim(1, -1).flatten(0, -2)


class GradientAlignment:
    """Gradient descent on the alignment as in the release, for comparison.

    It is AdamW (betas 0.9, 0.95) on a Xavier-initialised layer.

    Args:
        inputs: as in `Statistics`.
        outputs: as in `Statistics`.
        learning_rate: constant learning rate.
        seed: seed of the initialisation.
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
        """Take one step on rows x (N, d), y (N, D). Return the loss before it."""
        loss = F.mse_loss(self.layer(x.float()), y.float())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def error(self, x: Tensor, y: Tensor) -> float:
        """Return the mean squared residual of rows x (N, d) and y (N, D)."""
        return F.mse_loss(self.layer(x.float()), y.float()).item()


@dataclass(frozen=True)
class Moments:
    """Traces of the covariances of embedded tokens from images and from unit noise.

    Unit noise in the latents has the covariance weight weight^T in the tokens, for the embedder's matrix.
    """

    image: float
    noise: float


def signal_shift(old: Moments, new: Moments) -> float:
    """Return the shift r that gives new tokens the signal-to-noise ratio of the old ones.

    New tokens at the noise level r s / (1 + (r - 1) s) then have as much noise for their signal as old tokens at s. r
    is the root of the ratio of their image-to-noise ratios.
    """
    shift: float = ((new.image / new.noise) / (old.image / old.noise)) ** 0.5
    return shift
