"""A reward of a service (`rewards.service`): "remote:http://HOST:PORT/NAME". The token is in DIFFALIGN_REWARD_TOKEN."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import requests
from torch import Tensor

from diffalign.rewards import wire
from diffalign.rewards.base import Metadata, Reward, RewardCard, RewardError
from diffalign.rewards.registry import REMOTE
from diffalign.types import RewardOutput

logger = logging.getLogger(__name__)
TOKEN = "DIFFALIGN_REWARD_TOKEN"
RETRIES = 4
FIRST_WAIT = 0.5
"""Seconds before the first repetition; doubled for each further one."""
TIMEOUT = (5.0, 330.0)
"""Seconds to connect, and to wait for an answer."""
TRY_AGAIN = (429, 500, 502, 503, 504)


class RemoteReward(Reward):
    """What the service cannot score, or cannot be asked, is NaN: the run counts it and goes on."""

    def __init__(self, url: str) -> None:
        """`url` with the reward's name as its last part."""
        base, _, name = url.removeprefix(REMOTE).rstrip("/").rpartition("/")
        if not base.startswith(("http://", "https://")) or not name:
            raise RewardError(f"{url!r}: expected {REMOTE}http://HOST:PORT/NAME")
        self.base, self.name = base, name
        self.session = requests.Session()
        if os.environ.get(TOKEN):
            self.session.headers["Authorization"] = f"Bearer {os.environ[TOKEN]}"
        self.card = RewardCard(name=url, description=f"{name} at {base}")  # type: ignore[misc]

    def prepare(self) -> None:
        """Is it there, and does an image arrive as it was sent? RewardError where not."""
        try:
            answer = self._ask("GET", "health")
            known = answer["rewards"]
        except (requests.RequestException, wire.WireError, KeyError, TypeError) as error:
            raise RewardError(
                f"the reward service at {self.base} does not answer: {error}"
            ) from error
        if self.name not in known:
            raise RewardError(
                f"the reward service at {self.base} has no {self.name!r}; it has {', '.join(known)}"
            )
        fields = known[self.name]["card"] | {"name": self.card.name}
        fields["raw_range"] = tuple(fields["raw_range"])
        self.card = RewardCard(**fields)  # type: ignore[misc]
        images, prompts, metadata = wire.golden()
        expected = wire.decode_output(known[self.name]["golden"], n=1).values
        found = self.score(images, prompts, metadata).values
        if not np.allclose(found, expected, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise RewardError(
                f"the golden image is worth {expected[0]} to {self.base}/{self.name} itself and {found[0]} when it is "
                "sent there: something on the way changes images"
            )

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        request = wire.encode_request(images, prompts, metadata)
        try:
            return wire.decode_output(self._ask("POST", self.name, request), n=len(prompts))
        except (requests.RequestException, wire.WireError) as error:
            logger.warning("%s: %d images have no reward: %s", self.card.name, len(prompts), error)
            return RewardOutput(np.full(len(prompts), np.nan, np.float32))

    def _ask(self, method: str, path: str, message: Any = None) -> Any:
        """The answer's JSON; what may pass is tried again, later each time."""
        for attempt in range(RETRIES + 1):
            try:
                answer = self.session.request(
                    method, f"{self.base}/{path}", json=message, timeout=TIMEOUT
                )
                if answer.status_code not in TRY_AGAIN:
                    break
                problem = f"{answer.status_code}: {answer.text[:200]}"
            except requests.ConnectionError as error:
                if attempt == RETRIES:
                    raise
                problem = str(error)
            if attempt < RETRIES:
                wait = FIRST_WAIT * 2**attempt
                logger.info("%s/%s: %s; again in %g s", self.base, path, problem, wait)
                time.sleep(wait)
        if answer.status_code != requests.codes.ok:
            raise wire.WireError(f"{answer.status_code}: {answer.text[:200]}")
        try:
            return answer.json()
        except ValueError as error:
            raise wire.WireError("the answer is not JSON") from error
