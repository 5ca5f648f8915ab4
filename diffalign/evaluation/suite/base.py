"""Records of the suite: a benchmark, its files, and what it measures on the images of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffalign.core.errors import UserError
from diffalign.data.prompts import Prompt
from diffalign.judges.base import Question, Reply

OFFICIAL, CORRECTED = "official", "corrected"
QUICK = 8
"""Divisor of the number of prompts of a quick run, and of the chance line."""
Replies = Mapping[str, Reply]
"""Replies about one image, by the key of the question."""


class SuiteError(UserError, ValueError):
    """Benchmark, file or folder that the suite cannot use."""


@dataclass(frozen=True)
class DataFile:
    """Published file of a benchmark, at one commit.

    Attributes:
        repository: GitHub repository (owner/name), or a hub data set as "datasets/owner/name".
        commit: commit at which the file is read.
        path: path within the repository.
        sha256: digest of the file's content; None where the file has not been seen.
    """

    repository: str
    commit: str
    path: str
    sha256: str | None

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Measure:
    """Number of one image, or of one prompt, that counts towards a figure.

    Attributes:
        name: figure that the number counts towards, such as "skill/count".
        low: smallest value that the replies allow.
        high: largest value; equal to `low` where all is known.
        weight: weight in the mean over all measures of the name.
        image: number of the image within its prompt; None for a number of all its images.
    """

    name: str
    low: float
    high: float
    weight: float = 1.0
    image: int | None = None


Weights = dict[str, dict[str, float]]
"""Combined figures: the weight of each part, by the figure's name."""


def no_combination(names: Sequence[str]) -> Weights:
    """Return no combined figure."""
    return {}


@dataclass(frozen=True)
class Benchmark:
    """Benchmark of the suite.

    Attributes:
        name: name in the registry.
        summary: line for lists.
        load: reads the prompts from the files, in the order of `files`.
        questions: returns the questions about one image of a prompt, under a rule.
        measures: returns what the replies about all images of a prompt are worth, under a rule.
        headline: name of the figure that stands for the benchmark.
        files: published files; empty for built-in prompts.
        licence: licence of the files.
        images_per_prompt: images that the official rule draws.
        judge: judge of the official rule, "id@revision" or "exact"; empty without questions to a judge.
        combine: returns the figures that are weighted sums of others.
        scale: factor with which figures are printed, 100 or 1.
        published: published headline of models, with the source.
        layout: name of the layout of `export`; empty for none.
        language: script of the prompts, "latin" or "cjk" or "any".
        rewards: rewards that are asked for by default, for benchmarks without a judge.
        features: network of the diversity by default.
        note: sentence that stands below the benchmark's figures.
    """

    name: str
    summary: str
    load: Callable[[Sequence[Path]], list[Prompt]]
    questions: Callable[[Prompt, str], list[Question]]
    measures: Callable[[Prompt, Sequence[Replies], str], list[Measure]]
    headline: str
    files: tuple[DataFile, ...] = ()
    licence: str = "Apache-2.0"
    images_per_prompt: int = 1
    judge: str = ""
    combine: Callable[[Sequence[str]], Weights] = no_combination
    scale: float = 100.0
    published: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    layout: str = ""
    language: str = "latin"
    rewards: tuple[str, ...] = ()
    features: str = "dinov2"
    note: str = ""

    @property
    def folder(self) -> str:
        """Name of the benchmark's folder."""
        return self.name.replace(":", "-")


def mean_of(names: Sequence[str], prefix: str) -> dict[str, float]:
    """Return equal weights of all figures whose name begins with `prefix`."""
    parts = [name for name in names if name.startswith(prefix)]
    return {name: 1 / len(parts) for name in parts}
