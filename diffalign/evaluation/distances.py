"""Distances between two sets of images by their features: FID, KID, CMMD, precision and recall. Pure, in float64.

Which network makes the features, and how it resizes, is no matter of this file, and all of a number's meaning: a result
names it (`evaluation.fid`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

CHUNK = 2048
"""Rows of a kernel or distance matrix that are held at a time."""
BLOCKS = 10
"""Disjoint parts of two sets whose distances say how uncertain KID is."""


@dataclass(frozen=True)
class Moments:
    """Moments of N features of D dimensions: `mean` (D,), `covariance` (D, D) with N - 1, float64."""

    n: int
    mean: Tensor
    covariance: Tensor


def moments(features: Tensor) -> Moments:
    """Return the moments of (N, D) features, N at least 2."""
    x = features.double()
    mean = x.mean(0)
    centered = x - mean
    return Moments(len(x), mean, centered.T @ centered / (len(x) - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the Frechet distance of two Gaussians, at least 0.

    It is |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, eq. 6).

    The trace of the root is that of the symmetric C_a^(1/2) C_b C_a^(1/2), whose eigenvalues are real and not negative:
    no iteration, no complex part to drop, and faster than general eigenvalues (`diffalign bench rewards`).
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    inner = torch.linalg.eigvalsh(root @ b.covariance @ root)
    spread = a.covariance.trace() + b.covariance.trace() - 2 * inner.clamp_min(0).sqrt().sum()
    return max(float((a.mean - b.mean).square().sum() + spread), 0.0)


def kernel_distance(
    a: Tensor, b: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return KID (Binkowski et al. 2018): mean and standard deviation over random subsets.

    It is the unbiased squared MMD with the kernel (x y / D + 1)^3. The subsets are as large as the sets allow.
    """
    size = min(subset_size, len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    subset_distances = []
    for _ in range(subsets):
        x, y = (f[torch.randperm(len(f), generator=generator)[:size]].double() for f in (a, b))
        subset_distances.append(poly_mmd(x, y))
    values = torch.stack(subset_distances)
    return float(values.mean()), float(values.std(unbiased=False))


def cmmd(a: Tensor, b: Tensor, *, sigma: float = 10.0) -> float:
    """CMMD (Jayasumana et al. 2024): 1000 times the biased squared MMD with exp(-|x - y|^2 / 2 sigma^2), of features of
    length 1."""
    a, b = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (a, b))

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for part in x.split(CHUNK):  # of length 1: |x - y|^2 = 2 - 2 x y
            total += torch.exp((part @ y.T - 1) / sigma**2).sum().cpu()
        return total / (len(x) * len(y))

    return 1000 * float(mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))


def kernel_interval(
    a: Tensor, b: Tensor, group: Tensor, distance: float, *, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95 % interval of a KID.

    The spread is that of the distances between disjoint blocks of both sets. Blocks of `a` hold whole prompts
    (`group`) where there are enough. None where the sets are too small.
    """
    blocks = min(BLOCKS, len(a) // 2, len(b) // 2)
    if blocks < 3:
        return None
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(int(group.max()) + 1, generator=generator)
    order_a = shuffled[group].argsort(stable=True)
    order_b = torch.randperm(len(b), generator=generator)
    parts = zip(
        a[order_a].double().tensor_split(blocks),
        b[order_b].double().tensor_split(blocks),
        strict=True,
    )
    values = torch.stack([_unbiased(x, y) for x, y in parts])
    half = float(stdtrit(blocks - 1, 0.975)) * float(values.std()) / blocks**0.5
    return distance - half, distance + half


def _unbiased(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased squared MMD of two sets, which need not be equally large."""

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / u.shape[1] + 1) ** 3

    def within(u: Tensor) -> Tensor:
        k = kernel(u, u)
        return (k.sum() - k.diagonal().sum()) / (len(u) * (len(u) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


def covered(points: Tensor, manifold: Tensor, k: int) -> Tensor:
    """Return for each of N `points` whether it lies within a manifold of features (N,).

    The manifold is the union of balls up to each feature's k-th neighbour (Kynkaanniemi et al. 2019). The share of
    generated images within the reference's manifold is precision, that of reference images in the generated is recall.
    """
    if len(manifold) <= k:
        raise ValueError(f"{len(manifold)} features have no neighbour number {k}")
    points, manifold = points.double(), manifold.double()
    radii = torch.cat(
        [torch.cdist(part, manifold).kthvalue(k + 1).values for part in manifold.split(CHUNK)]
    )
    return torch.cat(
        [(torch.cdist(part, manifold) <= radii).any(1) for part in points.split(CHUNK)]
    )


def diversity(features: Tensor, group: Tensor) -> float:
    """Return the mean distance 1 - cosine between images of one prompt.

    It is a mean over prompts (`group`). Return NaN where no prompt has two images.
    """
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    means = []
    for number in group.unique():
        x = unit[group == number]
        if len(x) > 1:
            cosines = x @ x.T
            pairs = len(x) * (len(x) - 1)
            means.append(1 - (cosines.sum() - cosines.diagonal().sum()) / pairs)
    return float(torch.stack(means).mean()) if means else float("nan")
