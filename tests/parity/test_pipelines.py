"""Our rollouts against the stock pipelines, image for image."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxPipeline

from diffalign.latents import codec
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampler import Sampler
from diffalign.pipelines.sampling import EmbedCache, Sampling
from diffalign.pipelines.sana import INSTRUCTION

PROMPTS = ["a photo of a red circle", "a photo of two blue squares", "zebra 漢字 ?!"]


def stock(model, *, generator, **kwargs):
    height, width = model.default_size
    if model.family == "sana":
        kwargs["use_resolution_binning"] = False
    if model.family == "z_image":
        kwargs["guidance_scale"] -= 1
    if model.family == "qwen_image":
        kwargs["true_cfg_scale"] = kwargs.pop("guidance_scale")
        kwargs["negative_prompt"] = [""] * len(PROMPTS)
    images = model.pipeline(
        # Z-Image's pipeline changes a list of prompts
        prompt=list(PROMPTS),
        height=height,
        width=width,
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
        drawing = Drawing(4, 1.0, micro_batch_size=micro_batch_size, mixed_precision="no")
        images = Sampler(model, drawing).images(PROMPTS, seeds).images
        difference = np.abs(images.permute(0, 2, 3, 1).numpy().astype(int) - expected.astype(int))
        assert difference.max() <= 1  # batch shape changes the last float bit, and so rounding


def test_embeddings_equal_stock_pipeline(model):
    embeds = model.encode_prompt(PROMPTS)
    pooled = mask = None
    if model.family == "sana":
        expected, mask, _, _ = model.pipeline.encode_prompt(
            PROMPTS, False, max_sequence_length=16, complex_human_instruction=INSTRUCTION.default
        )
    elif model.family == "sd3":
        expected, _, pooled, _ = model.pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=16
        )
    elif model.family == "qwen_image":
        expected, mask = model.pipeline.encode_prompt(PROMPTS, max_sequence_length=16)
        # the pipeline leaves out a mask that excludes nothing
        mask = torch.ones(expected.shape[:2], dtype=torch.long) if mask is None else mask
    elif model.family == "z_image":
        rows, _ = model.pipeline.encode_prompt(list(PROMPTS), max_sequence_length=16)
        expected = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        masks = [torch.ones(len(row)) for row in rows]
        mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    elif model.family == "flux2":
        expected, _ = model.pipeline.encode_prompt(PROMPTS, max_sequence_length=16)
    else:
        expected, pooled, _ = model.pipeline.encode_prompt(PROMPTS, None, max_sequence_length=16)
    torch.testing.assert_close(embeds.prompt_embeds, expected, rtol=1e-5, atol=1e-5)
    assert (embeds.pooled_prompt_embeds is None) == (pooled is None)
    if pooled is not None:
        torch.testing.assert_close(embeds.pooled_prompt_embeds, pooled, rtol=1e-5, atol=1e-5)
    assert (embeds.prompt_attention_mask is None) == (mask is None)
    if mask is not None:
        torch.testing.assert_close(embeds.prompt_attention_mask, mask)


def test_embed_cache_returns_what_the_encoder_returns_and_encodes_once(model):
    calls = []
    encode = model.encode_prompt
    model.encode_prompt = lambda texts: calls.append(list(texts)) or encode(texts)
    cache = EmbedCache(model)
    embeds = cache([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    cache([PROMPTS[1]])
    assert calls == [[PROMPTS[0]], [PROMPTS[1]]], "alone: no prompt's bits depend on the others"
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
    packed = codec.pack(latents, 2)
    torch.testing.assert_close(
        packed, FluxPipeline._pack_latents(latents, b, c, h, w), rtol=0, atol=0
    )
    torch.testing.assert_close(codec.unpack(packed, 2, height=h, width=w), latents, rtol=0, atol=0)
    ids = FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32)
    torch.testing.assert_close(codec.position_ids(h // 2, w // 2), ids, rtol=0, atol=0)


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


def test_sana_is_guided_away_from_the_bare_empty_prompt():
    model = tiny.sana_model()
    _, _, expected, mask = model.pipeline.encode_prompt(
        PROMPTS, max_sequence_length=16, complex_human_instruction=INSTRUCTION.default
    )
    mixed = model.encode_prompt(["", PROMPTS[0], "", PROMPTS[1]])
    torch.testing.assert_close(mixed.prompt_embeds[[0, 2]], expected[:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed.prompt_attention_mask[[0, 2]], mask[:2])
    assert mask.sum(1).tolist() == [1, 1, 1]  # <bos>
    plain = model.encode_prompt(PROMPTS[:2])
    torch.testing.assert_close(
        mixed.prompt_embeds[[1, 3]], plain.prompt_embeds, rtol=1e-5, atol=1e-5
    )


def test_sana_reads_no_padding():
    model = tiny.sana_model()
    embeds = model.encode_prompt(["a red circle"])
    latents, times = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    padding = embeds.prompt_attention_mask[0] == 0
    assert 0 < padding.sum() < 16
    noise = torch.where(padding[:, None], torch.randn(16, 16), embeds.prompt_embeds[0])
    with torch.no_grad():
        plain = model.predict(latents, times, embeds)
        other = model.predict(latents, times, replace(embeds, prompt_embeds=noise[None]))
        unmasked = model.predict(latents, times, replace(embeds, prompt_attention_mask=None))
    torch.testing.assert_close(other, plain)
    assert (unmasked - plain).abs().max() > 1e-3


def test_sana_steps_in_float32_whatever_the_denoiser_is():
    model = tiny.sana_model()
    model.pipeline.to(torch.bfloat16)
    expected = model.pipeline(
        PROMPTS,
        height=32,
        width=32,
        num_inference_steps=4,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        use_resolution_binning=False,
    ).images
    negative = model.encode_prompt([""] * 3)
    batch = Sampling(model, model.encode_prompt(PROMPTS), Drawing(4, 4.5), negative)
    found = batch.draw(torch.Generator().manual_seed(3))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_guidance_without_negative_embeddings_is_refused(sd3):
    with pytest.raises(ValueError, match="negative_embeds"):
        sd3.predict(
            torch.randn(1, 4, 8, 8),
            torch.tensor([500.0]),
            sd3.encode_prompt(["a"]),
            guidance_scale=3.0,
        )


@pytest.mark.parametrize(("height", "width"), [(17, 32), (32, 0), (-32, 32), (32, 34)])
def test_impossible_resolution_names_the_nearest(model, height, width):
    step = {"sana": 32}.get(model.family, 4)
    with pytest.raises(ValueError, match=rf"multiples of {step} pixels.*nearest is"):
        model.latent_shape((height, width))


def stock_encoded(pipeline, pixels):
    """Return normalised latents as stock pipelines of image conditions make them, or by their formula."""
    vae = pipeline.vae
    if hasattr(vae, "bn"):
        return pipeline._encode_vae_image(pixels, None)
    if model_has_frames(vae):
        raw = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()
        return ((raw - by_channel(vae, "mean")) / by_channel(vae, "std")).squeeze(2)
    encoded = vae.encode(pixels)
    raw = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    return (raw - (vae.config.get("shift_factor") or 0)) * 1.3


def model_has_frames(vae):
    return "z_dim" in vae.config


def by_channel(vae, name):
    return torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1)


def stock_decoded(pipeline, latents):
    """Return pixels as the last lines of stock pipelines make them."""
    vae = pipeline.vae
    if model_has_frames(vae):
        raw = latents.unsqueeze(2) / (1 / by_channel(vae, "std")) + by_channel(vae, "mean")
        return vae.decode(raw).sample[:, :, 0]
    if hasattr(vae, "bn"):
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        raw = latents * std.view(1, -1, 1, 1) + vae.bn.running_mean.view(1, -1, 1, 1)
        return vae.decode(pipeline._unpatchify_latents(raw)).sample
    return vae.decode(latents / 1.3 + (vae.config.get("shift_factor") or 0)).sample


def test_decode_and_encode_are_scaled_like_the_pipeline(model):
    images = torch.randint(0, 256, (2, 3, *model.default_size), dtype=torch.uint8)
    latents = model.encode(images)
    pixels = model.pipeline.image_processor.preprocess(images.float() / 255)
    torch.testing.assert_close(latents, stock_encoded(model.pipeline, pixels))
    decoded = stock_decoded(model.pipeline, latents).detach()
    stock_image = model.pipeline.image_processor.postprocess(decoded, output_type="np")
    np.testing.assert_array_equal(
        model.decode(latents).permute(0, 2, 3, 1).numpy(),
        (stock_image * 255).round().astype("uint8"),
    )
