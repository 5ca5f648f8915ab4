"""Codecs: pixels to tokens and back, what identifies them, and manifests that hold to it."""

import pytest
import tiny
import torch
from diffusers import FluxPipeline
from tiny_moves import deep_autoencoder

from diffalign.latents.codec import CodecError, LatentCodec, compression, pack, position_ids, unpack


@pytest.mark.parametrize("patch_size", [1, 2])
def test_unpacking_undoes_packing(patch_size):
    """C7."""
    latents = torch.randn(2, 3, 4, 6)
    tokens = pack(latents, patch_size)
    assert tokens.shape == (2, 24 // patch_size**2, 3 * patch_size**2)
    assert torch.equal(unpack(tokens, patch_size, height=4, width=6), latents)


def test_a_patch_is_ordered_as_a_convolution_reads_it():
    latents = torch.randn(2, 3, 4, 6)
    layer = torch.nn.Conv2d(3, 5, 2, 2, bias=False)
    found = pack(latents, 2) @ layer.weight.flatten(1).T
    torch.testing.assert_close(found, layer(latents).flatten(2).transpose(1, 2))


def test_ids_are_those_of_flux():
    expected = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    assert torch.equal(position_ids(3, 5), expected)


def test_a_codec_of_either_kind():
    deep = LatentCodec(deep_autoencoder())
    assert (deep.compression, deep.channels, deep.pixels_per_token) == (8, 8, 8)
    flux = tiny.flux_model().codec
    assert (flux.compression, flux.channels, flux.patch_size, flux.pixels_per_token) == (2, 4, 2, 4)
    assert flux.token_channels == 16
    for codec in (deep, flux):
        images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
        latents = codec.encode(images)
        side = 16 // codec.compression
        assert tuple(latents.shape) == (2, codec.channels, side, side)
        decoded = codec.decode(latents)
        assert decoded.shape == images.shape
        assert decoded.dtype == torch.uint8
        with torch.no_grad():
            pixels = codec.vae.decode(latents / codec.scale + codec.shift).sample
        wanted = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        assert torch.equal(decoded, wanted)


def test_scaled_latents_have_unit_power():
    """A8, on the autoencoder that ships."""
    import numpy as np

    from diffalign.pipelines.moving import load_autoencoder
    from diffalign.shapes.autoencoder import random_images

    codec = LatentCodec(load_autoencoder("shapes-dc", dtype=torch.float32))
    images = torch.from_numpy(random_images(np.random.default_rng(8), 512)).permute(0, 3, 1, 2)
    assert float(codec.encode(images).square().mean()) == pytest.approx(1, abs=0.05)


def test_identity_is_that_of_the_weights():
    first, other = LatentCodec(deep_autoencoder(0)), LatentCodec(deep_autoencoder(1))
    assert first.identity == LatentCodec(deep_autoencoder(0)).identity != other.identity
    assert compression(first.vae) == 8


def test_what_was_told_of_a_codec_holds_to_its_autoencoder():
    """C10."""
    codec = LatentCodec(deep_autoencoder())
    told = codec.to_dict()
    codec.check(told, where="runs/a")
    with pytest.raises(CodecError, match="runs/a was trained with another autoencoder: identity"):
        LatentCodec(deep_autoencoder(1)).check(told, where="runs/a")
    with pytest.raises(CodecError, match="scale was 1.1, and is 1.2"):
        LatentCodec(deep_autoencoder(scale=1.2)).check(told, where="runs/a")
