"""Our rollouts against the stock pipelines, image for image."""

import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxPipeline

from diffalign.pipelines import flux
from diffalign.pipelines.sampling import EmbedCache, generate

PROMPTS = ["a photo of a red circle", "a photo of two blue squares", "zebra 漢字 ?!"]


def stock(model, *, generator, **kwargs):
    images = model.pipeline(
        PROMPTS,
        height=tiny.SIZE,
        width=tiny.SIZE,
        num_inference_steps=4,
        max_sequence_length=16,
        generator=generator,
        output_type="np",
        **kwargs,
    ).images
    return (images * 255).round().astype("uint8")


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_rollout_equals_stock_pipeline(model, guidance_scale):
    expected = stock(
        model, generator=torch.Generator().manual_seed(3), guidance_scale=guidance_scale
    )
    actual = tiny.rollout(
        model, PROMPTS, generator=torch.Generator().manual_seed(3), guidance_scale=guidance_scale
    )
    assert expected.std() > 5  # not a flat image that would equal anything
    np.testing.assert_array_equal(actual, expected)


def test_rollout_with_a_generator_an_image_equals_stock_pipeline(model):
    seeds = [11, 12, 13]
    expected = stock(
        model, generator=[torch.Generator().manual_seed(s) for s in seeds], guidance_scale=1.0
    )
    for micro_batch_size in (1, 2, 64):
        _, images = generate(
            model,
            EmbedCache(model)(PROMPTS),
            torch.arange(3),
            seeds,
            num_inference_steps=4,
            guidance_scale=1.0,
            micro_batch_size=micro_batch_size,
            mixed_precision="no",
        )
        difference = np.abs(images.permute(0, 2, 3, 1).numpy().astype(int) - expected.astype(int))
        assert difference.max() <= 1  # batch shape changes the last float bit, and so rounding


def test_embeddings_equal_stock_pipeline(model):
    embeds = model.encode_prompt(PROMPTS)
    if model.family == "sd3":
        expected, _, pooled, _ = model.pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=16
        )
    else:
        expected, pooled, _ = model.pipeline.encode_prompt(PROMPTS, None, max_sequence_length=16)
    torch.testing.assert_close(embeds.prompt_embeds, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embeds.pooled_prompt_embeds, pooled, rtol=1e-5, atol=1e-5)


def test_embed_cache_returns_what_the_encoder_returns_and_encodes_once(model):
    calls = []
    encode = model.encode_prompt
    model.encode_prompt = lambda texts: calls.append(list(texts)) or encode(texts)
    cache = EmbedCache(model)
    embeds = cache([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    cache([PROMPTS[1]])
    assert calls == [PROMPTS[:2]]
    torch.testing.assert_close(embeds.prompt_embeds[0], embeds.prompt_embeds[2], rtol=0, atol=0)
    torch.testing.assert_close(
        embeds.prompt_embeds, encode([*PROMPTS[:2], PROMPTS[0]]).prompt_embeds
    )


def test_embed_cache_forgets_the_oldest(model):
    cache = EmbedCache(model, size=2)
    for text in ("a", "b", "c"):
        cache([text])
    assert list(cache._store) == ["b", "c"]


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 16, 6, 10)])
def test_packing_and_ids_equal_flux_pipeline(shape):
    b, c, h, w = shape
    latents = torch.randn(shape)
    packed = flux.pack_latents(latents)
    torch.testing.assert_close(
        packed, FluxPipeline._pack_latents(latents, b, c, h, w), rtol=0, atol=0
    )
    torch.testing.assert_close(flux.unpack_latents(packed, h, w), latents, rtol=0, atol=0)
    ids = FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32)
    torch.testing.assert_close(flux.image_ids(h, w, "cpu", torch.float32), ids, rtol=0, atol=0)


def test_flux_guidance_reaches_the_denoiser():
    model = tiny.flux_model()
    seen = {}
    model.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    latents, times = torch.randn(2, 4, 8, 8), torch.tensor([100.0, 900.0])
    with torch.no_grad():
        model.predict(latents, times, model.encode_prompt(PROMPTS[:2]))
        assert seen["guidance"].tolist() == [3.5, 3.5]
        model.predict(latents, times, model.encode_prompt(PROMPTS[:2]), guidance_scale=1.5)
    assert seen["guidance"].tolist() == [1.5, 1.5]
    torch.testing.assert_close(seen["timestep"], times / 1000)


def test_guidance_without_negative_embeddings_is_refused(sd3):
    with pytest.raises(ValueError, match="negative_embeds"):
        sd3.predict(
            torch.randn(1, 4, 8, 8),
            torch.tensor([500.0]),
            sd3.encode_prompt(["a"]),
            guidance_scale=3.0,
        )


@pytest.mark.parametrize(("height", "width"), [(17, 16), (16, 0), (-16, 16), (16, 18)])
def test_impossible_resolution_names_the_nearest(model, height, width):
    with pytest.raises(ValueError, match=r"multiples of 4 pixels.*nearest is"):
        model.latent_shape(height, width)


def test_decode_and_encode_are_scaled_like_the_pipeline(model):
    images = torch.randint(0, 256, (2, 3, tiny.SIZE, tiny.SIZE), dtype=torch.uint8)
    latents = model.encode(images)
    vae = model.pipeline.vae
    pixels = model.pipeline.image_processor.preprocess(images.float() / 255)
    expected = (vae.encode(pixels).latent_dist.mode() - 0.1) * 1.3
    torch.testing.assert_close(latents, expected)
    decoded = model.pipeline.vae.decode(latents / 1.3 + 0.1).sample
    stock_image = model.pipeline.image_processor.postprocess(decoded.detach(), output_type="np")
    np.testing.assert_array_equal(
        model.decode(latents).permute(0, 2, 3, 1).numpy(),
        (stock_image * 255).round().astype("uint8"),
    )
