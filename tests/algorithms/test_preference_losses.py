"""Preference losses: log 2 at the reference, closed forms, gradients, symmetries."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffalign.algorithms import preference as pref
from diffalign.algorithms.forward_process import matching_error
from diffalign.algorithms.preference import LOSS_TYPES, PairErrors, pair_loss
from diffalign.data.pairs.ranking import choose_pairs, rank_weights

BETA = 50.0


def errors(w, lo, rw=None, rl=None):
    w, lo = (torch.tensor(x, dtype=torch.float64) for x in (w, lo))
    rw = w.clone() if rw is None else torch.tensor(rw, dtype=torch.float64)
    rl = lo.clone() if rl is None else torch.tensor(rl, dtype=torch.float64)
    return PairErrors(w.requires_grad_(), lo.requires_grad_(), rw, rl)


ONE = torch.ones(2, dtype=torch.float64)


def test_at_the_reference_the_loss_is_log_2_for_every_label():
    for p in (0.0, 0.3, 1.0):
        found = pair_loss(errors([0.3, 0.9], [0.2, 0.7]), p * ONE, beta=BETA)
        torch.testing.assert_close(found, torch.full_like(found, math.log(2)))


def test_the_gradient_at_the_reference_is_beta_over_four():
    e = errors([0.3, 0.9], [0.2, 0.7])
    pair_loss(e, ONE, beta=BETA).sum().backward()
    torch.testing.assert_close(e.winner.grad, torch.full_like(e.winner, BETA / 4))
    torch.testing.assert_close(e.loser.grad, torch.full_like(e.loser, -BETA / 4))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_are_those_of_differences(loss_type):
    e = errors([0.31, 0.88], [0.22, 0.69], [0.3, 0.9], [0.2, 0.7])
    p = torch.tensor([1.0, 0.8], dtype=torch.float64)
    pair_loss(e, p, beta=BETA, loss_type=loss_type).sum().backward()

    def value(step):
        moved = PairErrors(
            e.winner.detach() + step, e.loser.detach(), e.reference_winner, e.reference_loser
        )
        return pair_loss(moved, p, beta=BETA, loss_type=loss_type).sum()

    numeric = (value(1e-6) - value(-1e-6)) / 2e-6
    assert e.winner.grad.sum().item() == pytest.approx(numeric.item(), rel=1e-5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_swapping_the_pair_is_the_opposite_label(loss_type):
    e = errors([0.31, 0.88], [0.22, 0.69], [0.3, 0.9], [0.2, 0.7])
    swapped = PairErrors(e.loser, e.winner, e.reference_loser, e.reference_winner)
    torch.testing.assert_close(swapped.margin(BETA), -e.margin(BETA))
    ours = pair_loss(e, 0.8 * ONE, beta=BETA, loss_type=loss_type)
    torch.testing.assert_close(pair_loss(swapped, 0.2 * ONE, beta=BETA, loss_type=loss_type), ours)


def test_a_lower_winner_and_a_higher_loser_lower_the_loss():
    for loss_type in ("sigmoid", "hinge", "ipo"):
        base = pair_loss(errors([0.3], [0.2]), ONE[:1], beta=BETA, loss_type=loss_type)
        nearer = pair_loss(
            errors([0.299], [0.2], [0.3], [0.2]), ONE[:1], beta=BETA, loss_type=loss_type
        )
        farther = pair_loss(
            errors([0.3], [0.201], [0.3], [0.2]), ONE[:1], beta=BETA, loss_type=loss_type
        )
        assert nearer < base
        assert farther < base


def test_undecided_pairs_and_equal_images_teach_nothing_at_the_reference():
    e = errors([0.3, 0.9], [0.2, 0.7])
    pair_loss(e, 0.5 * ONE, beta=BETA).sum().backward()
    assert e.winner.grad.abs().max() == 0
    same = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    image = PairErrors(same, same, torch.tensor([0.3]), torch.tensor([0.3]))
    pair_loss(image, ONE[:1], beta=BETA).sum().backward()
    assert same.grad.abs().max() == 0


def test_beta_and_errors_scale_against_each_other():
    e = errors([0.31], [0.22], [0.3], [0.2])
    scaled = errors([0.31 / 7], [0.22 / 7], [0.3 / 7], [0.2 / 7])
    for loss_type in ("sigmoid", "hinge", "dmpo"):
        torch.testing.assert_close(
            pair_loss(scaled, ONE[:1], beta=7 * BETA, loss_type=loss_type),
            pair_loss(e, ONE[:1], beta=BETA, loss_type=loss_type),
        )


def test_bounded_losses_by_hand():
    e = errors([0.3], [0.2], [0.31], [0.19])  # Delta_w = -0.01, Delta_l = 0.01
    ipo = pair_loss(e, ONE[:1], beta=BETA, loss_type="ipo")
    assert ipo.item() == pytest.approx((0.02 - 1 / (2 * BETA)) ** 2)
    assert e.margin(BETA).item() == pytest.approx(0.5)
    assert pair_loss(e, ONE[:1], beta=BETA, loss_type="hinge").item() == pytest.approx(0.5)
    q = 1 / (1 + math.exp(-0.5))
    kl = q * math.log(q / 0.99) + (1 - q) * math.log((1 - q) / 0.01)
    assert pair_loss(e, ONE[:1], beta=BETA, loss_type="dmpo").item() == pytest.approx(kl)
    with pytest.raises(ValueError, match="Choose from sigmoid"):
        pair_loss(e, ONE[:1], beta=BETA, loss_type="orpo")


def test_metrics_name_both_errors():
    found = errors([0.3, 0.9], [0.2, 0.7], [0.31, 0.8], [0.2, 0.7]).metrics(BETA)
    assert found["accuracy"].tolist() == [1, 0]
    tie = errors([0.3, 0.5], [0.3, 0.5], [0.2, 0.5], [0.2, 0.5]).metrics(BETA)
    assert tie["accuracy"].tolist() == [0.5, 0.5], "as diffusers counts ties"
    assert found["margin"].tolist() == pytest.approx([0.25, -2.5])


def predictions(seed=0, n=64, d=12):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=g) for _ in range(4)]


def test_the_safeguard_keeps_the_winners_error_from_rising():
    wp, wt, lp, lt = predictions()
    for mu in (0.0, 0.4, 1.0):
        factor = pref.safeguard(wp, wt, lp, lt, mu=mu)
        assert ((factor >= 0) & (factor <= 1)).all()
        gw, gl = wp - wt, lp - lt
        along = ((-gw + factor[:, None] * gl) * gw).sum(1)  # how the winner's error changes
        assert (along <= -mu * gw.square().sum(1) + 1e-4).all()
        against = (gw * gl).sum(1) <= 0
        assert (factor[against] == 1).all()
    aligned = pref.safeguard(wp, wt, wp, wt, mu=1.0)
    assert aligned.abs().max() < 1e-6


def test_the_safeguard_changes_gradients_and_no_values():
    wp, wt, lp, lt = predictions()
    lp.requires_grad_()
    error = matching_error(lp, lt)
    factor = torch.rand(len(lp))
    guarded = pref.scale_gradient(error, factor)
    torch.testing.assert_close(guarded, error)
    guarded.sum().backward()
    expected = factor[:, None] * 2 * (lp - lt) / lp.shape[1]
    torch.testing.assert_close(lp.grad, expected)
    assert wp is not wt


def test_kto_by_hand():
    e = torch.tensor([0.3, 0.3], requires_grad=True)
    wanted = torch.tensor([True, False])
    found = pref.kto_loss(
        e, torch.tensor([0.3, 0.3]), wanted, beta=10.0, baseline=torch.tensor(0.0)
    )
    torch.testing.assert_close(found, torch.tensor([0.5, 0.5]))
    found.sum().backward()
    torch.testing.assert_close(e.grad, torch.tensor([2.5, -2.5]))  # beta / 4, either way
    better = pref.kto_loss(
        torch.tensor([0.2]), torch.tensor([0.3]), wanted[:1], beta=10.0, baseline=torch.tensor(0.05)
    )
    assert better.item() == pytest.approx(1 - 1 / (1 + math.exp(-0.5)))


def test_mapo_by_hand():
    same = torch.tensor([0.4])
    assert pref.mapo_loss(same, same, beta=0.1).item() == pytest.approx(0.4 + 0.1 * math.log(2))
    e = torch.linspace(0, 4, 400, dtype=torch.float64)
    phi = pref._mapo_reward(e)
    assert phi[0] == 1
    assert (phi.diff() < 0).all()
    exact = 0.5 * e[1:] / torch.expm1(0.5 * e[1:])
    torch.testing.assert_close(phi[1:], exact, rtol=1e-9, atol=1e-9)
    tiny = torch.tensor([1e-9], requires_grad=True)
    pref.mapo_loss(tiny, torch.tensor([0.2]), beta=0.1).sum().backward()
    assert tiny.grad.isfinite().all()


def test_weighted_pairs_of_a_ranking_are_rankdpo():
    """The sum over pairs as the paper writes it: ranks from 1, gains 2^score - 1."""
    error = torch.tensor([0.31, 0.22, 0.27])
    reference = torch.tensor([0.3, 0.2, 0.29])
    scores = [0.5, 1.0, 0.0]
    rank, expected = {1: 1, 0: 2, 2: 3}, torch.zeros(())
    for better, worse in ((1, 0), (1, 2), (0, 2)):
        gain = 2 ** scores[better] - 2 ** scores[worse]
        discount = 1 / math.log(1 + rank[better]) - 1 / math.log(1 + rank[worse])
        delta = (error - reference)[[better, worse]]
        expected -= gain * discount * F.logsigmoid(-BETA / 2 * (delta[0] - delta[1]))
    pairs = choose_pairs(scores, pick="all")
    a, b = (list(side) for side in zip(*pairs, strict=True))
    errors = PairErrors(error[a], error[b], reference[a], reference[b])
    losses = pref.pair_loss(errors, torch.ones(3), beta=BETA, loss_type="sigmoid")
    torch.testing.assert_close((torch.tensor(rank_weights(scores, pairs)) * losses).sum(), expected)
