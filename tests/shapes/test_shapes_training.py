"""How the shipped denoisers are trained: resumable, and guidance distilled into its embedding."""

import numpy as np
import pytest
import tiny
import torch

from diffalign.core.errors import UsageError
from diffalign.pipelines.flux import FluxModel
from diffalign.pipelines.sd3 import SD3Model
from diffalign.scripts.shapes.denoiser import Captioned, PretrainConfig, Pretraining
from diffalign.scripts.shapes.guidance import GuidanceDistillation

TEXTS = ["", "a photo of a red square", "a photo of two blue circles"]


def model_of(kind):
    pipeline = tiny.flux_pipeline() if kind is FluxModel else tiny.sd3_pipeline()
    return kind(pipeline, max_sequence_length=16)


def dataset(model, n=8):
    generator = torch.Generator().manual_seed(3)
    short = model.encode_prompt(TEXTS)
    model.max_sequence_length = 32
    long = model.encode_prompt(TEXTS)
    model.max_sequence_length = 16
    shape = model.latent_shape((tiny.SIZE, tiny.SIZE))
    rows = torch.arange(n) % 2 + 1
    latents = torch.randn(n, *shape, generator=generator)
    side = tiny.SIZE // model.pixels_per_token
    maps = torch.randint(6, (n, 2, side * side), generator=generator).byte()
    return Captioned(latents, rows, short, long, maps)


def config(**kwargs):
    return PretrainConfig(**{"steps": 40, "batch_size": 4, "warmup": 1, "compile": False, **kwargs})


@pytest.mark.parametrize("kind", [SD3Model, FluxModel])
def test_pretraining_resumes_bit_for_bit(kind, tmp_path):
    states = []
    for parts in ([4], [2, 2]):
        folder = tmp_path / str(len(parts))
        for updates in parts:
            model = model_of(kind)
            run = Pretraining(model, config(), folder)
            run.resume()
            data = dataset(model)
            for _ in range(updates):
                run.update(data)
            run.save()
        states.append(run.denoiser.state_dict() | {f"ema.{k}": v for k, v in run.ema.items()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_student_is_its_teacher_at_guidance_one(tmp_path):
    run = GuidanceDistillation(model_of(FluxModel), config(), tmp_path)
    latents, noise, timesteps, embeds, guidance = run.batch(dataset(run.model))
    assert len(embeds) == 2 * len(latents)
    assert ((guidance >= 1) & (guidance <= 6)).all()
    ones = torch.ones_like(guidance)
    assert run._loss(latents, noise, timesteps, embeds, ones).item() < 1e-10
    assert run._loss(latents, noise, timesteps, embeds, guidance).item() > 1e-8


def test_guidance_is_distilled_and_the_teacher_stays(tmp_path):
    run = GuidanceDistillation(model_of(FluxModel), config(prompt_dropout=0.0), tmp_path)
    data = dataset(run.model)
    teacher = {k: v.clone() for k, v in run.teacher.denoiser.state_dict().items()}
    losses = [run.update(data) for _ in range(40)]
    assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:8])
    assert all(torch.equal(v, teacher[k]) for k, v in run.teacher.denoiser.state_dict().items())
    assert run.model.pipeline.transformer is not run.teacher.pipeline.transformer


def test_a_family_without_guidance_embedding_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no guidance embedding"):
        GuidanceDistillation(model_of(SD3Model), config(), tmp_path)
