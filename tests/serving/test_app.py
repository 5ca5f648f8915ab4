"""The server over HTTP: OpenAI's own client, errors, limits, and hostile requests."""

import base64
import http.client
import io
import json
import random
import socket
import string
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
import tiny
import torch
from PIL import Image
from servers import running, until
from test_engine import SMALL, plain, wanted

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("prometheus_client", reason="the extra `server` is not installed")
openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")

from diffalign.serving.app import _Answers  # noqa: E402

PATH = "/v1/images/generations"
ORDINARY = {
    "prompt": "a red circle",
    "seed": 3,
    "num_inference_steps": 3,
    "size": f"{SMALL}x{SMALL}",
}


@pytest.fixture(scope="module")
def served():
    with running(tiny.sd3_model(), deterministic=True, ui=True) as (service, url):
        yield service, url


@pytest.fixture
def client(served):
    return openai.OpenAI(base_url=f"{served[1]}/v1", api_key="unused", max_retries=0)


def pixels(text):
    with Image.open(io.BytesIO(base64.b64decode(text))) as file:
        return torch.from_numpy(np.array(file)).permute(2, 0, 1)


def ask(url, **changes):
    return requests.post(url + PATH, json={**ORDINARY, **changes}, timeout=30)


def test_openais_client_gets_the_images_of_the_sampler(served, client):
    service, _ = served
    answer = client.images.generate(
        prompt="a red circle",
        model="tiny",
        n=2,
        size=f"{SMALL}x{SMALL}",
        extra_body={"seed": 7, "num_inference_steps": 3, "guidance_scale": 2.0},
    )
    assert (answer.size, answer.quality, answer.output_format) == ("16x16", "auto", "png")
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    for i, item in enumerate(answer.data):
        image = wanted(
            0, prompt="a red circle", seed=7 + i, num_inference_steps=3, guidance_scale=2.0,
            size=(SMALL, SMALL),
        )  # fmt: skip
        assert torch.equal(pixels(item.b64_json), plain(service.engine.model, image))


def test_openais_client_streams_partial_images(served, client):
    stream = client.images.generate(
        prompt="a red circle", stream=True, partial_images=2, extra_body={"seed": 7}
    )
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    once = client.images.generate(prompt="a red circle", extra_body={"seed": 7})
    assert events[-1].b64_json == once.data[0].b64_json
    assert events[-1].usage.output_tokens > 0


def test_the_engine_alone_uses_the_pipelines_tokenizer(served):
    service, _ = served
    # calls of a tokenizer change its padding, so that two threads must not share one
    own = _Answers(service)._tokenizer
    assert own is not service.engine.model.pipeline.tokenizer
    assert own.tokenize("a red circle") == service.engine.model.pipeline.tokenizer.tokenize(
        "a red circle"
    )


def test_formats_and_listings(served, client):
    for name in ("jpeg", "webp"):
        answer = client.images.generate(
            prompt="x", output_format=name, output_compression=50, extra_body={"seed": 1}
        )
        file = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
        assert file.format == name.upper()
    assert [m.id for m in client.models.list()] == ["models/tiny"]
    _, url = served
    for path in ("/health", "/ready", "/v1/loras", "/acceleration"):
        assert requests.get(url + path, timeout=10).status_code == 200


def test_metrics_count_and_hold_no_prompt(served):
    _, url = served
    assert ask(url, prompt="a very secret prompt").status_code == 200
    text = requests.get(url + "/metrics", timeout=10).text
    for name in (
        "diffalign_queue_depth",
        "diffalign_running",
        'diffalign_steps_total{kind="computed"}',
        'diffalign_latency_seconds_count{preset="plain",size="16x16"}',
        'diffalign_requests_total{status="200"}',
    ):
        assert name in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("changes", "param", "text"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": " \n"}, "prompt", "empty"),
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": "x" * 100_000}, "prompt", "at most 32000"),
        ({"prompt": ["x"]}, "prompt", "must be a text"),
        ({"prompt": "\ud800"}, "prompt", "Unicode"),
        ({"num_inference_step": 3}, "num_inference_step", "did you mean 'num_inference_steps'"),
        ({"num_inference_steps": -1}, "num_inference_steps", "from 1 to 200"),
        ({"num_inference_steps": 3.5}, "num_inference_steps", "from 1 to 200"),
        ({"num_inference_steps": True}, "num_inference_steps", "from 1 to 200"),
        ({"size": "17x16"}, "size", "nearest"),
        ({"size": "0x0"}, "size", "multiples"),
        ({"size": "99999x99999"}, "size", "pixels"),
        ({"size": "1024"}, "size", "WIDTHxHEIGHT"),
        ({"n": 11}, "n", "from 1 to 10"),
        ({"seed": -1}, "seed", "from 0"),
        ({"seed": 2**64}, "seed", "from 0"),
        ({"guidance_scale": "high"}, "guidance_scale", "0 to 100"),
        ({"guidance_scale": 10**400}, "guidance_scale", "0 to 100"),
        ({"negative_prompt": "blue"}, "negative_prompt", "no effect"),
        ({"quality": "low"}, "quality", "has not prepared the preset 'fast'"),
        ({"quality": "hgih"}, "quality", "did you mean 'high'"),
        ({"preset": "fast"}, "preset", "one of plain"),
        ({"lora": "../secret"}, "lora", "no such LoRA"),
        ({"lora": 3}, "lora", "name of a LoRA"),
        ({"partial_images": 2}, "partial_images", "needs `stream`"),
        ({"stream": True, "partial_images": 4}, "partial_images", "from 0 to 3"),
        ({"output_format": "gif"}, "output_format", "png, jpeg, webp"),
        ({"output_compression": 50}, "output_compression", "PNG has no"),
        ({"background": "transparent"}, "background", "auto, opaque"),
        ({"response_format": "url"}, "response_format", "base64"),
        ({"model": "gpt-image-1"}, "model", "models/tiny"),
        ({"style": "vivid"}, "style", "no field"),
    ],
)
def test_a_wrong_field_is_named(served, changes, param, text):
    answer = requests.post(
        served[1] + PATH,
        data=json.dumps({**ORDINARY, **changes}),
        headers={"content-type": "application/json"},
        timeout=30,
    )
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert error["param"] == param
    assert text in error["message"]
    assert len(error["message"]) < 400


