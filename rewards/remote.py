"""Client of a reward service (`rewards.service`), as a reward.

Its name is "remote:http://HOST:PORT/NAME". The environment variable DIFFALIGN_REWARD_TOKEN holds the token.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import requests
from torch import Tensor

from diffalign.core.text import REMOTE
from diffalign.rewards import wire
from diffalign.rewards.base import Metadata, Reward, RewardCard, RewardError
from diffalign.types import RewardOutput
from diffalign.web.http import Patience, ask, session_for

logger = logging.getLogger(__name__)
TOKEN = "DIFFALIGN_REWARD_TOKEN"
PATIENCE = Patience()
TIMEOUT = 330.0
"""Seconds to wait for an answer before the service has reported its own time limit."""
MARGIN = 30.0
BATCH_BYTES = 64_000_000
"""Largest number of bytes of pixels per request; larger batches are split."""
BATCH_IMAGES = 256


class RemoteReward(Reward):
    """Reward that a service computes; images that it cannot score are NaN and counted."""

    def __init__(self, url: str) -> None:
        """Address the reward that is the last part of `url`."""
        base, _, name = url.removeprefix(REMOTE).rstrip("/").rpartition("/")
        if not base.startswith(("http://", "https://")) or not name:
            raise RewardError(f"{url!r}: expected {REMOTE}http://HOST:PORT/NAME")
        self.base, self.name, self.timeout = base, name, TIMEOUT
        self._ready = False
        self.session = session_for(base)
        if os.environ.get(TOKEN):
            self.session.headers["Authorization"] = f"Bearer {os.environ[TOKEN]}"
        self.card = RewardCard(name=url, description=f"{name} at {base}")  # type: ignore[misc]

    def prepare(self) -> None:
        """Check once that the service answers, and that images arrive unchanged.

        Raises:
            RewardError: the service does not answer, or scores a test image differently.
        """
        if self._ready:
            return
        try:
            answer = self._ask("GET", "health")
            served = dict(answer["rewards"])
            seconds = float(answer["timeout"])
        except (
            requests.RequestException,
            wire.WireError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:
            raise RewardError(
                f"the reward service at {self.base} does not answer: {error}"
            ) from error
        if self.name not in served:
            raise RewardError(
                f"the reward service at {self.base} has no {self.name!r}; it has {', '.join(served)}"
            )
        try:
            entry = served[self.name]
            self.timeout = float(entry.get("timeout", seconds)) + MARGIN
            fields = {**entry["card"], "name": self.card.name}
            fields["raw_range"] = fields["raw_range"] and tuple(fields["raw_range"])
            self.card = RewardCard(**fields)  # type: ignore[misc]
            self.required_metadata = tuple(entry["required_metadata"])  # type: ignore[misc]
            self.needs_prompt = bool(entry["needs_prompt"])  # type: ignore[misc]
            golden = entry["golden"]
            expected = None if golden is None else wire.decode_output(golden, n=1).values
        except (KeyError, TypeError, ValueError) as error:
            raise RewardError(
                f"the service at {self.base} speaks of {self.name!r} in another way than this version: {error!r}"
            ) from error
        self._send_golden(expected)
        self._ready = True

    def _send_golden(self, expected: np.ndarray | None) -> None:
        if expected is None or np.isnan(expected).all():
            logger.warning(
                "%s cannot score the golden image: whether images arrive as they are is not known",
                self.card.name,
            )
            return
        arrived = self.score(*wire.golden()).values
        if not np.allclose(arrived, expected, rtol=1e-3, atol=1e-4):
            raise RewardError(
                f"the golden image is worth {expected[0]} to {self.base}/{self.name} itself and {arrived[0]} when it "
                "is sent there: something on the way changes images"
            )

    def check_metadata(self, metadata: Sequence[Metadata]) -> None:
        # the service reports the required metadata
        self.prepare()
        super().check_metadata(metadata)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        size = max(1, min(BATCH_IMAGES, BATCH_BYTES // max(images[0].numel(), 1)))
        parts = []
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            parts.append(self._score(images[part], prompts[part], metadata[part]))
        return RewardOutput.cat(parts)

    def _score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        request = wire.encode_request(images, prompts, metadata)
        try:
            return wire.decode_output(self._ask("POST", self.name, request), n=len(prompts))
        except (requests.RequestException, wire.WireError) as error:
            logger.warning("%s: %d images have no reward: %s", self.card.name, len(prompts), error)
            return RewardOutput(np.full(len(prompts), np.nan, np.float32))

    def _ask(self, method: str, path: str, message: Any = None) -> Any:
        """Send a request and return the JSON of the answer."""
        answer = ask(
            self.session,
            method,
            f"{self.base}/{path}",
            patience=PATIENCE,
            timeout=self.timeout,
            message=message,
        )
        if answer.status_code != requests.codes.ok:
            raise wire.WireError(f"{answer.status_code}: {answer.text[:200]}")
        try:
            return answer.json()
        except ValueError as error:
            raise wire.WireError("the answer is not JSON") from error
