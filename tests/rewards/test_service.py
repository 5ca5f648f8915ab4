"""The reward service: a real server on loopback, what its client makes of its answers, and hostile requests."""

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from diffalign import cli
from diffalign.core.errors import UsageError
from diffalign.rewards import registry, remote, uploads, wire
from diffalign.rewards.base import Reward, RewardCard, RewardError
from diffalign.rewards.composition import CompositeReward
from diffalign.rewards.function import as_reward
from diffalign.rewards.jpeg import JpegReward
from diffalign.rewards.remote import RemoteReward
from diffalign.rewards.service import Limits, build_app
from diffalign.rewards.serving import read_timeout
from diffalign.rewards.uploads import Uploads
from diffalign.rewards.verifier import VerifierReward
from diffalign.shapes.prompts import prompts
from diffalign.shapes.world import render, sample_scene
from diffalign.types import RewardOutput
from diffalign.web import connections
from diffalign.web.admission import Refusal
from diffalign.web.connections import make_server
from diffalign.web.http import session_for


class Moody(Reward):
    """Raises for prompts that say so, sleeps for others until it is awake, else the red channel's mean."""

    card = RewardCard(
        name="moody", description="for tests", scale=0.5, offset=1.0, raw_range=(0, 255)
    )

    def __init__(self):
        super().__init__()
        self.awake = threading.Event()

    def score(self, images, prompts, metadata):
        for prompt in prompts:
            if prompt == "raise":
                raise RuntimeError("not this one")
            if prompt == "sleep":
                self.awake.wait(60)
        return RewardOutput(images[:, 0].float().mean((1, 2)).numpy())


@pytest.fixture
def serve():
    """Starts services; they end with the test."""
    running = []

    def start(rewards, **kwargs):
        # clients may connect before the server has started
        listening = socket.create_server(("127.0.0.1", 0))
        server = make_server(build_app(rewards, **kwargs))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(remote.PATIENCE, "first_wait", 0.01)
    monkeypatch.setattr(remote.PATIENCE, "retries", 2)


def scenes(n=6):
    rng = np.random.default_rng(0)
    entries = prompts("train")[::40][:n]
    pixels = np.stack([render(sample_scene(e, rng)) for e in entries])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), [e["prompt"] for e in entries], entries


def test_a_remote_reward_is_worth_what_it_is_worth_here(serve):
    url = serve({"verifier": VerifierReward(), "jpeg": JpegReward()})
    for name, here in (("verifier", VerifierReward()), ("jpeg", JpegReward())):
        there = registry.create(f"remote:{url}/{name}")
        there.prepare()
        expected, found = here.score(*scenes()), there.score(*scenes())
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-6)
        assert set(found.details) == set(expected.details)
        for key, value in expected.details.items():
            np.testing.assert_allclose(found.details[key], value, rtol=1e-6)
        assert there.card.scale == here.card.scale
        assert there.normalize(3.0) == here.normalize(3.0)


def test_a_reward_of_one_s_own_is_served(serve, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def red(images, prompts, metadata):\n    return images[:, 0].float().mean((1, 2))\n"
    )
    here = registry.create(f"{file}:red")
    there = RemoteReward(f"remote:{serve({'red': here})}/red")
    there.prepare()
    expected = here.score(*scenes(2)).values
    np.testing.assert_allclose(there.score(*scenes(2)).values, expected, rtol=1e-6)
    assert there.card.raw_range is None


def test_a_service_says_what_a_reward_returns_wrongly(serve):
    url = serve({"mean": as_reward(lambda images, prompts, metadata: [0.5], name="mean")})
    message = {"images": GOOD["images"] * 2, "prompts": ["x"] * 2}
    answer = requests.post(f"{url}/mean", json=message, timeout=5)
    assert answer.status_code == 422
    assert "shape (1,) for 2 images" in answer.json()["error"]


def test_images_arrive_bit_for_bit():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 17, 31), dtype=np.uint8))
    request = wire.encode_request(image[None], ["x"], [{}])
    assert torch.equal(wire.decode_request(request)[0][0], image)


