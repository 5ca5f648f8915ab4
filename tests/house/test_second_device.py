"""Everything that has a device, on one that is not the CPU; and the rules of that device."""

import copy
import json

import numpy as np
import pytest
import test_distillation
import test_preference_run
import test_tuning
import tiny
import tiny_moves
import tiny_pairs
import tiny_runs
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from second_device import CUDA, SecondDevice, is_on

from benchmarks.awm import phases as awm_phases
from diffalign import cli
from diffalign.config import load
from diffalign.data.prompts import Prompt
from diffalign.evaluation.scoring import BackgroundScorer
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampler import Sampler
from diffalign.quantization.apply import quantize_model, quantize_pipeline
from diffalign.quantization.integer import IntegerLinear
from diffalign.quantization.layers import PackSpec
from diffalign.quantization.packed import packable
from diffalign.rewards import preprocessing
from diffalign.rewards.clip import ClipScorer
from diffalign.rewards.composition import CompositeReward
from diffalign.schedulers import QSched
from diffalign.tuning.allocation import choose_bits
from diffalign.tuning.calibration import Calibration
from diffalign.tuning.scales import Trajectories, tune_scales
from diffalign.tuning.tune import Settings, tune


@pytest.fixture
def cuda():
    caches = (ClipScorer.from_pretrained, preprocessing._bands)  # of what lies on a device
    for cache in caches:
        cache.cache_clear()
    with SecondDevice():
        yield CUDA
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def everywhere(cuda, monkeypatch):
    """Trainers and models of the tests are on the second device."""
    monkeypatch.setattr(Accelerator, "device", CUDA)
    for families in (tiny.MODELS, tiny_pairs.FAMILIES, test_distillation.MODELS):
        for name, build in list(families.items()):
            monkeypatch.setitem(families, name, lambda build=build: build().to(CUDA))


class TestSecondDevice:
    def test_devices_are_not_mixed(self, cuda):
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.device == cuda
        assert there.is_cuda
        assert here.device.type == "cpu"
        for wrong in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: torch.where(here > 0, there, there),
            lambda: torch.stack([there.sum(), here.sum()]),
            lambda: here * there.sum(),
            lambda: here.add_(there),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()

    def test_what_cuda_allows(self, cuda):
        there = torch.arange(6.0, device=cuda).view(2, 3)
        assert (there * torch.tensor(2.0)).is_cuda
        assert there[torch.tensor([1])].is_cuda
        assert there[torch.tensor([True, False])].is_cuda
        there[0] = torch.ones(3)
        here = torch.zeros(2, 3).copy_(there)
        assert here.device.type == "cpu"
        assert here[0].tolist() == [1, 1, 1]
        assert float(there.sum()) == 15
        assert there.tolist()[1] == [3, 4, 5]

    def test_an_index_there_of_a_tensor_here(self, cuda):
        with pytest.raises(RuntimeError, match="indices should be"):
            torch.zeros(3)[torch.tensor([1], device=cuda)]

    def test_no_numpy(self, cuda):
        there = torch.ones(3, device=cuda)
        for wrong in (there.numpy, lambda: np.asarray(there)):
            with pytest.raises(TypeError, match="cpu"):
                wrong()
        assert there.cpu().numpy().sum() == 3

    def test_generators(self, cuda):
        generator = torch.Generator().manual_seed(0)
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device=cuda, generator=generator)
        with pytest.raises(RuntimeError, match="generator"):
            torch.empty(3, device=cuda).normal_(generator=generator)

    def test_factories_follow(self, cuda):
        there = torch.ones(3, device=cuda)
        made = [torch.zeros_like(there), there.new_tensor([1.0]), copy.deepcopy(there)]
        made += [there.new_zeros(2), torch.as_tensor(np.ones(2), device=cuda), there.double()]
        made += [torch.ones(3).to(there), torch.ones(3).cuda(), there.to("cuda")]
        assert all(m.is_cuda for m in made)
        assert not torch.zeros_like(there, device="cpu").is_cuda
        assert not torch.as_tensor(there, device="cpu").is_cuda
        assert there.is_cuda
        with torch.device("cuda"):
            assert torch.zeros(2).is_cuda

    def test_training(self, cuda):
        def losses(device):
            torch.manual_seed(0)
            layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)).to(device)
            optimizer = torch.optim.AdamW(layer.parameters())
            x = torch.randn(5, 3).to(device)
            found = []
            for _ in range(3):
                loss = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
            assert all(is_on(p) == (device != "cpu") for p in layer.parameters())
            return found

        assert losses(cuda) == losses("cpu")

    def test_gradients_go_home(self, cuda):
        here = torch.ones(3, requires_grad=True)
        (here.to(cuda) * torch.ones(3, device=cuda)).sum().backward()
        assert here.grad.device.type == "cpu"
        there = torch.ones(3, device=cuda, requires_grad=True)
        there.cpu().sum().backward()
        assert there.grad.is_cuda
        with pytest.raises(RuntimeError, match="device"):
            there.grad = torch.ones(3)

    def test_threads_and_autocast_are_there(self, cuda):
        def product(images, prompts, metadata):
            with torch.autocast("cuda", torch.bfloat16):
                found = images.to(cuda) @ torch.ones(2, 2, device=cuda)
            assert found.is_cuda
            assert found.dtype == torch.bfloat16
            return found.numpy()

        with pytest.raises(TypeError, match="cpu"):
            BackgroundScorer(product)(torch.ones(2, 2), [], [])


