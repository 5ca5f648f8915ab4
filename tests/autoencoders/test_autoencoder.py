"""Training of autoencoders: what each phase trains, resumes, real photographs, and bad input."""

import json
import os

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from PIL import Image
from skimage import data as photographs
from tiny_moves import deep_autoencoder
from tiny_parts import autoencoder

from diffalign import cli
from diffalign.autoencoders.trainer import (
    OLD_STATE,
    AutoencoderConfig,
    AutoencoderError,
    AutoencoderTrainer,
    PatchDiscriminator,
    hinge_loss,
    rate_factor,
    reconstruction_loss,
    set_scale,
)
from diffalign.config import ConfigError
from diffalign.core.interruption import SIGNALS, Interrupted
from diffalign.latents.codec import LatentCodec
from diffalign.training.checkpoint import CheckpointError


def kl_autoencoder():
    torch.manual_seed(0)
    return autoencoder()


def noise(update, count):
    rng = np.random.default_rng(update)
    coarse = torch.from_numpy(rng.integers(0, 256, (count, 3, 4, 4), dtype=np.uint8))
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)


def trainer(folder, vae=None, **options):
    plain = {"num_updates": 4, "batch_size": 3, "mixed_precision": "no", "checkpoint_every": 2}
    config = AutoencoderConfig(**plain | options)
    return AutoencoderTrainer(vae or deep_autoencoder(), noise, config, folder=folder)


def test_the_loss_in_closed_form():
    config = AutoencoderConfig(squared_weight=1.0, difference_weight=0.5)
    target = torch.zeros(1, 3, 4, 4)
    assert float(reconstruction_loss(target, target, config)) == 0
    flat = float(reconstruction_loss(target + 0.5, target, config))
    assert flat == pytest.approx(0.5 + 0.25), "a constant error has no differences"
    edge = target.clone()
    edge[..., 2:] = 1.0
    assert float(reconstruction_loss(edge, target, config)) == pytest.approx(0.5 + 0.5 + 0.5 / 3)


def test_rate_and_hinge():
    assert rate_factor(0, 100) == pytest.approx(0.2)
    assert rate_factor(4, 100) == 1
    assert rate_factor(100, 100) == pytest.approx(0, abs=1e-9)
    assert float(hinge_loss(torch.tensor([2.0]), torch.tensor([-2.0]))) == 0
    assert float(hinge_loss(torch.tensor([0.0]), torch.tensor([0.0]))) == 1
    assert PatchDiscriminator()(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 4, 4)


@pytest.mark.parametrize("make", [deep_autoencoder, kl_autoencoder], ids=["dc", "kl"])
@pytest.mark.parametrize(
    ("phase", "parts"),
    [
        ("reconstruct", {"encoder", "decoder"}),
        ("latent", {"encoder.conv_out", "decoder.conv_in"}),
        ("refine", {"decoder.conv_out", "decoder.norm_out", "decoder.conv_norm_out"}),
    ],
)
def test_a_phase_trains_its_layers_and_no_others(make, phase, parts, tmp_path):
    run = trainer(tmp_path, make(), phase=phase)
    before = {k: v.clone() for k, v in run.vae.state_dict().items()}
    assert (run.adversary is not None) == (phase == "refine")
    found = run.step()
    assert np.isfinite(found["loss"])
    changed = {k for k, v in run.vae.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(name.startswith(tuple(parts)) for name in changed)


@pytest.mark.parametrize("make", [deep_autoencoder, kl_autoencoder], ids=["dc", "kl"])
def test_training_resumes_bit_for_bit(make, tmp_path):
    whole = trainer(tmp_path / "whole", make())
    whole.run()
    parts = trainer(tmp_path / "parts", make())
    for _ in range(2):
        parts.step()
    parts.save()
    again = trainer(tmp_path / "parts", make())
    again.run()
    a, b = whole.vae.state_dict(), again.vae.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_it_learns_and_sets_its_scale(tmp_path):
    run = trainer(tmp_path, num_updates=60, learning_rate=5e-3, checkpoint_every=100)
    losses = [run.step()["loss"] for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:10])
    set_scale(run.vae.eval(), noise(1000, 64))
    power = LatentCodec(run.vae).encode(noise(2000, 64)).square().mean()
    assert float(power) == pytest.approx(1, abs=0.1)
    kl = kl_autoencoder()
    set_scale(kl, noise(1000, 64))
    latents = LatentCodec(kl).encode(noise(1000, 64))
    assert float(latents.mean()) == pytest.approx(0, abs=0.01)
    assert float(latents.std()) == pytest.approx(1, abs=0.01)


