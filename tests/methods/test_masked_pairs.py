"""Diffusion-DPO where a mask is white, and with an automatic beta."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny_pairs import build, settings, write_pairs

from diffalign.algorithms.preference import PairErrors, automatic_beta, masked_error, pair_loss
from diffalign.config import ConfigError
from diffalign.data.pairs.tables import PairsError
from diffalign.methods.preference.precompute import check_source
from diffalign.methods.preference.trainer import GAIN_DECAY

HALF = tiny.SIZE // 2


def test_a_masked_error_is_the_mean_over_what_is_white():
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.randn(2, 3, 4, 2, 8, 8, generator=generator, dtype=torch.float64).unbind(0)
    ones = torch.ones(3, 1, 1, 8, 8, dtype=torch.float64)
    plain = (pred - target).square().mean((-3, -2, -1))
    torch.testing.assert_close(masked_error(pred, target), plain)
    torch.testing.assert_close(masked_error(pred, target, ones), plain)
    half = ones.clone()
    half[..., 4:] = 0
    left = (pred - target)[..., :4].square().mean((-3, -2, -1))
    torch.testing.assert_close(masked_error(pred, target, half), left)
    # a grey mask weighs all places alike, whatever its size
    torch.testing.assert_close(masked_error(pred, target, ones * 0.3), plain)
    # nothing is learnt outside
    pred.requires_grad_()
    masked_error(pred, target, half).sum().backward()
    assert (pred.grad[..., 4:] == 0).all()


@pytest.mark.parametrize("target", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("gain", [1e-4, 0.01, 3.0])
def test_an_automatic_beta_keeps_the_gradient_factor(target, gain):
    beta = automatic_beta(gain, most=1e9, target=target)
    errors = torch.tensor([1.0 - 2 * gain, 1.0, 1.0, 1.0], dtype=torch.float64)
    winner = errors[:1].requires_grad_()
    pair = PairErrors(winner, errors[1:2].detach(), errors[2:3], errors[3:])
    pair_loss(pair, torch.ones(1, dtype=torch.float64), beta=beta).sum().backward()
    # the loss has the gradient beta / 2 sigma(-margin) at the winner's error
    assert winner.grad.item() == pytest.approx(beta / 2 * target)


def test_an_automatic_beta_never_exceeds_its_setting():
    assert automatic_beta(0.0, most=50, target=0.2) == 50
    assert automatic_beta(-1.0, most=50, target=0.2) == 50
    assert automatic_beta(1e-9, most=50, target=0.2) == 50
    assert automatic_beta(1.0, most=50, target=0.2) == pytest.approx(math.log(4))


def masked(folder, **changes):
    """Return pairs whose masks are white on the left half."""
    white = np.zeros((tiny.SIZE, tiny.SIZE), np.uint8)
    white[:, :HALF] = 255
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(white).save(folder / "left.png")
    Image.fromarray(white[:4]).save(folder / "small.png")
    Image.fromarray(np.zeros_like(white)).save(folder / "black.png")
    rows = {f"row_{i}": {"mask": "left.png"} for i in range(12)}
    return write_pairs(folder, **{**rows, **changes})


DPO = {"masked": True}


def test_masks_are_cached_at_the_latents_size_and_flip_with_their_images(tmp_path):
    source = masked(tmp_path / "pairs", row_1={"mask": ""}, row_2={"mask": "left.png", "label": 0})
    run = build(source, tmp_path, "dpo", algorithm=DPO)
    batch = run.cache.batch(run.pairs)
    size = batch.latents.shape[-1]
    assert batch.mask.shape == (12, 1, size, size)
    assert (batch.mask[0, 0, :, : size // 2] == 1).all()
    assert (batch.mask[0, 0, :, size // 2 :] == 0).all()
    assert (batch.mask[1] == 1).all()  # a pair without a mask counts as a whole
    assert run.train_update()["loss"] > 0

    flipped = build(source, tmp_path / "f", "dpo", algorithm=DPO, pairs={"random_flip": True})
    masks = flipped.cache.batch(flipped.pairs).mask[[0, *range(3, 12)], 0, 0, 0]
    assert set(masks.tolist()) == {0.0, 1.0}


def test_what_lies_outside_the_mask_teaches_nothing(tmp_path):
    """The gradient does not depend on pixels of the black half."""
    run = build(masked(tmp_path / "pairs"), tmp_path, "dpo", algorithm=DPO | {"safeguard": None})
    batch = run.cache.batch(run.pairs[:4])
    half = batch.latents.shape[-1] // 2
    states = run.update.states(batch, (1, 1))
    errors, _ = run.update._errors(states)
    with torch.no_grad():
        pred = run.update.predict(states)
    target = states.by_image(states.batch.target)
    left = (pred - target)[..., :half].square().flatten(3).mean(3)
    torch.testing.assert_close(errors, left)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ("small.png", "mask of another size than its images"),
        ("black.png", "black mask"),
        ("nowhere.png", "unreadable mask"),
    ],
)
def test_a_bad_mask_leaves_its_pair_out(tmp_path, caplog, mask, reason):
    source = masked(tmp_path / "pairs", row_3={"mask": mask})
    run = build(source, tmp_path, "dpo", algorithm=DPO)
    assert run.cache.manifest["skipped"] == {reason: 1}
    assert reason in caplog.text


def test_masks_that_are_missing_or_unused_are_told(tmp_path, caplog):
    plain = write_pairs(tmp_path / "plain")
    wanted = {"type": "diffusion_dpo", "masked": True}
    with pytest.raises(PairsError, match="has no column `mask`"):
        check_source(settings(plain, tmp_path, algorithm=wanted))
    check_source(settings(plain, tmp_path))
    assert not caplog.text
    check_source(settings(masked(tmp_path / "pairs"), tmp_path))
    assert "which is not used" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"auto_beta": 0.5}, "between 0 and 0.5"),
        ({"auto_beta": 0.2, "loss_type": "ipo"}, "sigmoid only"),
    ],
)
def test_settings_of_an_automatic_beta_are_checked(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        settings("pairs", tmp_path, algorithm={"type": "diffusion_dpo", **values})


def test_beta_falls_as_the_margin_grows_and_a_restart_goes_on_with_it(tmp_path):
    source = write_pairs(tmp_path / "pairs")
    groups = {"algorithm": {"auto_beta": 0.2, "beta": 5000.0, "safeguard": None}}
    whole = build(source, tmp_path / "a", "dpo", **groups)
    rows = [whole.train_update() for _ in range(6)]
    assert rows[0]["beta"] == 5000
    betas = [r["beta"] for r in rows]
    assert betas[-1] < betas[2] < 5000
    gains = [r["margin"] / r["beta"] for r in rows]
    mean = sum(g * GAIN_DECAY ** (5 - i) * (1 - GAIN_DECAY) for i, g in enumerate(gains))
    wanted = automatic_beta(mean / (1 - GAIN_DECAY**6), most=5000, target=0.2)
    assert whole.beta == pytest.approx(wanted)

    first = build(source, tmp_path / "b", "dpo", **groups)
    for _ in range(3):
        first.train_update()
    first.save()
    second = build(source, tmp_path / "b", "dpo", **groups)
    assert second.resume()
    betas = [second.train_update()["beta"] for _ in range(3)]
    assert betas == [r["beta"] for r in rows[3:]]
    assert json.loads(json.dumps(second.progress.gain)) == whole.progress.gain
