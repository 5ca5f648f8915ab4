"""GPTQ: closed forms, its error beside rounding to nearest, and a dense OBQ written from the paper's equations."""

import itertools

import pytest
import torch

from diffalign.core.errors import UsageError
from diffalign.quantization import codes, rounding
from diffalign.quantization.lowrank import decompose
from diffalign.quantization.rounding import Curvature, gptq

SIZES = [(8, 64), (5, 65), (12, 130), (3, 1)]


def problem(rows, columns, *, seed=0, number=512):
    """A weight, and moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(number, columns, generator=generator) @ (mixing + torch.eye(columns))
    return weight, inputs.mT @ inputs / number


def unpacked(packed, shape, bits, group_size):
    return codes.unpack(*packed, shape=shape, bits=bits, group_size=group_size)


def both(weight, second, bits, group_size):
    """Weights rounded to nearest and by GPTQ."""
    options = {"bits": bits, "group_size": group_size}
    packs = [
        codes.pack(weight, **options, curvature=c) for c in (None, Curvature.of(second.float()))
    ]
    assert torch.equal(packs[0][1], packs[1][1])  # the scales are the same
    return [unpacked(p, weight.shape, bits, group_size) for p in packs]


def objective(weight, rounded, second):
    """tr((W - Q) H (W - Q)^T) by rows."""
    difference = (weight - rounded).double()
    return (difference @ second.double() * difference).sum(1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [64, 7, None])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("diagonal", [False, True])
def test_uncorrelated_inputs_are_rounded_to_nearest(bits, group_size, size, diagonal):
    weight, _ = problem(*size)
    second = torch.eye(size[1])
    if diagonal:
        second *= torch.rand(size[1], generator=torch.Generator().manual_seed(1)) + 0.1
    assert torch.equal(*both(weight, second, bits, group_size))


def test_two_inputs_that_move_together_are_rounded_together():
    """By hand: nearest gives (0, 0) for (0.4, 0.4), whose sum is off by 0.8; the best pair is off by 0.2."""
    second = torch.tensor([[1.0, 0.99], [0.99, 1.0]])
    weight = torch.tensor([[0.4, 0.4]])
    nearest = torch.zeros(1, 2, dtype=torch.int8)
    scales = torch.ones(1, 1)
    options = {"bits": 4, "group_size": None}
    chosen = gptq(weight, nearest, scales, Curvature.of(second), **options)
    pairs = [torch.tensor([p]) for p in itertools.product(range(-8, 8), repeat=2)]
    least = min(float(objective(weight, p, second)) for p in pairs)
    assert chosen.sum() == 1
    assert float(objective(weight, chosen, second)) == pytest.approx(least)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [64, None])
@pytest.mark.parametrize("seed", range(4))
def test_no_row_errs_more_than_rounded_to_nearest(bits, group_size, seed):
    weight, second = problem(24, 160, seed=seed)
    nearest, chosen = both(weight, second, bits, group_size)
    damped = second + torch.eye(160) * 0.01 * second.diagonal().mean()
    errors = [objective(weight, q, damped) for q in (nearest, chosen)]
    assert (errors[1] <= errors[0] * (1 + 1e-4)).all()
    assert errors[1].sum() < 0.7 * errors[0].sum()


def obq(weight, scales, second, bits):
    """Optimal brain quantisation of rows in a given order, by equations 2 and 3 of the paper, in float64.

    After each column q the inverse loses that row and column by Gaussian elimination.
    """
    weight, scales = weight.double().clone(), scales.double()
    second = second.double()
    columns = len(second)
    damped = second + 0.01 * second.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    order = second.diagonal().argsort(descending=True, stable=True)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    chosen = torch.zeros_like(weight)
    for q in order.tolist():
        chosen[:, q] = (weight[:, q] / scales[:, q]).round().clamp(low, high)
        error = (weight[:, q] - chosen[:, q] * scales[:, q]) / inverse[q, q]
        weight -= error[:, None] * inverse[q]
        inverse = inverse - inverse[:, q, None] * inverse[q, None] / inverse[q, q]
    return chosen


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [48, 150])
def test_codes_are_those_of_dense_obq(monkeypatch, bits, columns):
    monkeypatch.setattr(rounding, "BLOCK", 32)
    monkeypatch.setattr(rounding, "CHUNK", 7 * columns)  # rows in chunks
    weight, second = problem(20, columns)
    _, scales = codes.pack(weight, bits=bits, group_size=16)
    by_column = scales.float().repeat_interleave(16, 1)[:, :columns]
    nearest = torch.zeros_like(weight, dtype=torch.int8) + 2 ** (bits - 1) - 1  # never the better
    options = {"bits": bits, "group_size": 16}
    chosen = gptq(weight, nearest, scales, Curvature.of(second), **options)
    expected = obq(weight, by_column, second, bits)
    # float32 and float64 differ where a weight is at the middle of two codes
    assert (chosen == expected).float().mean() > 0.995
    errors = [objective(weight, c * by_column, second).sum() for c in (chosen, expected)]
    torch.testing.assert_close(*errors, rtol=0.02, atol=0)


def test_inputs_that_never_come_are_rounded_to_nearest():
    weight, second = problem(8, 64)
    silent = second.clone()
    silent[32:] = 0
    silent[:, 32:] = 0
    nearest, chosen = both(weight, silent, 4, 64)
    assert torch.equal(nearest[:, 32:], chosen[:, 32:])
    assert not torch.equal(nearest[:, :32], chosen[:, :32])
    assert Curvature.of(torch.zeros(64, 64)) is None
    assert torch.equal(*both(weight, torch.zeros(64, 64), 4, 64))


@pytest.mark.parametrize("rank", [1, 5])
def test_fewer_rows_than_inputs_are_damped(rank):
    weight, _ = problem(8, 64)
    inputs = torch.randn(rank, 64, generator=torch.Generator().manual_seed(3))
    second = inputs.mT @ inputs / rank
    curvature = Curvature.of(second)
    assert curvature.damping == rounding.DAMPING[0]
    assert curvature.factor.isfinite().all()
    nearest, chosen = both(weight, second, 4, 64)
    assert objective(weight, chosen, second).sum() < 0.1 * objective(weight, nearest, second).sum()


def test_a_matrix_that_stays_singular_is_damped_more():
    second = torch.tensor(
        [[1.0, 1.05], [1.05, 1.0]]
    )  # not a matrix of moments: one value is negative
    assert Curvature.of(second).damping == 0.1
    with pytest.raises(UsageError, match="no inverse even with its own mean added"):
        Curvature.of(torch.tensor([[1.0, 9.0], [9.0, 1.0]]))


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(UsageError, match="moments: second moments of inputs are not finite"):
        Curvature.of(torch.full((2, 2), torch.nan))


@pytest.mark.parametrize("size", [2.0**-123, 1.0, 2.0**123])
def test_sizes_of_weights_and_inputs_do_not_matter(size):
    weight, second = problem(6, 64)
    expected = both(weight, second, 4, 64)[1]
    assert torch.equal(both(weight * size, second * 2.0**-30, 4, 64)[1] / size, expected)
    weight[:, :32] = 0  # a group of zeros stays zero
    assert not both(weight, second, 4, 32)[1][:, :32].any()


@pytest.mark.parametrize("rank", [1, 8])
def test_what_a_branch_leaves_is_rounded_by_moments(rank):
    weight, second = problem(32, 128)
    options = {"rank": rank, "bits": 4, "input_scale": second.diagonal().sqrt()}
    errors = []
    for curvature in (None, Curvature.of(second)):
        fitted = decompose(weight, **options, curvature=curvature)
        rest = unpacked((fitted.packed, fitted.scales), weight.shape, 4, 64)
        errors.append(objective(weight, rest + fitted.up @ fitted.down, second).sum())
    assert errors[1] < 0.85 * errors[0]