def test_one_bad_image_is_nan_and_the_rest_are_scored(serve):
    url = serve({"moody": Moody()})
    reward = RemoteReward(f"remote:{url}/moody")
    images = torch.full((3, 3, 8, 8), 7, dtype=torch.uint8)
    found = reward.score(images, ["a", "raise", "b"], [{}] * 3)
    np.testing.assert_array_equal(found.values, [7, np.nan, 7])
    composite = CompositeReward({"moody": reward}, {"moody": 1.0})
    assert composite.score(images, ["a", "raise", "b"], [{}] * 3).mask.tolist() == [
        True,
        False,
        True,
    ]
    assert composite.failures == {"moody": 1}


def test_a_slow_reward_is_given_up_and_the_service_goes_on(serve):
    moody = Moody()
    url = serve({"moody": moody}, limits=Limits(timeout=0.3))
    reward = RemoteReward(f"remote:{url}/moody")
    images = torch.full((1, 3, 8, 8), 7, dtype=torch.uint8)
    assert np.isnan(reward.score(images, ["sleep"], [{}]).values).all()
    moody.awake.set()
    assert reward.score(images, ["a"], [{}]).values.tolist() == [7]


def test_each_reward_has_its_own_time(serve):
    limits = Limits(timeout=30, timeouts={"hasty": 0.3})
    served = {"moody": Moody(), "hasty": Moody()}
    url = serve(served, limits=limits)
    images = torch.full((1, 3, 8, 8), 7, dtype=torch.uint8)
    rewards = {name: RemoteReward(f"remote:{url}/{name}") for name in ("moody", "hasty")}
    for name, seconds in (("moody", 30), ("hasty", 0.3)):
        rewards[name].prepare()
        assert rewards[name].timeout == seconds + remote.MARGIN
    assert np.isnan(rewards["hasty"].score(images, ["sleep"], [{}]).values).all()
    for reward in served.values():
        reward.awake.set()
    assert rewards["moody"].score(images, ["sleep"], [{}]).values.tolist() == [7]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("60", (60, {})),
        ("pickscore=60,ocr=10", (300, {"pickscore": 60, "ocr": 10})),
        ("5, ocr=0.5", (5, {"ocr": 0.5})),
        ("0", "must be a positive number, got '0'"),
        ("inf", "must be a positive number"),
        ("ocr=", "must be a positive number, got 'ocr='"),
        ("orc=3", "'orc' is not among `rewards` pickscore,ocr"),
    ],
)
def test_timeouts_are_read(text, expected):
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            read_timeout(text, ["pickscore", "ocr"])
    else:
        assert read_timeout(text, ["pickscore", "ocr"]) == expected


