"""Rewards that compare the images of one prompt with each other.

A pointwise reward scores an image alone. A groupwise reward sees all images of a prompt, and a pairwise one sees two at
a time. Online algorithms compare the images of a prompt anyway, so such rewards need no common scale of all prompts.
They are computed on rollouts only: an image of a held-out prompt has nothing to be compared with.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from diffalign.core.text import RANK
from diffalign.rewards.base import Metadata, Reward, RewardCard, RewardError
from diffalign.rewards.function import as_output
from diffalign.types import RewardOutput


class GroupReward(Reward):
    """Base class of groupwise rewards; subclasses set `card` and implement `rank`."""

    @property
    def pointwise(self) -> Reward | None:
        """Reward that scores images of held-out prompts in place of this one, or None."""
        return None

    @abstractmethod
    def rank(self, images: Tensor, prompt: str, metadata: Metadata) -> Any:
        """Return the rewards of the G images of one prompt: a `RewardOutput`, or G numbers.

        Higher is better. NaN stands for an image that cannot be compared.

        Args:
            images: (G, 3, H, W) uint8, G at least 2.
            prompt: prompt of all images.
            metadata: metadata of the prompt.
        """

    def units(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the rows of each prompt, which are scored together."""
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(prompt, []).append(row)
        return list(rows.values())

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        """Return the rewards of B images, NaN for the only image of a prompt."""
        parts, order = [], []
        for rows in self.units(prompts):
            order += rows
            if len(rows) == 1:
                parts.append(RewardOutput(np.full(1, np.nan, np.float32)))
                continue
            value = self.rank(images[rows], prompts[rows[0]], metadata[rows[0]])
            parts.append(as_output(value, n=len(rows), name=self.card.name))
        output = RewardOutput.cat(parts)
        back = np.argsort(order)
        details = {name: values[back] for name, values in output.details.items()}
        return RewardOutput(output.values[back], details)


class PairwiseReward(GroupReward):
    """Base class of pairwise rewards; subclasses set `card` and implement `prefer`.

    The reward of an image is the mean probability that it is preferred to another image of its prompt.
    """

    both_orders: ClassVar[bool] = False
    """True to ask for every pair in both orders, for judges that favour a place."""
    pairs_at_once: ClassVar[int] = 32

    @abstractmethod
    def prefer(
        self,
        first: Tensor,
        second: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> Any:
        """Return the probability, of each of P pairs, that the first image is preferred.

        A tie is 0.5. NaN stands for a pair that cannot be judged.

        Args:
            first: first images (P, 3, H, W) uint8.
            second: second images (P, 3, H, W) uint8.
            prompts: P texts.
            metadata: P mappings.
        """

    def rank(self, images: Tensor, prompt: str, metadata: Metadata) -> RewardOutput:
        """Return the mean probability (G,) that an image is preferred to another of its prompt."""
        pairs = list(itertools.combinations(range(len(images)), 2))
        wins = self._ask(pairs, images, prompt, metadata)
        if self.both_orders:
            turned = self._ask([(b, a) for a, b in pairs], images, prompt, metadata)
            wins = (wins + 1 - turned) / 2
        table = np.full((len(images), len(images)), np.nan)
        for (a, b), win in zip(pairs, wins, strict=True):
            table[a, b], table[b, a] = win, 1 - win
        return RewardOutput(mean_wins(table))

    def _ask(
        self, pairs: Sequence[tuple[int, int]], images: Tensor, prompt: str, metadata: Metadata
    ) -> np.ndarray:
        """Return the probabilities (P,) that the first images of pairs are preferred.

        Raises:
            RewardError: a probability lies outside 0..1.
        """
        parts = []
        for start in range(0, len(pairs), self.pairs_at_once):
            part = pairs[start : start + self.pairs_at_once]
            first, second = (images[list(side)] for side in zip(*part, strict=True))
            value = self.prefer(first, second, [prompt] * len(part), [metadata] * len(part))
            parts.append(as_output(value, n=len(part), name=self.card.name).values)
        wins: np.ndarray = np.concatenate(parts).astype(np.float64)
        if ((wins < 0) | (wins > 1)).any():
            raise RewardError(
                f"reward {self.card.name!r}: a preference must lie in 0..1, got {float(np.nanmin(wins)):g} to "
                f"{float(np.nanmax(wins)):g}. Return the probability that the first image is better"
            )
        return wins


class RankReward(GroupReward):
    """Share of a prompt's other images that another reward scores lower.

    A tie counts half.

    The size of a difference does not count, only its sign. A policy therefore gains nothing by exaggerating what the
    other reward likes in an image that is already the best (Pref-GRPO, arXiv 2508.20751, has the same reward from a
    pairwise judge).

    Args:
        inner: reward that scores single images.
    """

    def __init__(self, inner: Reward) -> None:
        self.inner = inner
        self.required_metadata = inner.required_metadata  # type: ignore[misc]
        self.needs_prompt = inner.needs_prompt  # type: ignore[misc]
        self.card = RewardCard(  # type: ignore[misc]
            name=f"{RANK}{inner.card.name}",
            description=f"share of the prompt's other images that {inner.card.name} scores lower",
            model_id=inner.card.model_id,
            revision=inner.card.revision,
            auxiliary=inner.card.auxiliary,
            input_size=inner.card.input_size,
            license=inner.card.license,
        )

    @property
    def pointwise(self) -> Reward:
        """Reward that is ranked by."""
        return self.inner

    def prepare(self) -> None:
        """Load the model of the other reward."""
        self.inner.prepare()
        self.declare(revision=self.inner.card.revision)

    def check_metadata(self, metadata: Sequence[Metadata]) -> None:
        """Raise RewardError for the first prompt whose metadata the other reward cannot use."""
        self.inner.check_metadata(metadata)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        """Return the ranks of B images; the details have the other reward's values as `score`."""
        output = self.inner.score(images, prompts, metadata)
        values = np.asarray(self.inner.normalize(output.values), np.float32)
        ranks = np.full(len(prompts), np.nan, np.float32)
        for rows in self.units(prompts):
            ranks[rows] = mean_wins(win_table(values[rows]))
        return RewardOutput(ranks, {**output.details, "score": values})

    def rank(self, images: Tensor, prompt: str, metadata: Metadata) -> RewardOutput:
        """Return the ranks (G,) of the images of one prompt."""
        n = len(images)
        return self.score(images, [prompt] * n, [metadata] * n)


def win_table(values: np.ndarray) -> np.ndarray:
    """Return which of G values are larger, (G, G): 1 where the row's is, 0.5 for a tie, NaN if one is NaN."""
    gaps = np.asarray(values, np.float64)[:, None] - np.asarray(values, np.float64)[None, :]
    return (np.sign(gaps) + 1) / 2


def mean_wins(table: np.ndarray) -> np.ndarray:
    """Return the mean win (G,) of each row over the other columns, float32.

    NaN pairs are left out. A row without a pair is NaN.
    """
    others = ~np.eye(len(table), dtype=bool) & np.isfinite(table)
    counts = others.sum(1)
    wins = np.where(others, table, 0).sum(1)
    means = np.where(counts > 0, wins / np.maximum(counts, 1), np.nan)
    return means.astype(np.float32)