def test_http_oddities_have_clear_answers(served):
    _, url = served
    json_type = {"content-type": "application/json"}
    for body, headers, status in (
        (b"{", json_type, 400),
        (b"[" * 100_000, json_type, 400),
        (b"null", json_type, 400),
        (b"\xff\xfe", json_type, 400),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}, 415),
        (b'{"prompt": "' + b"x" * 1_100_000, json_type, 413),
        (b"", json_type, 400),
    ):
        answer = requests.post(url + PATH, data=body, headers=headers, timeout=30)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    assert requests.get(url + PATH, timeout=10).status_code == 405
    assert requests.get(url + "/nothing", timeout=10).status_code == 404
    edits = requests.post(url + "/v1/images/edits", timeout=10)
    assert "does not edit" in edits.json()["error"]["message"]
    other = requests.get(url + "/v1/models", headers={"host": "evil.example"}, timeout=10)
    assert other.status_code == 421


def test_the_token_is_asked_for():
    with running(tiny.sd3_model(), token="right") as (_, url):
        assert requests.get(url + "/health", timeout=10).status_code == 200
        for header in ("Bearer wrong", "right", "Bearer right ", ""):
            answer = requests.get(url + "/v1/models", headers={"authorization": header}, timeout=10)
            # a blank at the end is no part of a header's value
            assert answer.status_code == (200 if header.strip() == "Bearer right" else 401)
        own = openai.OpenAI(base_url=f"{url}/v1", api_key="right", max_retries=0)
        assert own.images.generate(prompt="x", extra_body={"num_inference_steps": 1}).data
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").images.generate(prompt="x")


def test_a_full_queue_says_when_to_come_again_and_a_client_that_leaves_frees_its_row():
    with running(tiny.sd3_model(), max_batch=1, queue=1, max_steps=5000) as (service, url):
        endless = json.dumps({**ORDINARY, "num_inference_steps": 900, "n": 2}).encode()
        line = urlsplit(url)
        connection = http.client.HTTPConnection(line.hostname, line.port)
        connection.request("POST", PATH, endless, {"content-type": "application/json"})
        assert until(lambda: service.engine.running == 1)
        full = ask(url)
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "queue_full"
        connection.close()
        assert until(lambda: service.engine.running + service.engine.queued == 0)
        assert ask(url).status_code == 200
        assert 'cancelled_total{why="disconnect"}' in service.metrics.text().decode()


def test_a_client_that_leaves_its_stream_frees_its_row():
    with running(tiny.sd3_model(), max_batch=1, max_steps=5000) as (service, url):
        body = {**ORDINARY, "num_inference_steps": 900, "stream": True, "partial_images": 3}
        answer = requests.post(url + PATH, json=body, stream=True, timeout=60)
        assert b"partial_image" in next(answer.iter_lines())
        answer.close()
        assert until(lambda: service.engine.running == 0)


def test_an_image_that_takes_too_long_is_given_up():
    with running(tiny.sd3_model(), timeout=0.3, max_steps=5000) as (_, url):
        late = ask(url, num_inference_steps=900)
        assert late.status_code == 504
        assert late.headers["x-should-retry"] == "false"
        assert ask(url, num_inference_steps=1).status_code == 200


def test_a_server_that_is_stopped_finishes_its_images():
    with running(tiny.sd3_model(), max_batch=1) as (service, url):
        line = urlsplit(url)
        connection = http.client.HTTPConnection(line.hostname, line.port)
        body = json.dumps({**ORDINARY, "num_inference_steps": 60}).encode()
        connection.request("POST", PATH, body, {"content-type": "application/json"})
        assert until(lambda: service.engine.running == 1)
    answer = connection.getresponse()
    assert answer.status == 200
    assert json.loads(answer.read())["data"]


def test_fuzzed_requests_never_break_the_server(served):
    _, url = served
    dice = random.Random(0)
    line = urlsplit(url)
    for _ in range(150):
        body = fuzzed(dice)
        answer = requests.post(
            url + PATH, data=body, headers={"content-type": "application/json"}, timeout=30
        )
        assert answer.status_code in (200, 400, 404, 413)
    for _ in range(20):
        with socket.create_connection((line.hostname, line.port), timeout=5) as raw:
            raw.sendall(dice.randbytes(dice.randrange(1, 400)))
    assert ask(url).status_code == 200


def fuzzed(dice):
    """Return the bytes of a request with random fields and values, or of no JSON."""
    values = [
        None, True, -1, 0, 1, 2.5, 1e308, 2**70, "", "x", "16x16", "auto", "-1x-1", [], {}, [[1]],
        "".join(dice.choices(string.printable, k=20)), {"a": {"b": []}}, "\u0000", "é" * 50,
    ]  # fmt: skip
    names = [*ORDINARY, "n", "quality", "lora", "model", "stream", "partial_images", "preset", "x"]
    body = dict(ORDINARY) if dice.random() < 0.5 else {}
    body["num_inference_steps"] = 1
    for name in dice.sample(names, dice.randrange(1, 5)):
        body[name] = dice.choice(values)
    content = json.dumps(body).encode()
    if dice.random() < 0.2:
        content = content[: dice.randrange(len(content))] + dice.randbytes(3)
    return content
