"""The engine: an image is the same alone or in company, whatever happens to its neighbours."""

import threading

import numpy as np
import pytest
import tiny
import torch
from diffusers import LCMScheduler

from diffalign.core.errors import UsageError
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampler import Sampler
from diffalign.serving.engine import Closing, Engine, EngineSettings, QueueFull
from diffalign.serving.observer import Observer
from diffalign.serving.row import Row
from diffalign.serving.tickets import Failed, Finished, ImageSettings, Partial, Ticket

FAMILIES = {**tiny.MODELS, **tiny.UNETS}
SMALL = 16
PROMPTS = ("a red circle", "two blue squares left of a green triangle", "", "a photo of a star")
LEAST = 50.0


class Client:
    """Listener that keeps every report of one image."""

    def __init__(self):
        self.reports = []

    def __call__(self, report):
        self.reports.append(report)

    @property
    def result(self):
        return self.reports[-1] if self.reports else None


def wanted(i, *, side=SMALL, **changes):
    """Return settings that differ from those of other images in everything that may differ."""
    values = {
        "prompt": PROMPTS[i % len(PROMPTS)],
        "seed": 100 + i,
        "size": (side, side if i % 3 else 2 * side),
        "num_inference_steps": 3 + i % 3,
        "guidance_scale": (None, 2.0, 4.5)[i % 3],
    }
    return ImageSettings(**{**values, **changes})


def plain(model, image):
    """Return the image that the sampler draws alone."""
    drawing = Drawing(
        image.num_inference_steps,
        image.guidance_scale,
        image.size,
        negative_prompt=image.negative_prompt,
        mixed_precision="no",
    )
    return Sampler(model, drawing).images([image.prompt], [image.seed]).images[0]


def serve(engine, images, *, late=()):
    """Draw images, of which the late ones join after the second round; return the clients."""
    clients = [Client() for _ in (*images, *late)]
    tickets = [Ticket(w, c) for w, c in zip((*images, *late), clients, strict=True)]
    engine.submit(tickets[: len(images)])
    engine.round()
    engine.round()
    if late:
        engine.submit(tickets[len(images) :])
    while engine.queued or engine.running:
        engine.round()
    return clients


def psnr(one, other):
    error = ((one.double() - other.double()) ** 2).mean().item()
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_alone_or_in_company_is_the_samplers(family):
    model = FAMILIES[family]()
    # SANA makes multiples of 32 pixels
    side = 32 if family == "sana" else SMALL
    images = [wanted(i, side=side) for i in range(4)]
    late = [wanted(i, side=side) for i in range(4, 7)]
    expected = [plain(model, w) for w in (*images, *late)]
    exact = Engine(model, EngineSettings(deterministic=True))
    for client, image in zip(serve(exact, images, late=late), expected, strict=True):
        assert torch.equal(client.result.image, image)
    shared = Engine(model, EngineSettings(max_batch=8))
    for client, image in zip(serve(shared, images, late=late), expected, strict=True):
        assert psnr(client.result.image, image) >= LEAST


def test_noise_in_every_step_is_the_rows_own():
    model = tiny.sd_model()
    model.pipeline.scheduler = LCMScheduler.from_config(model.pipeline.scheduler.config)
    images = [wanted(i, guidance_scale=None) for i in range(5)]
    expected = [plain(model, w) for w in images]
    clients = serve(Engine(model, EngineSettings(deterministic=True)), images)
    assert all(torch.equal(c.result.image, e) for c, e in zip(clients, expected, strict=True))


def test_padding_to_buckets_leaves_images_alone():
    model = tiny.sd3_model()
    images = [wanted(1, seed=i, size=(SMALL, SMALL)) for i in range(3)]
    engine = Engine(model, EngineSettings(max_batch=4, buckets=(1, 4)))
    assert [engine.batches.padded(n) for n in (1, 2, 3, 4)] == [1, 4, 4, 4]
    for client, image in zip(serve(engine, images), [plain(model, w) for w in images], strict=True):
        assert psnr(client.result.image, image) >= LEAST


def test_images_at_different_steps_share_a_forward():
    class Rows(Observer):
        seen = []

        def forward(self, rows):
            self.seen.append(rows)

    same = {"size": (SMALL, SMALL), "guidance_scale": 2.0, "num_inference_steps": 4}
    engine = Engine(tiny.sd3_model(), observer=(observer := Rows()))
    serve(engine, [wanted(0, **same)], late=[wanted(1, **same), wanted(2, **same)])
    # two rounds alone, two in company, and two after the first image is done
    assert observer.seen == [1, 1, 3, 3, 2, 2]


def test_an_image_joins_at_the_next_step():
    clients = serve(Engine(tiny.sd3_model()), [wanted(1)], late=[wanted(2)])
    assert [c.result.rounds for c in clients] == [0, 0]


