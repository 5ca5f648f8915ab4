"""SD1.5 and SDXL against the stock pipelines, image for image, under several schedulers."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

from diffalign import lora
from diffalign.core.errors import UsageError
from diffalign.diffusion.paths import VariancePreserving
from diffalign.pipelines.solvers import solver_step

PROMPTS = ["a photo of a red circle", "a photo of two blue squares", "zebra ?!"]
SCHEDULERS = (DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler)


@pytest.fixture(params=sorted(tiny.UNETS))
def unet(request):
    return tiny.UNETS[request.param]()


def stock(model, *, generator, guidance_scale):
    images = model.pipeline(
        PROMPTS,
        height=tiny.SIZE,
        width=tiny.SIZE,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        generator=generator,
        output_type="np",
    ).images
    return (images * 255).round().astype("uint8")


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_images_equal_the_stock_pipelines(unet, scheduler, guidance_scale):
    unet.pipeline.scheduler = scheduler.from_config(unet.pipeline.scheduler.config)
    expected = stock(
        unet, generator=torch.Generator().manual_seed(3), guidance_scale=guidance_scale
    )
    found = tiny.rollout(
        unet, PROMPTS, generator=torch.Generator().manual_seed(3), guidance_scale=guidance_scale
    )
    assert expected.std() > 5
    np.testing.assert_array_equal(found, expected)


def test_the_path_is_the_schedulers(unet):
    assert isinstance(unet.noise, VariancePreserving)
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    times = torch.tensor([10, 500, 990])
    ddim = DDIMScheduler.from_config(unet.pipeline.scheduler.config)
    torch.testing.assert_close(
        unet.noise.add_noise(latents, noise, times), ddim.add_noise(latents, noise, times)
    )


def test_sizes_and_shapes(unet):
    assert unet.default_size == (tiny.SIZE, tiny.SIZE)
    assert unet.latent_shape((16, 24)) == (4, 8, 12)
    with pytest.raises(UsageError, match="multiples of 2 pixels"):
        unet.latent_shape((17, 16))
    embeds = unet.encode_prompt(PROMPTS)
    tokens, width, pooled = unet.prompt_shape()
    assert embeds.prompt_embeds.shape == (3, tokens, width)
    assert (embeds.pooled_prompt_embeds is None) == (pooled == 0)


def test_sdxl_knows_crops_and_the_empty_prompt():
    model = tiny.sdxl_model()
    embeds = model.encode_prompt(["", "a"])
    assert embeds.prompt_embeds[0].abs().max() == embeds.pooled_prompt_embeds[0].abs().max() == 0
    assert embeds.prompt_embeds[1].abs().max() > 0
    latents, times = torch.randn(2, 4, 8, 8), torch.tensor([100, 900])
    with torch.no_grad():
        plain = model.forward(latents, times, embeds)
        same = replace(embeds, time_ids=torch.tensor([[16, 16, 0, 0, 16, 16]]).expand(2, -1))
        torch.testing.assert_close(model.forward(latents, times, same), plain)
        cropped = replace(embeds, time_ids=torch.tensor([[64, 48, 8, 4, 16, 16]]).expand(2, -1))
        assert (model.forward(latents, times, cropped) - plain).abs().max() > 1e-4


def test_a_lora_of_ours_loads_into_the_stock_pipeline(unet, tmp_path):
    parameters = lora.attach(unet.denoiser, rank=2, alpha=6.0, targets=unet.lora_targets, seed=0)
    with torch.no_grad():
        for p in parameters:
            p.normal_(0, 0.3)
    latents, times = torch.randn(3, 4, 8, 8), torch.tensor([100, 500, 900])
    embeds = unet.encode_prompt(PROMPTS)
    with torch.no_grad(), lora.policy(unet.denoiser, lora.CURRENT):
        expected = unet.predict(latents, times, embeds)
    lora.export_lora(unet.denoiser, unet.pipeline, tmp_path)
    other = type(unet)(
        getattr(tiny, f"{unet.family}_pipeline")(), default_size=(tiny.SIZE, tiny.SIZE)
    )
    with torch.no_grad():
        base = other.predict(latents, times, embeds)
    lora.load_lora(other.pipeline, str(tmp_path))
    with torch.no_grad():
        found = other.predict(latents, times, embeds)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - base).abs().max() > 1e-2


def test_solvers_for_flows_are_refused(unet):
    with pytest.raises(UsageError, match="rectified flows"):
        solver_step("adams_bashforth", unet.noise)