def test_what_cannot_go_on_says_so(tmp_path):
    run = trainer(tmp_path)
    run.save()
    with pytest.raises(AutoencoderError, match="of a run with other settings"):
        trainer(tmp_path, learning_rate=1e-4).resume()
    other = AutoencoderTrainer(
        deep_autoencoder(), noise, run.config, folder=tmp_path, key={"images": "others"}
    )
    with pytest.raises(AutoencoderError, match="of a run with other settings"):
        other.resume()
    file = tmp_path / "000000" / "autoencoder.safetensors"
    file.write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*is damaged"):
        trainer(tmp_path).resume()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / OLD_STATE).write_bytes(b"pickle")
    with pytest.raises(AutoencoderError, match="of an older version"):
        trainer(tmp_path / "old").resume()
    broken = trainer(tmp_path / "other")
    broken.images = lambda update, count: noise(update, count).float() * float("nan")
    with pytest.raises(AutoencoderError, match="not finite"):
        broken.step()
    with pytest.raises(ConfigError, match="phase: unknown value"):
        AutoencoderConfig(phase="refin")


def test_ruined_weights_are_never_saved_and_the_advice_can_be_followed(tmp_path):
    """The loss before a step says nothing of the weights after it."""
    folder = tmp_path / "x"
    with pytest.raises(
        AutoencoderError, match=r"was not saved; the last checkpoint is none.*start w"
    ):
        trainer(folder, learning_rate=1e20, checkpoint_every=1).run()
    healed = trainer(folder, learning_rate=1e-4, checkpoint_every=1, num_updates=1)
    healed.run()  # the folder belongs to nobody yet
    assert [p.name for p in folder.iterdir()] == ["000001"]


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path):
    run = trainer(tmp_path)
    before = {k: v.clone() for k, v in run.vae.state_dict().items()}
    run.parameters[0].register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(AutoencoderError, match="gradient of update 1 is not finite and was not"):
        run.step()
    assert all(torch.equal(v, before[k]) for k, v in run.vae.state_dict().items())


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_the_update_in_hand(tmp_path, signals, number):
    """Long before a checkpoint is due; what goes on is the uninterrupted run, bit for bit."""
    whole = trainer(tmp_path / "whole", checkpoint_every=100)
    whole.run()
    run = trainer(tmp_path / "cut", checkpoint_every=100)

    def images(update, count):
        if update == 1:
            os.kill(os.getpid(), number)
        return noise(update, count)

    run.images = images
    with pytest.raises(Interrupted, match="update 2 is saved in") as caught:
        run.run()
    assert caught.value.exit_code == 128 + number
    again = trainer(tmp_path / "cut", checkpoint_every=100)
    again.run()
    a, b = whole.vae.state_dict(), again.vae.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Real photographs, one of them broken."""
    found = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        pixels = getattr(photographs, name)()
        Image.fromarray(pixels).save(found / f"{name}.png")
    Image.fromarray(photographs.camera()).save(found / "camera.png")
    (found / "broken.png").write_bytes(b"no image")
    return found


def test_photographs_in_three_phases_from_the_command_line(folder, tmp_path, capsys):
    deep_autoencoder().save_pretrained(tmp_path / "start")
    where, results = tmp_path / "start", {}
    for phase, resolution in (("reconstruct", 64), ("latent", 96), ("refine", 64)):
        out = tmp_path / phase
        arguments = ["autoencoder", f"--autoencoder={where}", f"--images={folder}"]
        arguments += [f"--output_dir={out}", f"--phase={phase}", f"--resolution={resolution}"]
        arguments += ["--num_updates=25", "--batch_size=4", "--mixed_precision=no"]
        arguments += ["--from_scratch"] if phase == "reconstruct" else []
        assert cli.main([*arguments, "--learning_rate=4e-3", "--json"]) == 0
        results[phase] = json.loads(capsys.readouterr().out.splitlines()[-1])
        where = out
    assert results["reconstruct"]["after"]["psnr"] > results["reconstruct"]["before"]["psnr"] + 2
    assert results["latent"]["after"]["psnr"] > results["latent"]["before"]["psnr"] - 1
    vae = AutoencoderDC.from_pretrained(where)
    assert (
        LatentCodec(vae).scale
        == LatentCodec(AutoencoderDC.from_pretrained(tmp_path / "latent")).scale
    )
    assert cli.main([*arguments, "--learning_rate=4e-3"]) == 2
    assert "holds a finished autoencoder already" in capsys.readouterr().err


def test_bad_input_is_one_line(folder, tmp_path, capsys):
    autoencoder().save_pretrained(tmp_path / "kl")
    assert AutoencoderKL.from_pretrained(tmp_path / "kl") is not None
    base = ["autoencoder", f"--autoencoder={tmp_path / 'kl'}", f"--output_dir={tmp_path / 'out'}"]
    (tmp_path / "empty").mkdir()
    for extra, message in (
        (["--images=/nowhere"], "--images: /nowhere is no folder"),
        ([f"--images={tmp_path / 'empty'}"], "0 readable images"),
        ([f"--images={folder}", "--resolution=33"], "--resolution: must be a multiple of 2"),
        ([f"--images={folder}", "--phase=finish"], "--phase: unknown value 'finish'"),
        (["--num_updates=0"], "--num_updates must be at least 1"),
        (["--learning_rate=inf"], "--learning_rate must be finite"),
    ):
        assert cli.main([*base, *extra]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