def test_the_command_serves_until_it_is_stopped(monkeypatch):
    """`diffalign serve-rewards` itself, in a process of its own on loopback."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "diffalign.cli", "serve-rewards", "--rewards=jpeg,flatness"]
    environment = {k: v for k, v in os.environ.items() if k != remote.TOKEN}
    server = subprocess.Popen(
        [*command, f"--port={port}", "--timeout=20,jpeg=10"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        url = f"remote:http://127.0.0.1:{port}"
        assert [server.stdout.readline().strip() for _ in range(2)] == [
            f"{url}/jpeg",
            f"{url}/flatness",
        ]
        monkeypatch.setattr(remote.PATIENCE, "retries", 8)  # it says so and then listens
        monkeypatch.setattr(remote.PATIENCE, "first_wait", 0.1)
        for name, seconds in (("jpeg", 10), ("flatness", 20)):
            reward = registry.create(f"{url}/{name}")
            reward.prepare()
            assert reward.timeout == seconds + remote.MARGIN
            expected = registry.create(name).score(*scenes(2)).values
            np.testing.assert_allclose(reward.score(*scenes(2)).values, expected, rtol=1e-6)
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(30) in (0, 130, -signal.SIGINT)


def test_a_service_that_is_not_there_is_an_error_before_the_first_image():
    reward = RemoteReward("remote:http://127.0.0.1:9/pickscore")
    with pytest.raises(RewardError, match="does not answer"):
        reward.prepare()
    found = reward.score(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["a", "b"], [{}] * 2)
    assert np.isnan(found.values).all()  # later it is a failure that is counted


@pytest.mark.parametrize("url", ["remote:127.0.0.1:9/x", "remote:http://h", "remote:ftp://h/x"])
def test_addresses_are_checked(url):
    with pytest.raises(RewardError, match="expected remote:http"):
        RemoteReward(url)


def test_names_are_checked(serve):
    url = serve({"jpeg": JpegReward()})
    with pytest.raises(RewardError, match="has no 'jpg'; it has jpeg"):
        RemoteReward(f"remote:{url}/jpg").prepare()


def test_a_lossy_way_is_noticed(serve, monkeypatch):
    url = serve({"moody": Moody()})
    reward = RemoteReward(f"remote:{url}/moody")

    def lossy(image):
        buffer = io.BytesIO()
        Image.fromarray((image // 2 * 2).permute(1, 2, 0).numpy()).save(buffer, format="PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    monkeypatch.setattr(wire, "encode_image", lossy)
    with pytest.raises(RewardError, match="something on the way changes images"):
        reward.prepare()


def test_what_a_reward_needs_is_known_to_its_client(serve):
    url = serve({"verifier": VerifierReward()})
    reward = registry.create(f"remote:{url}/verifier")
    with pytest.raises(RewardError, match="needs include"):
        reward.check_metadata([{"prompt": "x"}])
    assert not reward.needs_prompt


def test_large_batches_are_sent_in_parts(serve, monkeypatch):
    url = serve({"moody": Moody()}, limits=Limits(max_bytes=3000))
    monkeypatch.setattr(remote, "BATCH_BYTES", 400)
    reward = RemoteReward(f"remote:{url}/moody")
    images = torch.arange(7)[:, None, None, None].expand(7, 3, 8, 8).to(torch.uint8)
    found = reward.score(images, ["a"] * 7, [{}] * 7)
    assert found.values.tolist() == list(range(7))


def test_a_reward_that_cannot_score_the_golden_image_is_served(serve, caplog):
    class Picky(Moody):
        def score(self, images, prompts, metadata):
            return RewardOutput(np.array([m["reference"] for m in metadata], np.float32))

    url = serve({"picky": Picky()})
    reward = RemoteReward(f"remote:{url}/picky")
    reward.prepare()
    assert "cannot score the golden image" in caplog.text
    found = reward.score(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"], [{"reference": 3}])
    assert found.values.tolist() == [3]


def test_a_stalled_upload_holds_nothing_up(serve):
    url = serve({"jpeg": JpegReward()}, limits=Limits(timeout=0.5, max_waiting=1))
    host, port = url.removeprefix("http://").split(":")
    stalled = [socket.create_connection((host, int(port)), timeout=20) for _ in range(4)]
    for raw in stalled:
        raw.sendall(b"POST /jpeg HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n{")
    assert requests.post(f"{url}/jpeg", json=GOOD, timeout=5).status_code == 200
    for raw in stalled:
        assert b" 408 " in raw.recv(1000)
        raw.close()


def test_tokens(serve, monkeypatch):
    url = serve({"jpeg": JpegReward()}, token="sesame")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
        assert requests.get(f"{url}/health", headers=headers, timeout=5).status_code == 401
        assert requests.post(f"{url}/jpeg", json={}, headers=headers, timeout=5).status_code == 401
    with pytest.raises(RewardError, match="401"):
        RemoteReward(f"remote:{url}/jpeg").prepare()
    monkeypatch.setenv(remote.TOKEN, "sesame")
    RemoteReward(f"remote:{url}/jpeg").prepare()


def png(size=(8, 8), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format="PNG")
    return buffer.getvalue()


def b64(content):
    return base64.b64encode(content).decode()


def bomb():
    """A PNG that says it has 60000 x 60000 pixels."""

    def chunk(kind, data):
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = (60000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    parts = (
        chunk(b"IHDR", header),
        chunk(b"IDAT", zlib.compress(b"\0" * 1000)),
        chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def flat(side):
    """A small file of many pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, format="PNG", compress_level=9, optimize=True)
    return buffer.getvalue()