# --- training


ONLINE = {
    "awm": ("sd3", {"training": {"updates_per_rollout": 2}}),
    "awm of groups": (
        "flux",
        {
            "algorithm": {"noise": "group", "kl_beta": 0.1, "ema_kl_beta": 0.1},
            "rollout": {"merge_lora": True, "solver": "adams_bashforth"},
            "training": {"mixed_precision": "bf16"},
            "model": {"gradient_checkpointing": True},
        },
    ),
    "awm of the rollout's noise": (
        "sd3",
        {
            "algorithm": {
                "noise": "rollout",
                "timestep_stop": 0.5,
                "reference_guidance_scale": 2.0,
                "kl_beta": 0.1,
            },
            "rollout": {"guidance_scale": 3.0, "num_inference_steps": 6},
        },
    ),
    "diffusion_nft": (
        "sana",
        {"algorithm": {"type": "diffusion_nft", "timesteps_per_image": 2, "kl_beta": 0.1}},
    ),
    "flow_grpo": ("flux", {"algorithm": {"type": "flow_grpo", "kl_beta": 0.1, "guard": True}}),
    "flow_grpo of cps": ("sd3", {"algorithm": {"type": "flow_grpo", "dynamics": "cps"}}),
}


@pytest.mark.parametrize("name", ONLINE)
def test_online_updates_are_those_of_the_cpu(name, tmp_path, request):
    family, groups = ONLINE[name]
    here = tiny_runs.trainer(tmp_path / "cpu", family=family, **groups).train_update()
    request.getfixturevalue("everywhere")
    there = tiny_runs.trainer(tmp_path / "cuda", family=family, **groups)
    row = there.train_update()
    exact = groups.get("training", {}).get("mixed_precision") != "bf16"
    for key in ("reward", "diversity", "grad_norm", "kept"):
        assert row[key] == pytest.approx(here[key], rel=1e-3 if exact else 0.1, abs=1e-4)
    there.save()
    saved = {k: v.cpu() for k, v in there.model.denoiser.state_dict().items()}
    assert there.train_update()["update"] == 2
    assert there.resume()
    for key, value in there.model.denoiser.state_dict().items():
        assert value.is_cuda
        assert torch.equal(value.cpu(), saved[key])
    assert there.train_update()["update"] == 2
    there.export(tmp_path)
    assert load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")


@pytest.mark.slow
def test_pairs(everywhere, tmp_path):
    """Encoded, inverted, trained on, and drawn in between, all by the command."""
    source = tiny_pairs.write_pairs(tmp_path / "pairs", 8)
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("a photo of a red square\n")
    tiny.sdxl_pipeline().save_pretrained(tmp_path / "base")
    folder = tmp_path / "run"
    assert test_preference_run.train(tmp_path / "base", source, held_out, folder) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["device"] == "a second device"
    assert summary["failed_rewards"] == {"jpeg": 0}


@pytest.mark.parametrize("algorithm", [{"variant": "figure"}, {"type": "diffusion_dpo"}])
def test_other_losses_on_pairs(algorithm, everywhere, tmp_path):
    source = tiny_pairs.write_pairs(tmp_path / "pairs", 8)
    trainer = tiny_pairs.trainer(source, tmp_path, "flux", algorithm=algorithm)
    assert trainer.train_update()["update"] == 1


@pytest.mark.parametrize("method", test_distillation.METHODS)
def test_students(method, everywhere, tmp_path):
    trainer = test_distillation.trainer(
        tmp_path, "sd" if method == "lcm" else "flux", algorithm=test_distillation.METHODS[method]
    )
    assert [trainer.train_update()["update"] for _ in range(2)] == [1, 2]
    trainer.save()
    assert trainer.resume()


def test_moves(everywhere, tmp_path):
    images = tiny_moves.image_folder(tmp_path / "images")
    tiny_moves.deep_autoencoder().save_pretrained(tmp_path / "autoencoder")
    trainer = tiny_moves.trainer(
        tmp_path / "run",
        images,
        tmp_path / "autoencoder",
        latents={"noise_aware": True, "shift": "signal"},
    )
    trainer.prepare()
    assert trainer.train_update()["update"] == 1
    trainer.save()
    assert trainer.resume()
    assert trainer.validate()
    trainer.export(tmp_path / "out")


