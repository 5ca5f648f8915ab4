"""Rollouts of the other models of newer families against their stock pipelines, and what only these families have."""

import logging

import numpy as np
import pytest
import tiny
import tiny_llm
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline, compute_empirical_mu

from diffalign.pipelines.flux2 import Flux2Model, image_ids, text_ids
from diffalign.training.denoise import warn_of_student
from diffalign.types import PromptEmbeds

PROMPTS = ["a photo of a red circle", "a photo of two blue squares"]
KINDS = {
    "dev": tiny_llm.flux2_dev_pipeline,
    "distilled klein": lambda: tiny_llm.klein_pipeline(is_distilled=True),
}


@pytest.fixture(params=KINDS)
def flux2(request):
    return Flux2Model(KINDS[request.param](), max_sequence_length=16, default_size=(16, 16))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_images_of_every_kind_of_guidance_equal_the_stock_pipeline(flux2, guidance_scale):
    expected = flux2.pipeline(
        prompt=list(PROMPTS),
        height=16,
        width=16,
        num_inference_steps=4,
        max_sequence_length=16,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    assert not flux2.costs_a_forward(guidance_scale)
    actual = tiny.rollout(
        flux2, PROMPTS, generator=torch.Generator().manual_seed(3), guidance_scale=guidance_scale
    )
    np.testing.assert_array_equal(actual, (expected * 255).round().astype("uint8"))


def test_position_ids_are_the_stock_pipeline_s():
    latents, text = torch.zeros(1, 8, 3, 5), torch.zeros(1, 7, 4)
    expected = Flux2Pipeline._prepare_latent_ids(latents)[0].float()
    torch.testing.assert_close(image_ids(3, 5), expected)
    expected = Flux2Pipeline._prepare_text_ids(text)[0].float()
    torch.testing.assert_close(text_ids(7), expected)


def test_the_shift_depends_on_tokens_and_steps():
    model = tiny_llm.flux2_model()
    for steps, size in ((4, (16, 16)), (50, (64, 32))):
        tokens = size[0] * size[1] // 16
        assert model.mu(size, steps) == compute_empirical_mu(tokens, steps)


def test_a_shift_to_a_terminal_is_the_scheduler_s():
    """In the limit of many steps, whose last one is the terminal."""
    model = tiny_llm.qwen_image_model()
    scheduler = model.scheduler_at(1000, (16, 16))
    grid = torch.linspace(1, 1 / 1000, 1000)
    torch.testing.assert_close(
        model.shifted(grid, (16, 16)), scheduler.sigmas[:-1].cpu(), rtol=0, atol=2e-3
    )


def test_qwen_image_keeps_the_norms_of_tokens():
    model = tiny_llm.qwen_image_model()
    cond, uncond = torch.randn(2, 2, 4, 8, 8)
    guided = model.guided(uncond, cond, 4.0)
    norms = [x.unfold(2, 2, 2).unfold(3, 2, 2).square().sum((1, 4, 5)) for x in (guided, cond)]
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(model.guided(uncond, cond, 1.0), cond)


@pytest.mark.parametrize("family", ["z_image", "qwen_image"])
def test_padding_is_not_read(family):
    model = tiny_llm.MODELS[family]()
    model.max_sequence_length = 64
    short, long = (model.encode_prompt([text]) for text in ("a cat", PROMPTS[1]))
    assert short.lengths[0] < long.lengths[0]
    both = PromptEmbeds.cat([short, long])
    assert both.lengths == [*short.lengths, *long.lengths]
    noisy = torch.randn(2, *model.latent_shape((16, 16)))
    times = torch.tensor([300.0, 800.0])
    noise = torch.where(
        both.prompt_attention_mask[..., None] == 0, torch.randn(both.prompt_embeds.shape), 0.0
    )
    spoilt = PromptEmbeds(
        both.prompt_embeds + noise, prompt_attention_mask=both.prompt_attention_mask
    )
    with torch.no_grad():
        together = model.forward(noisy, times, spoilt)
        for i, alone in enumerate((short, long)):
            own = model.forward(noisy[i : i + 1], times[i : i + 1], alone)
            torch.testing.assert_close(together[i : i + 1], own, rtol=1e-4, atol=1e-4)


def test_texts_of_different_length_need_a_mask():
    with pytest.raises(ValueError, match="3 tokens cannot become 4 tokens long: they have no mask"):
        PromptEmbeds.cat([PromptEmbeds(torch.zeros(1, 3, 2)), PromptEmbeds(torch.zeros(1, 4, 2))])


@pytest.mark.parametrize("is_distilled", [True, False])
def test_training_a_distilled_model_warns(is_distilled, caplog):
    model = Flux2Model(tiny_llm.klein_pipeline(is_distilled=is_distilled))
    with caplog.at_level(logging.WARNING):
        warn_of_student(model, "klein")
    assert ("few-step student" in caplog.text) == is_distilled
