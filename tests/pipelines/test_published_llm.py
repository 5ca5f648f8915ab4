"""Published configurations of FLUX.2, Z-Image and Qwen-Image on the meta device: sizes, targets, shapes, schedules."""

import pytest
import torch
from marks import slow

from diffalign import lora
from diffalign.pipelines.registry import load_meta_model
from diffalign.types import PromptEmbeds

NAMES = ("flux.2-klein-base-4b", "flux.2-klein-base-9b", "flux.2-dev", "z-image", "qwen-image")


@pytest.fixture(scope="module")
def models():
    return {name: load_meta_model(name) for name in NAMES}


# billions of parameters, as the makers publish them; those of text encoders are on their own pages
@pytest.mark.parametrize(
    ("name", "denoiser", "encoder"),
    [
        ("flux.2-klein-base-4b", 3.9, 4.0),
        ("flux.2-klein-base-9b", 9.1, 8.2),
        ("flux.2-dev", 32.2, 24.0),
        ("z-image", 6.2, 4.0),
        ("qwen-image", 20.4, 8.3),
    ],
)
def test_parameter_counts_are_the_published_ones(models, name, denoiser, encoder):
    parts = models[name].pipeline.components
    counts = [
        round(sum(p.numel() for p in parts[part].parameters()) / 1e9, 1)
        for part in ("transformer", "text_encoder")
    ]
    assert counts == [denoiser, encoder]


# of FLUX.2: 8 targets of joint blocks and 2 of single blocks; of Z-Image 4 in all of 30 + 2 + 2 blocks
@pytest.mark.parametrize(
    ("name", "matrices"),
    [
        ("flux.2-klein-base-4b", 5 * 8 + 20 * 2),
        ("flux.2-klein-base-9b", 8 * 8 + 24 * 2),
        slow("flux.2-dev", 8 * 8 + 48 * 2),
        ("z-image", 34 * 4),
        slow("qwen-image", 60 * 8),
    ],
)
def test_every_lora_target_resolves(name, matrices):
    model = load_meta_model(name)
    assert lora.unresolved(model.denoiser, model.lora_targets) == []
    with torch.device("meta"):
        parameters = lora.attach(
            model.denoiser, rank=32, alpha=64, targets=model.lora_targets, policies=()
        )
    assert len(parameters) == 2 * matrices


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("flux.2-klein-base-4b", (128, 32, 48), 7680),
        ("flux.2-klein-base-9b", (128, 32, 48), 12288),
        ("flux.2-dev", (128, 32, 48), 15360),
        ("z-image", (16, 64, 96), 2560),
        ("qwen-image", (16, 64, 96), 3584),
    ],
)
def test_a_forward_has_the_right_shape(models, name, shape, text):
    model = models[name]
    assert model.default_size == (1024, 1024)
    assert model.image_seq_len((1024, 1024)) == 4096
    assert model.latent_shape((512, 768)) == shape
    assert model.codec.channels == shape[0]
    assert model.prompt_shape()[1:] == (text, 0)
    with torch.device("meta"):
        embeds = PromptEmbeds(torch.zeros(2, 64, text, dtype=torch.bfloat16))
        noisy = torch.zeros(2, *shape, dtype=torch.bfloat16)
        assert model.forward(noisy, torch.zeros(2), embeds).shape == (2, *shape)


@pytest.mark.parametrize(
    ("name", "distilled"),
    [
        ("flux.2-klein-4b", True),
        ("flux.2-klein-base-4b", False),
        ("flux.2-dev", False),
        ("z-image-turbo", True),
        ("z-image", False),
    ],
)
def test_students_are_known(name, distilled):
    assert load_meta_model(name).is_distilled == distilled