def test_partial_images_come_before_the_finished_one():
    model = tiny.sd3_model()
    image = wanted(1, num_inference_steps=4, partial_images=3)
    (client,) = serve(Engine(model, EngineSettings(deterministic=True)), [image])
    *parts, result = client.reports
    assert [p.index for p in parts] == [0, 1, 2]
    assert all(isinstance(p, Partial) and p.image.shape == result.image.shape for p in parts)
    assert torch.equal(result.image, plain(model, image))
    # the prediction of the last step is the image itself, and the one before it is nearer than the first
    distances = [(p.image.float() - result.image.float()).abs().mean() for p in parts]
    assert distances[2] < distances[0]


def test_a_cancelled_or_late_image_leaves_within_one_step_and_touches_no_other():
    model = tiny.sd3_model()
    images = [wanted(1, seed=i, num_inference_steps=4, size=(SMALL, SMALL)) for i in range(3)]
    clients = [Client() for _ in images]
    tickets = [Ticket(w, c) for w, c in zip(images, clients, strict=True)]
    engine = Engine(model, EngineSettings(deterministic=True))
    engine.submit(tickets)
    engine.round()
    tickets[0].cancel("disconnect")
    tickets[1].deadline = 0.0
    engine.round()
    assert engine.running == 1
    while engine.running:
        engine.round()
    assert clients[0].reports == []
    assert clients[1].result.cause == "deadline"
    assert torch.equal(clients[2].result.image, plain(model, images[2]))


def test_the_queue_takes_all_images_of_a_request_or_none():
    engine = Engine(tiny.sd3_model(), EngineSettings(max_batch=1, queue=2))
    tickets = [Ticket(wanted(i), Client()) for i in range(4)]
    engine.submit(tickets[:2])
    with pytest.raises(QueueFull) as full:
        engine.submit(tickets[2:])
    assert full.value.seconds >= 1
    assert engine.queued == 2


def test_a_forward_without_memory_is_halved_once(monkeypatch):
    class Exhausted(Observer):
        times = 0

        def out_of_memory(self):
            self.times += 1

    model = tiny.sd3_model()
    forward = model.forward

    def scarce(latents, timesteps, embeds):
        if len(latents) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(latents, timesteps, embeds)

    images = [wanted(1, seed=i, size=(SMALL, SMALL)) for i in range(4)]
    expected = [plain(model, w) for w in images]
    monkeypatch.setattr(model, "forward", scarce)
    engine = Engine(model, observer=(observer := Exhausted()))
    clients = serve(engine, images)
    assert observer.times == 1
    assert engine.batches.limit == 2
    for client, image in zip(clients, expected, strict=True):
        assert psnr(client.result.image, image) >= LEAST


def test_a_step_without_memory_fails_its_image_and_no_other_takes_a_step_twice(monkeypatch):
    model = tiny.sd3_model()
    images = [wanted(1, seed=i, size=(SMALL, SMALL)) for i in range(4)]
    expected = [plain(model, w) for w in images]
    finish = Row.finish

    def scarce(row, *predictions):
        if row.ticket.settings == images[2]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finish(row, *predictions)

    monkeypatch.setattr(Row, "finish", scarce)
    clients = serve(Engine(model), images)
    assert clients[2].result.cause == "memory"
    for i in (0, 1, 3):
        assert psnr(clients[i].result.image, expected[i]) >= LEAST


def test_an_error_of_one_image_fails_that_image_only(monkeypatch):
    model = tiny.sd3_model()
    engine = Engine(model)
    clients = serve(engine, [wanted(1), wanted(1, size=(17, 17)), wanted(2)])
    assert isinstance(clients[1].result, Failed)
    assert clients[1].result.cause == "usage"
    assert all(isinstance(clients[i].result, Finished) for i in (0, 2))
    monkeypatch.setattr(model, "decode_checked", lambda x: (x, torch.tensor([False])))
    (client,) = serve(engine, [wanted(1)])
    assert client.result.cause == "not_finite"


def test_a_thread_draws_and_drains():
    model = tiny.sd3_model()
    engine = Engine(model, EngineSettings(max_batch=2, deterministic=True, max_wait=0.001))
    images = [wanted(i) for i in range(5)]
    done = threading.Semaphore(0)
    results = {}

    def listener(i):
        def listen(report):
            results[i] = report
            done.release()

        return listen

    engine.start()
    engine.submit([Ticket(w, listener(i)) for i, w in enumerate(images)])
    engine.close()
    assert not engine.is_alive
    assert all(torch.equal(results[i].image, plain(model, w)) for i, w in enumerate(images))
    with pytest.raises(Closing):
        engine.submit([Ticket(images[0], Client())])


def test_warm_up_refuses_a_size_that_cannot_be_drawn():
    engine = Engine(tiny.sd3_model())
    engine.warm_up([(SMALL, SMALL)], guidance_scale=2.0)
    with pytest.raises(UsageError, match=r"sizes: 17x17"):
        engine.warm_up([(17, 17)])
