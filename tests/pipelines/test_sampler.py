"""One Drawing holds all sampling settings, and one Sampler draws with them."""

import logging
import shutil

import pytest
import tiny
import torch
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

from diffalign.core.errors import UsageError
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.registry import load_meta_model, load_model
from diffalign.pipelines.sampler import Sampler
from diffalign.quantization.apply import quantize_model
from diffalign.tuning import evaluator

PROMPTS = ["a red circle", "two blue squares"]


def latents(model, **settings):
    return Sampler(model, Drawing(2, mixed_precision="no", **settings)).images(PROMPTS, [1, 2])


def test_batches_cover_all_images():
    batches = list(Drawing(micro_batch_size=2).batches(5))
    assert [range(5)[b] for b in batches] == [range(2), range(2, 4), range(4, 5)]
    assert list(Drawing().batches(0)) == []


@pytest.mark.parametrize(
    "setting", ["num_inference_steps", "images_per_prompt", "micro_batch_size", "seed"]
)
def test_values_that_are_too_small_are_refused(setting):
    with pytest.raises(UsageError, match=f"{setting}=-1 is too small"):
        Drawing(**{setting: -1})


def test_one_drawing_serves_the_search_too():
    assert evaluator.Drawing is Drawing


def test_sides_that_are_not_given_are_the_models_own(sd3):
    own = sd3.default_size
    assert sd3.image_size(None) == sd3.image_size((None, None)) == own
    assert sd3.image_size((32, None)) == (32, own[1])
    assert latents(sd3, size=(32, None)).images.shape[2:] == (32, own[1])


def test_guidance_leads_away_from_the_negative_prompt(sd3):
    empty = latents(sd3, guidance_scale=4.0).latents
    assert torch.equal(empty, latents(sd3, guidance_scale=4.0, negative_prompt="").latents)
    other = latents(sd3, guidance_scale=4.0, negative_prompt="a blue square").latents
    assert not torch.allclose(empty, other, atol=1e-3)
    plain = latents(sd3, negative_prompt="a blue square").latents
    assert torch.equal(plain, latents(sd3).latents)


def test_guidance_that_is_embedded_needs_no_negatives():
    sampler = Sampler(tiny.flux_model(), Drawing(guidance_scale=4.0))
    assert sampler.negatives(2) is None
    assert Sampler(tiny.sd_model(), Drawing(guidance_scale=4.0)).negatives(2) is not None


def test_a_missing_component_is_named_once_when_it_loads(tmp_path, caplog):
    tiny.sd3_pipeline().save_pretrained(tmp_path)
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(tmp_path / part, ignore_errors=True)
    with caplog.at_level(logging.WARNING):
        load_meta_model(str(tmp_path))
        assert "used without" not in caplog.text
        load_model(str(tmp_path))
    assert caplog.text.count("no folder text_encoder_3; it is used without") == 1


def test_diffusers_is_patched_once_a_model_is_packed(monkeypatch):
    from diffalign.quantization import quantizer

    stock = staticmethod(quantizer._stock_module_shape)
    monkeypatch.setattr(FluxLoraLoaderMixin, "_calculate_module_shape", stock)
    model = tiny.flux_model()
    assert FluxLoraLoaderMixin._calculate_module_shape is quantizer._stock_module_shape
    quantize_model(model.denoiser, "int4", min_weights=64)
    assert FluxLoraLoaderMixin._calculate_module_shape is quantizer._module_shape