# --- drawing and what surrounds it


def test_the_command_draws_and_rewards_load(cuda, tmp_path):
    tiny.sd3_pipeline().save_pretrained(tmp_path / "base")
    flags = [f"--model={tmp_path / 'base'}", "--num_inference_steps=2", "--dtype=float32"]
    assert cli.main(["generate", "a cat", *flags, f"--output_dir={tmp_path / 'images'}"]) == 0
    reward = CompositeReward.from_config({"shapes_clip": 1.0, "jpeg": 1.0, "verifier": 1.0})
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    reward.prepare()
    output = reward.score(
        images,
        ["a photo of a red square"] * 2,
        [{"tag": "single_object", "include": [{"class": "square", "count": 1}]}] * 2,
    )
    assert output.mask.all()
    assert reward.rewards["shapes_clip"].scorer.model.device == cuda


@pytest.mark.parametrize("family", sorted(tiny_pairs.FAMILIES))
def test_every_family_draws(family, everywhere):
    model = tiny_pairs.FAMILIES[family]()
    prompts = ["a photo of a red square", "two"]
    samples = Sampler(model, Drawing(2, 2.0)).images(prompts, [1, 2])
    assert samples.latents.is_cuda
    assert not samples.images.is_cuda
    assert model.encode(samples.images.to(CUDA)).is_cuda


@pytest.mark.parametrize(("backend", "options"), [("int8", {}), ("int4", {"svd_rank": 2})])
def test_adapters_over_packed_weights(backend, options, everywhere, tmp_path, monkeypatch):
    model = tiny.MODELS["sd3"]()
    quantize_pipeline(model.pipeline, backend, min_weights=64, **options)
    monkeypatch.setitem(tiny.MODELS, "sd3", lambda: model)
    trainer = tiny_runs.trainer(tmp_path)
    assert trainer.train_update()["grad_norm"] > 0


def test_integer_products(cuda):
    plain = torch.nn.Linear(64, 16).to(cuda)
    layer = IntegerLinear(plain, PackSpec(8, None, activation_steps=1))
    layer.fill(plain.weight, name="layer")
    layer.calibrate(torch.tensor([4 / 127]))
    x = torch.randn(2, 12, 64).to(cuda)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_products_by_token(cuda, bits):
    plain = torch.nn.Linear(64, 16).to(cuda)
    layer = IntegerLinear(plain, PackSpec(bits, None, token_scales=True))
    layer.fill(plain.weight, name="layer")
    x = torch.randn(2, 12, 64).to(cuda)
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, layer.dequantize(), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("family", ["flux", "sd"])
@pytest.mark.slow
def test_rounding_by_moments_and_tuned_scales(everywhere, family):
    model = {**tiny.MODELS, **tiny.UNETS}[family]().to(CUDA)
    prompts = [Prompt(f"a photo of {n} circles", {}) for n in range(9)]
    calibration = Calibration(model, prompts, Drawing(2, mixed_precision="no"))
    trajectories = Trajectories.record(calibration)
    moments = list(calibration.moments(min_weights=64))
    assert all(is_on(m.second) for part in moments for m in part.values())
    layers = packable(model.denoiser, min_weights=64)
    bits = choose_bits(layers, moments, trajectories, bits_per_weight=3.9, group_size=32)
    options = {"group_size": 32, "min_weights": 64, "moments": moments, "bits": bits}
    quantize_model(model.denoiser, "mixed", **options)
    tune_scales(trajectories, steps=2)
    assert all(is_on(p) for p in model.denoiser.parameters())


def test_factors_of_a_schedule_are_found(everywhere, tmp_path):
    """The closed form reads a step's coefficients off a scheduler whose sigmas are on the device."""
    model, reference = tiny.MODELS["flux"](), tiny.MODELS["flux"]()
    model.denoiser.register_forward_hook(lambda module, args, out: (out[0] * 0.8,))
    found = tune(
        model,
        test_tuning.PROMPTS,
        test_tuning.brightness,
        Settings({"spread": 1.0}, engine="cma", budget=4),
        test_tuning.drawing(),
        reference=reference,
        file=tmp_path / "scores.jsonl",
    )
    found.apply(model.pipeline)
    assert isinstance(model.pipeline.scheduler, QSched)


def test_phases_of_an_update(everywhere, tmp_path):
    config = load(
        awm_phases.RECIPES["sd3.5-medium"],
        [f"--rollout.{side}={tiny.SIZE}" for side in ("height", "width")]
        + ["--rollout.micro_batch_size=4", "--lora.rank=4", f"--output_dir={tmp_path}"],
    )
    trainer = awm_phases.make_trainer(tiny.MODELS["sd3"](), config)
    for phase in awm_phases.phases(trainer).values():
        found = awm_phases._timed(trainer, phase, repeats=1)
        assert found["seconds"]["median"] > 0
        assert set(found) > {"peak_bytes", "added_bytes"}
