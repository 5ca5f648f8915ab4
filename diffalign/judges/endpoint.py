"""Judge behind an endpoint that speaks OpenAI's chat completions, with log-probabilities of first words."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
from PIL import Image

from diffalign.judges.base import Judge, JudgeCard, JudgeError, Question, Reply, Task, parts_of
from diffalign.web.http import Patience, ask, session_for

KEY = "DIFFALIGN_JUDGE_KEY"
"""Environment variable with the key of the endpoint."""
TOP = 20
"""Number of most probable first tokens that OpenAI's interface returns at most."""
CONCURRENT = 8
TIMEOUT = 120.0
PATIENCE = Patience(retries=3, first_wait=1.0, statuses=(429, 500, 502, 503, 504))
AWAY = 16
"""Number of lost questions in a row after which the judge is away."""


class EndpointJudge(Judge):
    """Vision-language model behind an endpoint.

    Probabilities come from the most probable first tokens only, so they are bounds: a form outside of the list has at
    most the smallest listed probability.

    Args:
        url: address of the interface, such as http://127.0.0.1:8000/v1.
        model: name of the model at the endpoint.
        top: number of first tokens to ask for.

    Raises:
        JudgeError: the endpoint does not answer, or has no such model.
    """

    at_once = 8 * CONCURRENT

    def __init__(self, url: str, model: str, *, top: int = TOP) -> None:
        self.url, self.model, self.top = url.rstrip("/"), model, top
        self.session = session_for(url)
        if os.environ.get(KEY):
            self.session.headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        entry = self._entry()
        revision = entry.get("revision") or entry.get("root")
        self.card = JudgeCard(
            model,
            str(revision) if revision else None,
            ("words", "text"),
            "chat completions" + ("" if revision else ", revision unknown"),
        )
        self._without_connection = 0

    def _entry(self) -> Mapping[str, Any]:
        try:
            answer = self.session.get(f"{self.url}/models", timeout=TIMEOUT)
            answer.raise_for_status()
            models = {entry["id"]: entry for entry in answer.json()["data"]}
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise JudgeError(
                f"judge={self.url}: no endpoint answers there ({error}). Start it, or correct the address"
            ) from error
        if self.model not in models:
            raise JudgeError(
                f"judge={self.url}#{self.model}: the endpoint has no such model. Choose one of {', '.join(models)}"
            )
        entry: Mapping[str, Any] = models[self.model]
        return entry

    def answer(self, tasks: Sequence[Task]) -> list[Reply]:
        """Return the replies to B questions, of which several are in flight at a time."""
        with ThreadPoolExecutor(CONCURRENT) as pool:
            replies = list(pool.map(self._one, tasks))
        for reply in replies:
            lost = reply.error is not None and reply.error.startswith("no connection")
            self._without_connection = self._without_connection + 1 if lost else 0
        if self._without_connection >= AWAY:
            raise JudgeError(
                f"judge={self.url}: the endpoint is away ({replies[-1].error}). Start it again; the same command "
                "asks only what is missing"
            )
        return replies

    def _one(self, task: Task) -> Reply:
        question, images = task
        try:
            answer = ask(
                self.session,
                "POST",
                f"{self.url}/chat/completions",
                patience=PATIENCE,
                timeout=TIMEOUT,
                message=self._message(question, images),
            )
        except requests.Timeout:
            return Reply(error=f"no answer within {TIMEOUT:g} s")
        except requests.RequestException as error:
            return Reply(error=f"no connection: {error}")
        if answer.status_code != requests.codes.ok:
            return Reply(error=f"status {answer.status_code}: {answer.text[:200]}")
        try:
            choice = answer.json()["choices"][0]
            return read_choice(choice, question)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            return Reply(error=f"an answer of another format ({error!r})")

    def _message(self, question: Question, images: Sequence[Image.Image]) -> dict[str, Any]:
        parts = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": _uri(images[part])}}
            for part in parts_of(question.text, len(images))
        ]
        messages: list[dict[str, Any]] = []
        if question.system:
            messages.append({"role": "system", "content": question.system})
        messages.append({"role": "user", "content": parts})
        message: dict[str, Any] = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": question.max_tokens,
            "messages": messages,
        }
        if question.kind == "words":
            message |= {"logprobs": True, "top_logprobs": self.top}
        return message


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_choice(choice: Mapping[str, Any], question: Question) -> Reply:
    """Return the reply in one choice of a chat completion."""
    message = choice["message"]
    text = message.get("content")
    if question.kind == "text":
        if not text:
            thought = message.get("reasoning_content") or message.get("reasoning")
            return Reply(
                error="the answer is empty"
                + ("; the model thinks aloud, so switch its thinking off" if thought else "")
            )
        if choice.get("finish_reason") == "length":
            return Reply(text=text, error=f"cut after {question.max_tokens} tokens")
        return Reply(text=text)
    content = (choice.get("logprobs") or {}).get("content") or []
    if not content or not content[0].get("top_logprobs"):
        return Reply(text=text, error="the endpoint gives no log-probabilities")
    listed: dict[str, float] = {}
    for entry in content[0]["top_logprobs"]:
        # two tokens can have one text, such as halves of a character
        listed[entry["token"]] = listed.get(entry["token"], 0.0) + math.exp(entry["logprob"])
    groups = [_with_space(forms) if question.space_token else forms for forms in question.words]
    low, high = zip(*(bounds(listed, forms) for forms in groups), strict=True)
    return Reply(text=text, low=low, high=high)


def _with_space(forms: Sequence[str]) -> tuple[str, ...]:
    """Return the forms, and a bare space if one is a space and a digit."""
    split = any(form[:1] == " " and form[1:].isdigit() for form in forms)
    return (*forms, " ") if split else tuple(forms)


def bounds(listed: Mapping[str, float], forms: Sequence[str]) -> tuple[float, float]:
    """Return the bounds of the probability that the first token is one of some forms.

    Args:
        listed: probability of each of the most probable tokens.
        forms: different texts of tokens.
    """
    low = min(1.0, sum(listed.get(form, 0.0) for form in set(forms)))
    rest = max(0.0, 1.0 - sum(listed.values()))
    absent = sum(form not in listed for form in set(forms))
    most = absent * min(listed.values(), default=1.0)
    return low, min(1.0, low + min(rest, most))
