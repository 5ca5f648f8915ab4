"""LoRAs of a server: one folder, switched for each batch, and nothing outside of it."""

import pytest
import tiny
import torch
from test_engine import SMALL, plain, psnr, serve, wanted

from diffalign.core.errors import UsageError
from diffalign.lora.files import export_lora, load_lora
from diffalign.lora.policies import attach
from diffalign.serving.engine import Engine, EngineSettings
from diffalign.serving.loras import Loras
from diffalign.serving.observer import Observer


def save_lora(folder, *, rank, seed, strength=0.5):
    """Save a LoRA with random weights for the tiny SD3."""
    model = tiny.sd3_model()
    attach(model.denoiser, rank=rank, alpha=rank, targets=("attn.to_q", "attn.to_v"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.copy_(strength * torch.randn(parameter.shape, generator=generator))
    export_lora(model.denoiser, model.pipeline, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("loras")
    save_lora(place / "small", rank=4, seed=0)
    save_lora(place / "large", rank=16, seed=1)
    return place


def test_each_image_has_its_own_lora(folder):
    model = tiny.sd3_model()
    names = [None, "small", "large", None, "small"]
    same = {"size": (SMALL, SMALL), "guidance_scale": 2.0, "num_inference_steps": 4}
    images = [wanted(i, lora=name, **same) for i, name in enumerate(names)]
    expected = []
    for image in images:
        other = tiny.sd3_model()
        if image.lora:
            load_lora(other.pipeline, str(folder / image.lora))
        expected.append(plain(other, image))
    assert not torch.equal(plain(tiny.sd3_model(), images[1]), expected[1])
    loras = Loras(model, folder)
    assert loras.names == ["large", "small"]
    exact = Engine(model, EngineSettings(deterministic=True), loras=loras)
    for client, image in zip(serve(exact, images[:3], late=images[3:]), expected, strict=True):
        assert torch.equal(client.result.image, image)
    for client, image in zip(serve(Engine(model, loras=loras), images), expected, strict=True):
        assert psnr(client.result.image, image) >= 50


@pytest.mark.parametrize(("buckets", "drawn"), [((), [None]), ((1,), [None, "large", "small"])])
def test_the_warm_up_draws_each_lora_where_blocks_are_compiled(folder, buckets, drawn):
    class Seen(Observer):
        def __init__(self):
            self.loras = []

        def finished(self, settings, image):
            self.loras.append(settings.lora)

    model = tiny.sd3_model()
    settings = EngineSettings(max_batch=1, buckets=buckets)
    engine = Engine(model, settings, loras=Loras(model, folder), observer=(observer := Seen()))
    engine.warm_up([(SMALL, SMALL)])
    assert observer.loras == drawn


def test_only_names_of_the_folder_are_known(folder):
    loras = Loras(tiny.sd3_model(), folder)
    for name in ("smal", "../small", str(folder / "small"), "", "small/../large"):
        with pytest.raises(UsageError, match="no such LoRA"):
            loras.check(name)
    loras.check("small")


def test_a_link_out_of_the_folder_is_no_lora(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder / "small")
    with pytest.raises(UsageError, match="holds no LoRA"):
        Loras(tiny.sd3_model(), tmp_path)


def test_loras_that_cannot_be_served_are_refused(tmp_path, folder):
    with pytest.raises(UsageError, match="no such folder"):
        Loras(tiny.sd3_model(), tmp_path / "nothing")
    with pytest.raises(UsageError, match="another model"):
        Loras(tiny.flux_model(), folder)
    save_lora(tmp_path / "zero", rank=4, seed=0, strength=0.0)
    with pytest.raises(UsageError, match="zero has no effect"):
        Loras(tiny.sd3_model(), tmp_path)
    model = tiny.sd3_model()
    load_lora(model.pipeline, str(folder / "small"))
    with pytest.raises(UsageError, match="carries a LoRA already"):
        Loras(model, folder)
