"""The judge: a real HTTP server that speaks chat completions and sees the image's colour."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.rewards import registry, vlm_judge
from diffalign.rewards.base import RewardError


class Judge(BaseHTTPRequestHandler):
    """10 for red images, 2 for others; moody about some prompts; fails once on each `again`."""

    seen: list
    failed: set

    def do_GET(self):
        self.answer(200, {"data": [{"id": "judge-7b"}]})

    def do_POST(self):
        message = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).seen.append(message)
        [image, text] = message["messages"][0]["content"]
        content = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        picture = Image.open(io.BytesIO(content))
        assert picture.format == "PNG"
        prompt = text["text"].rpartition("Prompt: ")[2]
        if prompt == "again" and prompt not in type(self).failed:
            type(self).failed.add(prompt)
            self.answer(503, {"error": "busy"})
        elif prompt == "refuse":
            self.answer(400, {"error": "no"})
        elif prompt == "mumble":
            self.say("I would rather not.")
        else:
            red = picture.getpixel((0, 0)) == (255, 0, 0)
            self.say(f"It has a score of 3 on colour, but ...\n**Score:** {10 if red else 2.5}")

    def say(self, text):
        self.answer(200, {"choices": [{"message": {"content": text}}]})

    def answer(self, status, message):
        content = json.dumps(message).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def judge(monkeypatch):
    Judge.seen, Judge.failed = [], set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv(vlm_judge.URL, f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv(vlm_judge.MODEL, "judge-7b")
    monkeypatch.setattr(vlm_judge.PATIENCE, "first_wait", 0.01)
    yield Judge
    server.shutdown()


def test_images_are_judged_and_failures_are_nan(judge):
    images = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    images[[0, 3], 0] = 255
    reward = registry.create("vlm_judge")
    reward.prepare()
    prompts = ["x", "y", "mumble", "again", "refuse"]
    found = reward.score(images, prompts, [{}] * 5)
    np.testing.assert_array_equal(found.values, [10, 2.5, np.nan, 10, np.nan])
    assert reward.normalize(found.values[0]) == 1
    assert reward.card.model_id == "judge-7b"  # results name who judged
    assert all(m["temperature"] == 0 and m["model"] == "judge-7b" for m in judge.seen)


def test_what_is_not_there_is_an_error_before_the_first_image(judge, monkeypatch):
    monkeypatch.setenv(vlm_judge.MODEL, "judge-70b")
    with pytest.raises(RewardError, match="no model 'judge-70b'; it has judge-7b"):
        registry.create("vlm_judge").prepare()
    monkeypatch.setenv(vlm_judge.URL, "http://127.0.0.1:9/v1")
    with pytest.raises(RewardError, match="no judge answers"):
        registry.create("vlm_judge").prepare()
    monkeypatch.delenv(vlm_judge.URL)
    with pytest.raises(RewardError, match=vlm_judge.URL):
        registry.create("vlm_judge").prepare()


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 7", 7),
        ("score = 7.5/10", 7.5),
        ("First Score: 2. Then\nFinal Score: **9**", 9),
        ("Score: 11", None),
        ("Score: -1", None),
        ("Score (0-10): 7", 7),
        ("7", None),
        ("", None),
    ],
)
def test_scores_are_read(text, score):
    found = vlm_judge.read_score(text)
    assert np.isnan(found) if score is None else found == score
