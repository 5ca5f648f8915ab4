"""FID, KID, CMMD, precision and recall: closed forms, then torchmetrics."""

import math

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from diffalign.evaluation import distances
from diffalign.evaluation.distances import Moments, frechet_distance, moments


def normal(n, d, *, mean=0.0, std=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(n, d, generator=generator, dtype=torch.float64)


def gaussian(mean, covariance):
    return Moments(1000, torch.tensor(mean).double(), torch.tensor(covariance).double())


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # the same
        (([1.0, 2.0], [[2.0, 0.5], [0.5, 1.0]]), ([1.0, 2.0], [[2.0, 0.5], [0.5, 1.0]]), 0.0),
        # means 3 and 4 apart
        (([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]), ([3.0, 4.0], [[1.0, 0.0], [0.0, 1.0]]), 25.0),
        # axis by axis: (sqrt 4 - sqrt 1)^2 + (sqrt 9 - sqrt 1)^2
        (([0.0, 0.0], [[4.0, 0.0], [0.0, 9.0]]), ([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]), 5.0),
        # one has no spread along an axis
        (([0.0, 0.0], [[1.0, 0.0], [0.0, 0.0]]), ([0.0, 0.0], [[1.0, 0.0], [0.0, 4.0]]), 4.0),
    ],
)
def test_frechet_distance_of_known_gaussians(a, b, expected):
    assert frechet_distance(gaussian(*a), gaussian(*b)) == pytest.approx(expected, abs=1e-7)


def test_frechet_distance_does_not_depend_on_the_axes():
    rotation = torch.linalg.qr(normal(5, 5, seed=3)).Q
    a, b = normal(200, 5), normal(300, 5, mean=0.3, std=1.5, seed=1)
    there = frechet_distance(moments(a), moments(b))
    assert frechet_distance(moments(b), moments(a)) == pytest.approx(there)
    turned = frechet_distance(moments(a @ rotation), moments(b @ rotation))
    assert turned == pytest.approx(there, rel=1e-9)


def test_frechet_distance_of_fewer_images_than_dimensions():
    """Singular covariances: the same images give 0, not a small negative number."""
    few = normal(10, 64)
    assert 0 <= frechet_distance(moments(few), moments(few)) < 1e-6
    assert frechet_distance(moments(few), moments(few + 1)) == pytest.approx(64, rel=1e-6)


class Features(nn.Module):
    num_features = 12

    def forward(self, x):
        return x


def test_frechet_distance_is_that_of_torchmetrics():
    a, b = normal(150, 12), normal(90, 12, mean=0.2, std=1.3, seed=1)
    metric = FrechetInceptionDistance(feature=Features(), normalize=True).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    expected = metric.compute().item()
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_is_that_of_torchmetrics_on_whole_sets():
    """A subset that is the whole set is the same for everybody, up to its order."""
    a, b = normal(60, 12), normal(60, 12, mean=0.5, seed=1)
    metric = KernelInceptionDistance(feature=Features(), subsets=2, subset_size=60, normalize=True)
    metric.update(a.float(), real=True)
    metric.update(b.float(), real=False)
    mean, std = distances.kernel_distance(a, b, subsets=2, subset_size=60)
    assert mean == pytest.approx(metric.compute()[0].item(), rel=1e-4)
    assert std == pytest.approx(0, abs=1e-9)


def test_kernel_distance_of_equal_distributions_is_zero_on_average():
    mean, std = distances.kernel_distance(
        normal(400, 6), normal(400, 6, seed=1), subsets=50, subset_size=100
    )
    assert abs(mean) < 3 * std / math.sqrt(50) + 0.02


def test_cmmd_by_hand():
    """Two images each at right angles: kernels exp(0) = 1 within a pair of equals, exp(-1 / 100) across."""
    a, b = torch.eye(2)[:1].repeat(2, 1), torch.eye(2)[1:].repeat(3, 1)
    expected = 1000 * (1 + 1 - 2 * math.exp(-1 / 100))
    assert distances.cmmd(a, 5 * b) == pytest.approx(expected)  # lengths do not matter
    assert distances.cmmd(a, a) == pytest.approx(0, abs=1e-9)


def test_cmmd_in_parts(monkeypatch):
    a, b = normal(50, 8), normal(70, 8, mean=1, seed=1)
    whole = distances.cmmd(a, b)
    monkeypatch.setattr(distances, "CHUNK", 16)
    assert distances.cmmd(a, b) == pytest.approx(whole, rel=1e-9)


def precision_recall(generated, reference, k=3):
    pairs = ((generated, reference), (reference, generated))
    return tuple(float(distances.covered(x, y, k).double().mean()) for x, y in pairs)


def test_precision_and_recall_of_known_sets(monkeypatch):
    line = torch.arange(10.0)[:, None]
    assert precision_recall(line, line) == (1.0, 1.0)
    assert precision_recall(line, line + 1000) == (0.0, 0.0)
    # half of the reference's places: all that is shown is real; with k = 1 the balls reach one further than 4
    half = line[:5]
    assert precision_recall(half, line, k=1) == (1.0, 0.6)
    monkeypatch.setattr(distances, "CHUNK", 3)
    assert precision_recall(half, line, k=1) == (1.0, 0.6)
    with pytest.raises(ValueError, match="neighbour number 10"):
        precision_recall(line, line, k=10)


def test_diversity_of_known_groups():
    same, orthogonal = torch.ones(3, 2), torch.eye(2)
    group = torch.tensor([0, 0, 0, 1, 1, 2])
    features = torch.cat([same, orthogonal, torch.ones(1, 2)])
    assert distances.diversity(features, group) == pytest.approx(0.5)  # 0, 1, and one alone
    assert math.isnan(distances.diversity(same, torch.arange(3)))
