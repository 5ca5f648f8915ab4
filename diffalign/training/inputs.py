"""Read a run's prompts and rewards, and check them before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffalign.config import AnyRunConfig
from diffalign.config.methods import source_check
from diffalign.core.fingerprint import of_json
from diffalign.core.text import RANK
from diffalign.data.prompts import Prompt, PromptError, load_prompts, told
from diffalign.evaluation.score import Score
from diffalign.rewards import own
from diffalign.rewards.base import RewardError
from diffalign.rewards.composition import CompositeReward
from diffalign.training.plan import check_prompts
from diffalign.types import RewardOutput


@dataclass(frozen=True)
class Inputs:
    """Prompts and rewards of a run. Reward weights are loaded later, by `prepare()`."""

    train: list[Prompt]
    """Prompts to train on, none for runs on pairs or images."""
    held_out: list[Prompt]
    """Prompts of evaluations."""
    reward: CompositeReward
    """Trained reward."""
    watched: CompositeReward
    """Held-out rewards, which are evaluated but not trained on."""
    notices: tuple[str, ...] = ()
    """Notes for the user, printed before the run begins."""

    @property
    def prompts(self) -> tuple[list[Prompt], list[Prompt], tuple[str, ...]]:
        """Prompts to train on, prompts of evaluations, and notes, without the rewards."""
        return self.train, self.held_out, self.notices

    @property
    def digests(self) -> dict[str, str]:
        """Digests of prompts and reward files, by the setting that names them.

        A file may change while its name stays the same. The run folder stores the digests to notice that.
        """
        prompts = {
            name: digest(prompts)
            for name, prompts in (
                ("prompts.train", self.train),
                ("prompts.evaluation", self.held_out),
            )
            if prompts
        }
        files = {
            f"{setting}.{name}": own.digest(name.removeprefix(RANK))
            for setting, reward in (("rewards", self.reward), ("evaluation.rewards", self.watched))
            for name in reward.rewards
        }
        return prompts | {k: v for k, v in files.items() if v is not None}


def digest(prompts: Sequence[Prompt]) -> str:
    """Return a digest of the prompts' texts and metadata; order matters."""
    return of_json(told(prompts))


def check_source(config: AnyRunConfig) -> None:
    """Check that the pairs or images that a run trains on exist.

    Raises:
        UserError: they do not exist, or their layout is unknown.
    """
    check = source_check(config.algorithm.type)
    if check is not None:
        check(config)


def held_out_prompts(config: AnyRunConfig) -> list[Prompt]:
    """Return the prompts that a run is evaluated on."""
    limit = config.evaluation.max_prompts
    return _prompts(config.prompts.evaluation, setting="prompts.evaluation", limit=limit)


def _prompts(source: str, *, setting: str, limit: int | None = None) -> list[Prompt]:
    """Load prompts; an error names the setting."""
    try:
        return load_prompts(source, limit=limit)
    except PromptError as error:
        raise PromptError(str(error), setting=setting) from error


def held_out_rewards(config: AnyRunConfig) -> tuple[CompositeReward, CompositeReward]:
    """Return the trained reward, and the held-out rewards, which are only evaluated."""
    names = dict.fromkeys(config.evaluation.rewards, 1.0)
    watched = CompositeReward.from_config(names, setting="evaluation.rewards")
    reward = CompositeReward.from_config(config.rewards, by_group=config.trains_on_rewards)
    if not reward.pointwise().rewards and not watched.rewards:
        raise RewardError(
            f"{', '.join(config.rewards)} compares the images of a prompt with each other, so that held-out prompts "
            "have no score. Name a reward that scores single images in evaluation.rewards",
            setting="rewards",
        )
    return reward, watched


def score_with(reward: CompositeReward, watched: CompositeReward) -> Score:
    """Return a function that scores held-out images with trained and held-out rewards.

    Its values are those of the trained rewards that score single images, or of the held-out rewards if no trained one
    does. The details have both.
    """
    trained = reward.pointwise()

    def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> RewardOutput:
        others = watched.score(images, prompts, metadata)
        if not trained.rewards:
            return others
        output = trained.score(images, prompts, metadata)
        return replace(output, details={**output.details, **others.details})

    return score


def read_inputs(config: AnyRunConfig, *, earlier: Inputs | None = None) -> Inputs:
    """Read a run's prompts, look up its rewards, and check its pairs or images.

    Args:
        earlier: inputs of this run that were read before. Their prompts are used again. Rewards are not, because an
            accelerator that was made since determines their device.

    Raises:
        UserError: prompts, pairs or images cannot be read, a reward is unknown, or prompts lack what a reward needs.
    """
    train, held_out, notices = _read_prompts(config) if earlier is None else earlier.prompts
    reward, watched = held_out_rewards(config)
    tasks = config.training_prompts
    if tasks is not None and config.trains_on_rewards:
        _check_metadata(reward, train, setting="prompts.train", value=tasks.train)
    for part in (reward, watched):
        _check_metadata(
            part, held_out, setting="prompts.evaluation", value=config.prompts.evaluation
        )
    return Inputs(train, held_out, reward, watched, notices)


def _read_prompts(config: AnyRunConfig) -> tuple[list[Prompt], list[Prompt], tuple[str, ...]]:
    """Return the prompts to train on, those of evaluations, and notes for the user."""
    check_source(config)
    train, notices = [], []
    tasks = config.training_prompts
    if tasks is not None:
        train = _prompts(tasks.train, setting="prompts.train")
        notices = check_prompts(train, config)
    return train, held_out_prompts(config), tuple(notices)


def _check_metadata(
    reward: CompositeReward, prompts: Sequence[Prompt], *, setting: str, value: str
) -> None:
    """Raise RewardError if the prompts of a setting lack metadata that a reward needs."""
    try:
        reward.check_metadata([p.metadata for p in prompts])
    except RewardError as error:
        raise RewardError(
            f"{error}, or choose `rewards` that need no metadata (`diffalign list rewards`), for instance {{jpeg: 1}}",
            setting=setting,
            value=value,
        ) from error
