"""The modes: an image skips by its own step what an accelerated pipeline would skip of it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_engine import SMALL, Client, plain, psnr, serve, wanted

from diffalign.acceleration.apply import ATTRIBUTE, accelerate, restore
from diffalign.core.errors import UsageError
from diffalign.serving.engine import Engine, EngineSettings
from diffalign.serving.modes import Mode, _check_together, prepare
from diffalign.serving.tickets import PLAIN, Ticket

STEPS = 10
OPTIONS = {
    "sizes": ((SMALL, SMALL),),
    "steps": STEPS,
    "check": 0,
    "compile": False,
    "attention": False,
    "cache": 20.0,
}


def accelerated_images(model, images, **options):
    accelerate(model.pipeline, "balanced", **OPTIONS, **options)
    try:
        return [plain(model, w) for w in images]
    finally:
        restore(model.pipeline)


@pytest.mark.parametrize(
    ("family", "guidance"),
    [("sd3", "interval"), ("sd3", "reuse"), ("flux", False)],
)
def test_a_mode_skips_what_the_accelerated_pipeline_skips(family, guidance):
    model, scale = tiny.MODELS[family](), 3.0
    images = [
        wanted(
            1, seed=i, num_inference_steps=STEPS, guidance_scale=scale, size=(SMALL, SMALL),
            prompt=f"image {i}", mode="balanced",
        )
        for i in range(3)
    ]  # fmt: skip
    options = {"guidance": guidance, "arguments": {"guidance_scale": scale}}
    expected = accelerated_images(model, images, **options)
    modes, reports = prepare(model.pipeline, ("balanced",), **OPTIONS, **options)
    assert [m.name for m in modes] == ["balanced", PLAIN]
    assert not hasattr(model.pipeline, ATTRIBUTE)
    assert reports[0].applied["cache"]
    engine = Engine(model, EngineSettings(deterministic=True), modes=modes)
    clients = serve(engine, images[:2], late=images[2:])
    assert all(c.result.skipped > 0 for c in clients)
    for client, image in zip(clients, expected, strict=True):
        assert torch.equal(client.result.image, image)


def test_other_steps_and_the_plain_mode_compute_everything():
    model = tiny.sd3_model()
    modes, _ = prepare(model.pipeline, ("balanced",), **OPTIONS)
    engine = Engine(model, EngineSettings(deterministic=True), modes=modes)
    same = {"size": (SMALL, SMALL), "guidance_scale": None}
    images = [
        wanted(0, num_inference_steps=STEPS, **same),
        wanted(1, num_inference_steps=STEPS - 1, mode="balanced", **same),
    ]
    for client, image in zip(serve(engine, images), images, strict=True):
        assert client.result.skipped == 0
        assert torch.equal(client.result.image, plain(model, image))


def test_an_image_that_was_given_up_leaves_no_trace():
    model = tiny.sd3_model()
    modes, _ = prepare(model.pipeline, ("balanced",), **OPTIONS)
    engine = Engine(model, EngineSettings(max_batch=1, deterministic=True), modes=modes)
    image = wanted(
        1, num_inference_steps=STEPS, mode="balanced", size=(SMALL, SMALL), guidance_scale=None
    )
    (before,) = serve(engine, [image])
    given_up = Ticket(wanted(2, num_inference_steps=STEPS, mode="balanced"), Client())
    engine.submit([given_up])
    for _ in range(5):
        engine.round()
    given_up.cancel("disconnect")
    (after,) = serve(engine, [image])
    assert torch.equal(before.result.image, after.result.image)


def test_the_cache_knows_the_sign_of_a_denoiser():
    model = tiny.MODELS["z_image"]()
    modes, _ = prepare(model.pipeline, ("balanced",), **OPTIONS)
    image = wanted(1, num_inference_steps=STEPS, guidance_scale=None, mode="balanced")
    image = replace(image, size=(SMALL, SMALL))
    (client,) = serve(Engine(model, modes=modes), [image])
    assert client.result.skipped > 0
    assert psnr(client.result.image, plain(model, image)) > 20


def test_presets_of_different_weights_are_refused():
    reports = [
        SimpleNamespace(preset="lossless", applied={}),
        SimpleNamespace(preset="small", applied={"quantize": "int4"}),
    ]
    with pytest.raises(UsageError, match=r"preset=lossless,small: one of them quantises"):
        _check_together(reports)
    with pytest.raises(UsageError, match="balanced"):
        prepare(tiny.sd3_pipeline(), ("balancd",))


def test_guidance_without_a_negative_prediction_is_the_positive_one():
    assert not Mode("x", guidance="interval").guides(0, 10)
    assert Mode("x", guidance="interval").guides(5, 10)
    assert [Mode("x", guidance="reuse").guides(i, 4) for i in range(4)] == [True, False] * 2
    assert all(Mode().guides(i, 4) for i in range(4))
