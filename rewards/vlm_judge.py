"""Vision-language model as a judge, over OpenAI's chat completions (vLLM, SGLang, ...).

The environment variables are DIFFALIGN_JUDGE_URL (such as http://127.0.0.1:8000/v1), DIFFALIGN_JUDGE_MODEL, and
DIFFALIGN_JUDGE_KEY for a service that needs a key. An answer without a score is NaN, never 0.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import requests
from torch import Tensor

from diffalign.rewards.base import Metadata, Reward, RewardCard, RewardError
from diffalign.types import RewardOutput
from diffalign.web.http import Patience, ask, session_for
from diffalign.web.images import encode_image

logger = logging.getLogger(__name__)
URL, MODEL, KEY = "DIFFALIGN_JUDGE_URL", "DIFFALIGN_JUDGE_MODEL", "DIFFALIGN_JUDGE_KEY"
HIGHEST = 10
QUESTION = (
    "Does this image show what its prompt asks for? Check the objects, their number, colours and places, any text, "
    "and how well it is drawn. Think in one or two sentences, then end with a line of the form 'Score: N', N from 0 "
    "(nothing of it) to 10 (all of it).\nPrompt: {prompt}"
)
_SCORE = re.compile(r"score[^\n:=]*[:=]\s*\**\s*(-?\d+(?:\.\d+)?)", re.IGNORECASE)
CONCURRENT = 8
PATIENCE = Patience(retries=3, first_wait=1.0, statuses=(429, 500, 502, 503, 504))
TIMEOUT = 120.0


class VlmJudgeReward(Reward):
    """Score 0 to 10 of a vision-language model, at temperature 0.

    Several images are judged at a time.
    """

    needs_prompt = True
    card = RewardCard(
        name="vlm_judge",
        description=f"score of a vision-language model at {URL}, 0 - 10",
        raw_range=(0.0, float(HIGHEST)),
        scale=1 / HIGHEST,
        license="the judge's",
    )

    def __init__(self) -> None:
        self.session = requests.Session()
        self.url = self.model = ""

    def prepare(self) -> None:
        """Check that the endpoint answers and has the model.

        Raises:
            RewardError: the endpoint does not answer, or lacks the model.
        """
        if self.model:
            return
        url, model = os.environ.get(URL, "").rstrip("/"), os.environ.get(MODEL, "")
        if not url.startswith(("http://", "https://")) or not model:
            raise RewardError(f"vlm_judge needs {URL} (http://HOST:PORT/v1) and {MODEL}")
        self.session = session_for(url)
        if os.environ.get(KEY):
            self.session.headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        try:
            answer = self.session.get(f"{url}/models", timeout=TIMEOUT)
            answer.raise_for_status()
            models = [entry["id"] for entry in answer.json()["data"]]
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise RewardError(f"no judge answers at {url}: {error}") from error
        if model not in models:
            raise RewardError(f"{url} has no model {model!r}; it has {', '.join(models)}")
        self.url, self.model = url, model
        self.declare(model_id=model)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        self.prepare()
        with ThreadPoolExecutor(CONCURRENT) as pool:
            values = list(pool.map(self._judge, images, prompts))
        return RewardOutput(np.array(values, np.float32))

    def _judge(self, image: Tensor, prompt: str) -> float:
        message = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": 256,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "image_url",
                            "image_url": {"url": f"data:image/png;base64,{encode_image(image)}"},
                        },
                        {"type": "text", "text": QUESTION.format(prompt=prompt)},
                    ],
                }
            ],
        }
        try:
            text = self._ask(message)
        except (requests.RequestException, ValueError, KeyError, IndexError, TypeError) as error:
            logger.warning("vlm_judge: %s", error)
            return float("nan")
        return read_score(text)

    def _ask(self, message: dict[str, Any]) -> str:
        answer = ask(
            self.session,
            "POST",
            f"{self.url}/chat/completions",
            patience=PATIENCE,
            timeout=TIMEOUT,
            message=message,
        )
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["message"]["content"])


def read_score(text: str) -> float:
    """Return the last score in an answer, or NaN without a valid one."""
    scores = _SCORE.findall(text)
    value = float(scores[-1]) if scores else float("nan")
    return value if 0 <= value <= HIGHEST else float("nan")
