"""Diversity of the images of one prompt, as pure functions of their features."""

from __future__ import annotations

import numpy as np


def pairwise_distance(features: np.ndarray) -> float:
    """Return the mean 1 - cosine of two different images.

    Args:
        features: (n, D), n at least 2.
    """
    n = len(features)
    cosines = _cosines(features)
    return float(1 - (cosines.sum() - np.trace(cosines)) / (n * (n - 1)))


def vendi(features: np.ndarray) -> float:
    """Return the Vendi score of features (n, D): the effective number of different images, 1 to n.

    It is the exponential of the entropy of the eigenvalues of K / n, where K are cosines (Friedman and Dieng 2023).
    """
    values = np.linalg.eigvalsh(_cosines(features) / len(features))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def _cosines(features: np.ndarray) -> np.ndarray:
    x = features.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines: np.ndarray = x @ x.T
    return cosines
