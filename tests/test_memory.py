"""The memory forecast against what a real step keeps."""

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffalign import lora
from diffalign.config import load
from diffalign.pipelines.registry import load_meta_model
from diffalign.precision import compute
from diffalign.training.memory import forecast, saved_bytes, size_of

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
FAMILIES = {**tiny.MODELS, **tiny.UNETS}


@pytest.fixture(scope="module", params=["sd3", "flux", "sana", "sd", "sdxl"])
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = FAMILIES[request.param]()
    model.pipeline.to(torch.bfloat16)
    model.pipeline.save_pretrained(folder)
    return request.param, folder, model


def configuration(folder, *more):
    side = 32 if folder.name.startswith("sana") else 16
    return load(
        None,
        [
            f"--model.name={folder}",
            "--model.max_sequence_length=16",
            "--lora.rank=4",
            "--lora.alpha=8",
            f"--rollout.height={side}",
            f"--rollout.width={side}",
            "--training.micro_batch_size=8",
            "--algorithm.timesteps_per_image=2",
            *more,
        ],
    )


@pytest.mark.parametrize("mixed_precision", ["bf16", "no"])
def test_forecast_agrees_with_a_real_step(family, mixed_precision):
    kind, folder, _ = family
    config = configuration(folder, f"--training.mixed_precision={mixed_precision}")
    found = forecast(load_meta_model(str(folder), max_sequence_length=16), config)

    model = FAMILIES[kind]()
    model.pipeline.to(torch.bfloat16)
    assert found.denoiser == size_of(model.denoiser)
    assert found.autoencoder == size_of(model.pipeline.vae)
    everything = [c for c in model.pipeline.components.values() if isinstance(c, torch.nn.Module)]
    assert found.denoiser + found.text_encoders + found.autoencoder == sum(map(size_of, everything))
    parameters = lora.attach(model.denoiser, rank=4, alpha=8, targets=model.lora_targets)
    trained = sum(p.numel() * p.element_size() for p in parameters)
    assert found.adapters == found.optimizer == 3 * trained

    if mixed_precision == "bf16":
        lora.keep_input_dtype(model.denoiser)

    embeds = model.encode_prompt(["a cat"] * 16)
    assert model.prompt_shape() == (
        *embeds.prompt_embeds.shape[1:],
        0 if embeds.pooled_prompt_embeds is None else embeds.pooled_prompt_embeds.shape[1],
    )
    latents, times = torch.randn(16, 4, 8, 8).bfloat16(), torch.full((16,), 500.0)

    def step():
        with compute("cpu", mixed_precision), sdpa_kernel(FUSED):
            return model.predict(latents, times, embeds).float().square().mean()

    measured = saved_bytes(model.denoiser, step)
    assert found.activations == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("kind", FAMILIES)
def test_adapters_that_share_their_input_keep_less_and_compute_the_same(kind):
    model = FAMILIES[kind]()
    model.pipeline.to(torch.bfloat16)
    lora.attach(model.denoiser, rank=4, alpha=8, targets=model.lora_targets)
    embeds = model.encode_prompt(["a cat"] * 2)
    latents, times = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0)
    found = []

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model.predict(latents, times, embeds))
        return found[-1]

    apart = saved_bytes(model.denoiser, forward)
    lora.keep_input_dtype(model.denoiser)
    assert saved_bytes(model.denoiser, forward) < 0.95 * apart
    assert torch.equal(*found)


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing(family):
    _, folder, _ = family
    sizes = {}
    for name, more in {
        "one": ["--training.micro_batch_size=4"],
        "two": ["--training.micro_batch_size=8"],
        "checkpointed": ["--model.gradient_checkpointing=true"],
    }.items():
        model = load_meta_model(str(folder), max_sequence_length=16)
        sizes[name] = forecast(model, configuration(folder, *more)).activations
    assert sizes["two"] == pytest.approx(2 * sizes["one"], rel=0.1)
    assert sizes["checkpointed"] < sizes["two"]


def test_printed(family):
    _, folder, _ = family
    text = str(
        forecast(load_meta_model(str(folder), max_sequence_length=16), configuration(folder))
    )
    assert text.startswith("memory forecast, GiB for a process: 0.0")
    assert "activations" in text
