"""Pixels to latents and back as the stock pipelines do it, whatever an autoencoder's configuration sets."""

from dataclasses import dataclass

import numpy as np
import pytest
import tiny
import tiny_moves
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionXLImg2ImgPipeline

from diffalign.latents.codec import CodecError
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.moving import move_model
from diffalign.pipelines.registry import MODELS, load_model
from diffalign.pipelines.sampling import Sampling
from diffalign.scripts.shapes.autoencoder import fold_shift
from diffalign.shapes import CHECKPOINTS

EVERYTHING = {
    "scaling_factor": 0.5,
    "shift_factor": 0.37,
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    "force_upcast": True,
}
"""Of an autoencoder; statistics as Playground v2.5 has them."""
PROMPTS = ["a photo of a red circle", "a photo of two blue squares"]
SHIFTED = ("sd3", "flux", "z_image")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Stock:
    """A family's stock images, and how it is called besides."""

    model: object
    options: dict

    def images(self, *, seed: int, output_type: str = "np"):
        height, width = self.model.default_size
        none = {"z_image": 0.0}.get(self.model.family, 1.0)
        return self.model.pipeline(
            prompt=list(PROMPTS),
            height=height,
            width=width,
            num_inference_steps=2,
            guidance_scale=none,
            generator=torch.Generator().manual_seed(seed),
            output_type=output_type,
            **self.options,
        ).images


def deep(family):
    """Moved into an autoencoder of KL's kind, of 8 pixels a token, that has a shift."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    return move_model(tiny.MODELS[family](), vae, size=(32, 32))


MAKERS = {
    **tiny.MODELS,
    **tiny.UNETS,
    "flux moved": lambda: deep("flux"),
    "sd3 moved": lambda: deep("sd3"),
    "sana moved": lambda: deep("sana"),
}


def stock_of(name: str, dtype: torch.dtype) -> Stock:
    model = MAKERS[name]()
    if name in tiny.UNETS:  # the stock SDXL pipeline looks for the layout's convolutions
        model.pipeline.register_modules(vae=fold_shift(model.pipeline.vae))
    model.pipeline.vae.register_to_config(**EVERYTHING)
    model.pipeline.to(dtype)
    options = {} if name in tiny.UNETS else {"max_sequence_length": 16}
    if name.startswith("sana"):
        options["use_resolution_binning"] = False
    return Stock(model, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_decoded_images_equal_the_stock_pipelines(name, dtype):
    stock = stock_of(name, dtype)
    expected = (stock.images(seed=3) * 255).round().astype("uint8")
    batch = Sampling(stock.model, stock.model.encode_prompt(PROMPTS), Drawing(2, 1.0))
    latents = batch.draw(torch.Generator().manual_seed(3))
    decoded = stock.model.decode(latents).permute(0, 2, 3, 1).numpy()
    assert expected.std() > 2
    np.testing.assert_array_equal(decoded, expected)
    assert stock.model.pipeline.vae.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_encoding_undoes_the_stock_pipelines_affine(name, dtype):
    """What each stock class makes of raw latents before it decodes them, solved for the latents."""
    model = stock_of(name, dtype).model
    vae = model.pipeline.vae
    images = torch.randint(0, 256, (2, 3, *model.default_size), dtype=torch.uint8)
    upcast = name == "sdxl" and dtype != torch.float32
    vae.to(torch.float32 if upcast else dtype)
    frames = "z_dim" in vae.config
    with torch.no_grad():
        pixels = (images.float() / 127.5 - 1).to(vae.dtype)
        encoded = vae.encode(pixels.unsqueeze(2) if frames else pixels)
    vae.to(dtype)
    raw = (encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()).to(dtype)
    scale = EVERYTHING["scaling_factor"]
    family = name.split()[0]
    if frames:
        mean, std = (
            torch.tensor(EVERYTHING[f"latents_{k}"]).view(1, -1, 1, 1).to(dtype)
            for k in ("mean", "std")
        )
        expected = (raw.squeeze(2) - mean) / std
    elif family == "sdxl":
        mean, std = (
            torch.tensor(EVERYTHING[f"latents_{k}"]).view(1, -1, 1, 1).to(dtype)
            for k in ("mean", "std")
        )
        expected = (raw - mean) * scale / std
    elif family == "flux2":
        expected = model.pipeline._encode_vae_image((images.float() / 127.5 - 1).to(dtype), None)
    else:
        expected = (raw - (EVERYTHING["shift_factor"] if family in SHIFTED else 0)) * scale
    torch.testing.assert_close(model.encode(images), expected, rtol=0, atol=0)
    assert vae.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_sdxl_encodes_as_its_image_to_image_pipeline(dtype):
    model = stock_of("sdxl", dtype).model
    parts = {k: v for k, v in model.pipeline.components.items() if k != "watermark"}
    other = StableDiffusionXLImg2ImgPipeline(**parts)
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    expected = other.prepare_latents(
        (images.float() / 127.5 - 1).to(dtype),
        torch.tensor([0]),
        1,
        1,
        dtype,
        "cpu",
        torch.Generator().manual_seed(0),
        add_noise=False,
    )
    posterior_std = 0.05  # the stock pipeline draws from the posterior
    model.pipeline.vae.to(dtype)
    assert (model.encode(images) - expected).abs().max() < 6 * posterior_std


@pytest.mark.parametrize("name", [n for n, s in MODELS.items() if s.source.startswith("package:")])
def test_shipped_models_draw_what_stock_draws(name):
    """From the folder as plain diffusers loads it."""
    source = str(CHECKPOINTS / name)
    pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    model = load_model(name, dtype=torch.float32)
    tokens = {} if "unet" in pipeline.components else {"max_sequence_length": 16}
    expected = pipeline(
        PROMPTS,
        **tokens,
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    batch = Sampling(model, model.encode_prompt(PROMPTS), Drawing(2, 1.0))
    latents = batch.draw(torch.Generator().manual_seed(0))
    decoded = model.decode(latents).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(decoded, (expected * 255).round().astype("uint8"))


def test_a_manifest_tells_of_statistics():
    codec = stock_of("sdxl", torch.float32).model.codec
    told = codec.to_dict()
    assert told["mean"] == EVERYTHING["latents_mean"]
    codec.check(told, where="runs/a")
    with pytest.raises(CodecError, match="mean was None"):
        codec.check({k: v for k, v in told.items() if k != "mean"}, where="runs/a")
    assert "mean" not in tiny_moves.deep_autoencoder().config