JPEG = io.BytesIO()
Image.new("RGB", (8, 8)).save(JPEG, format="JPEG")
GOOD = {"images": [b64(png())], "prompts": ["x"], "metadata": [{}]}


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b"\x80\x04\x95", 400),  # a pickle
        (b"\xff\xfe", 400),
        ([], 422),
        ({}, 422),
        ({**GOOD, "images": []}, 422),
        ({**GOOD, "images": "x"}, 422),
        ({**GOOD, "images": [3]}, 422),
        ({**GOOD, "images": ["not base64!"]}, 422),
        ({**GOOD, "images": [b64(b"not a png")]}, 422),
        ({**GOOD, "images": [b64(png()[:40])]}, 422),
        ({**GOOD, "images": [b64(JPEG.getvalue())]}, 422),
        ({**GOOD, "images": [b64(png(mode="L"))]}, 422),
        ({**GOOD, "images": [b64(bomb())]}, 422),
        (
            {
                **GOOD,
                "images": [b64(png())] * 2000,
                "prompts": ["x"] * 2000,
                "metadata": [{}] * 2000,
            },
            422,
        ),
        (
            {
                **GOOD,
                "images": [b64(png()), b64(png((9, 8)))],
                "prompts": ["x"] * 2,
                "metadata": [{}] * 2,
            },
            422,
        ),
        (
            {
                **GOOD,
                "images": [b64(flat(3000))] * 60,
                "prompts": ["x"] * 60,
                "metadata": [{}] * 60,
            },
            422,
        ),
        ({**GOOD, "prompts": []}, 422),
        ({**GOOD, "prompts": [None]}, 422),
        ({**GOOD, "prompts": ["x" * 200_000]}, 422),
        ({**GOOD, "metadata": [1]}, 422),
        ({**GOOD, "metadata": {}}, 422),
        (b"x" * 5_000_000, 413),
    ],
)
def test_hostile_requests_are_answered(serve, message, status):
    url = serve({"jpeg": JpegReward()}, limits=Limits(max_bytes=4_000_000))
    content = message if isinstance(message, bytes) else json.dumps(message).encode()
    answer = requests.post(f"{url}/jpeg", data=content, timeout=20)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]
    assert requests.post(f"{url}/jpeg", json=GOOD, timeout=20).status_code == 200


def test_fuzzing_does_not_take_it_down(serve):
    """A good request with bytes changed, cut out and doubled, and bare sockets that speak no HTTP."""
    url = serve({"verifier": VerifierReward()})
    host, port = url.removeprefix("http://").split(":")
    rng = np.random.default_rng(0)
    content = json.dumps(wire.encode_request(*scenes(2))).encode()
    statuses = set()
    for _ in range(150):
        data = bytearray(content)
        for _ in range(rng.integers(1, 6)):
            at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
            kind = rng.integers(3)
            if kind == 0:
                data[at : at + length] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
            elif kind == 1:
                del data[at : at + length]
            else:
                data[at:at] = data[at : at + length]
        statuses.add(requests.post(f"{url}/verifier", data=bytes(data), timeout=20).status_code)
    assert statuses <= {200, 400, 422}
    assert 400 in statuses
    for _ in range(20):
        with socket.create_connection((host, int(port)), timeout=5) as raw:
            raw.sendall(rng.integers(0, 256, 200, dtype=np.uint8).tobytes())
    assert requests.get(f"{url}/nothing", timeout=5).status_code in (404, 405)
    assert requests.post(f"{url}/nothing", json=GOOD, timeout=5).status_code == 404
    RemoteReward(f"remote:{url}/verifier").prepare()


@pytest.mark.parametrize(
    "content",
    [
        b'{"images":[' + b"[]," * 1_000_000,
        b'{"a":"' + b"\\n" * 1_000_000,
        b"{" + b" " * 2_000_000,
        b"[1.5," * 600_000,
    ],
    ids=["lists", "escapes", "blanks", "numbers"],
)
def test_what_would_be_slow_to_parse_is_not_parsed(serve, content, monkeypatch):
    url = serve({"jpeg": JpegReward()})
    monkeypatch.setattr(uploads, "_parse", None)
    answer = requests.post(f"{url}/jpeg", data=content, timeout=20)
    assert answer.status_code == 413
    assert "besides its base64" in answer.json()["error"]


def test_requests_are_bounded_together_and_the_largest_gives_way():
    """By hand: 100 bytes for all; a stalled request of 80 is given up for one of 30."""

    async def run():
        held = Uploads(max_bytes=90, max_total=100, seconds=5)
        stalled, going = asyncio.Event(), asyncio.Event()

        async def slow():
            yield b"a" * 80
            stalled.set()
            await going.wait()
            yield b"a"

        async def quick():
            yield b"b" * 30

        async def send(stream):
            with held.open() as upload:
                await held.receive(upload, stream)
                return bytes(upload.content)

        first = asyncio.create_task(send(slow()))
        await stalled.wait()
        assert await send(quick()) == b"b" * 30
        assert held.total == 0
        going.set()
        with pytest.raises(Refusal) as caught:
            await first
        assert caught.value.status == 503

    asyncio.run(run())


def test_unfinished_headers_lock_nobody_out(serve, monkeypatch):
    """More connections than are allowed, none of which finishes its headers; then all are closed in time."""
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 16)
    monkeypatch.setattr(connections, "HEADER_SECONDS", 1.0)
    url = serve({"jpeg": JpegReward()})
    host, port = url.removeprefix("http://").split(":")
    half_open = [socket.create_connection((host, int(port)), timeout=10) for _ in range(24)]
    for raw in half_open:
        raw.sendall(b"POST /jpeg HTTP/1.1\r\nHost: localhost\r\nX: ")
    assert requests.post(f"{url}/jpeg", json=GOOD, timeout=5).status_code == 200
    for raw in half_open:
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(100) == b""
        raw.close()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "127.0.0.1.evil.example"])
def test_without_a_token_it_is_called_by_loopback_names_only(serve, host):
    url = serve({"jpeg": JpegReward()})
    for method, path in (("GET", "/health"), ("GET", "/"), ("POST", "/jpeg")):
        answer = requests.request(method, url + path, json=GOOD, headers={"Host": host}, timeout=5)
        assert answer.status_code == 421
    answer = requests.get(f"{url}/", headers={"Host": "localhost:1"}, timeout=5)
    assert answer.status_code == 200


def test_the_root_says_what_is_served(serve):
    url = serve({"jpeg": JpegReward()})
    answer = requests.get(f"{url}/", timeout=5).json()
    assert answer["in a recipe"] == {f"remote:{url}/jpeg": 1.0}
    assert requests.get(f"{url}/jpeg", timeout=5).json()["error"] == "Method Not Allowed"


def test_bad_requests_leave_no_tracebacks_in_the_log(serve, caplog):
    url = serve({"verifier": VerifierReward()})
    bad = {**GOOD, "metadata": [{"include": [{"class": 5, "count": "many"}]}]}
    for _ in range(5):
        assert requests.post(f"{url}/verifier", json=bad, timeout=5).status_code == 200
    records = [r for r in caplog.records if r.name.startswith("diffalign")]
    assert len(records) <= 1
    assert not any(r.exc_info for r in records)


def test_a_client_that_leaves_is_not_logged(serve, capfd):
    url = serve({"jpeg": JpegReward()})
    host, port = url.removeprefix("http://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port)), timeout=5) as raw:
            raw.sendall(b"POST /jpeg HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert requests.post(f"{url}/jpeg", json=GOOD, timeout=5).status_code == 200
    assert "Traceback" not in capfd.readouterr().err


def test_no_proxy_is_asked_for_a_service_of_this_machine(serve, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    url = serve({"jpeg": JpegReward()})
    RemoteReward(f"remote:{url}/jpeg").prepare()
    assert session_for("http://localhost:1/v1").trust_env is False
    assert session_for("http://[::1]:1").trust_env is False
    assert session_for("http://127.0.0.2:1").trust_env is False
    assert session_for("https://judge.example/v1").trust_env is True


def test_a_taken_port_is_one_line_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(registry, "create", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve-rewards", "--rewards=jpeg", f"--port={port}"]) == 2
    assert f"port={port}: cannot listen there" in capsys.readouterr().err
    assert cli.main(["serve-rewards", "--rewards=jpeg", "--port=99999"]) == 2
    assert "a port is a number from" in capsys.readouterr().err


def test_answers_that_are_not_ours_are_refused():
    for message in (None, {}, {"values": [1.0]}, {"values": [True, 1.0]}, {"values": ["1", 2]}):
        with pytest.raises(wire.WireError):
            wire.decode_output(message, n=2)
    found = wire.decode_output({"values": [1, None], "details": {"x": [None, 2.5]}}, n=2)
    np.testing.assert_array_equal(found.values, [1, np.nan])
    np.testing.assert_array_equal(found.details["x"], [np.nan, 2.5])


def test_others_may_not_reach_it_without_a_token(capsys, monkeypatch):
    monkeypatch.delenv(remote.TOKEN, raising=False)
    assert cli.main(["serve-rewards", "--rewards=jpeg", "--host=0.0.0.0"]) == 2
    assert remote.TOKEN in capsys.readouterr().err
    assert cli.main(["serve-rewards", "--rewards=jpge"]) == 2
    assert "did you mean 'jpeg'" in capsys.readouterr().err
