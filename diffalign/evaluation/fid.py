"""Sets of images as features: from a folder, a model or Shapes itself; saved, loaded, compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from diffalign.config import EvaluationConfig
from diffalign.core.errors import UserError
from diffalign.core.files import aside
from diffalign.data.images import CaptionedImage, batches
from diffalign.data.prompts import Prompt
from diffalign.evaluation import distances
from diffalign.evaluation.distances import Moments
from diffalign.evaluation.score import image_seeds, render
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.sampling import EmbedCache

NEIGHBOURS = 3
"""k of precision and recall."""
COUNTS = ("images", "unreadable", "not_finite")
Batches = Iterator[tuple[Tensor, list[int]]]
"""(B, 3, H, W) uint8, and the number of each image's prompt."""


class FeatureError(UserError, ValueError):
    """Features that cannot be had or compared."""


class Network(Protocol):
    """What of a feature network is needed here."""

    name: str
    weights: str
    resize: str

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class FeatureSet:
    """`moments` of the features of a set of images made by `network`; the `features` (N, D) and each one's prompt
    `group` (N,) where they were kept; `about` says what the images were."""

    network: str
    resize: str
    moments: Moments
    features: Tensor | None = None
    group: Tensor | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """As .npz."""
        arrays: dict[str, Any] = {
            "mu": self.moments.mean.numpy(),
            "sigma": self.moments.covariance.numpy(),
        }
        if self.features is not None and self.group is not None:
            arrays |= {"features": self.features.numpy(), "group": self.group.numpy()}
        notes = {"network": self.network, "resize": self.resize, "n": self.moments.n, **self.about}
        file.parent.mkdir(parents=True, exist_ok=True)
        with aside(file) as hidden:
            np.savez(hidden, **arrays, notes=np.array(json.dumps(notes)))

    @classmethod
    def load(cls, file: Path) -> FeatureSet:
        """Of `save`, or any .npz with `mu` and `sigma` (pytorch-fid's), whose network nobody knows.

        Raises:
            FeatureError: the file is none.
        """
        try:
            with np.load(file, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
            notes = json.loads(str(arrays.get("notes", np.array("{}"))))
            mean, covariance = (torch.from_numpy(arrays[k]).double() for k in ("mu", "sigma"))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise FeatureError(f"{file} holds no statistics of features: {error}") from error
        features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
        group = torch.from_numpy(arrays["group"]) if "group" in arrays else None
        moments = Moments(notes.pop("n", 0), mean, covariance)
        network, resize = notes.pop("network", "unknown"), notes.pop("resize", "unknown")
        return cls(network, resize, moments, features, group, notes)


def extract(
    network: Network,
    images: Batches,
    about: dict[str, Any],
    *,
    gather: Callable[[list[Any]], list[Any]] = list,
    on_batch: Callable[[int], None] | None = None,
) -> FeatureSet:
    """Return the features of all images.

    Args:
        gather: puts the lists of all processes together.
        on_batch: gets the number of images of each batch, once its features are there.

    Raises:
        FeatureError: there are fewer than two, or a feature is not finite.
    """
    parts = []
    for pixels, numbers in images:
        parts.append((network(pixels).float(), numbers))
        if on_batch is not None:
            on_batch(len(numbers))
    parts = gather(parts)
    for each in gather([dict(about)])[1:]:
        for key in COUNTS:
            if key in about:
                about[key] += each[key]
    return collect(network, [f for f, _ in parts], [n for _, g in parts for n in g], about)


def collect(
    network: Network, features: Sequence[Tensor], group: Sequence[int], about: dict[str, Any]
) -> FeatureSet:
    """From features in parts, such as those of several processes."""
    if sum(map(len, features)) < 2:
        raise FeatureError(f"a distribution needs at least two images: {about}")
    table = torch.cat(list(features))
    if not table.isfinite().all():
        raise FeatureError(f"features of {network.name} are not finite: {about}")
    name = f"{network.name} ({network.weights})"
    return FeatureSet(
        name, network.resize, distances.moments(table), table, torch.tensor(group), about
    )


def folder_batches(
    images: Sequence[CaptionedImage],
    about: dict[str, Any],
    *,
    batch_size: int,
    process: tuple[int, int] = (0, 1),
) -> Batches:
    """The readable images of a folder, counted in `about` as those that are not; of several processes (number and
    count) each reads every so many-th."""
    group: dict[str, int] = {}
    numbers = [group.setdefault(x.prompt.text or str(x.path), len(group)) for x in images]
    about["formats"] = sorted({x.path.suffix.lower().lstrip(".") for x in images})
    about |= {"images": 0, "unreadable": 0}
    first, step = process
    images, numbers = images[first::step], numbers[first::step]
    for rows, pixels, _ in batches(images, size=batch_size):
        about["unreadable" if pixels is None else "images"] += len(rows)
        if pixels is not None:
            yield pixels, [numbers[i] for i in rows]


def model_batches(
    model: TextToImageModel,
    prompts: Sequence[Prompt],
    about: dict[str, Any],
    config: EvaluationConfig,
    *,
    micro_batch_size: int,
    process: tuple[int, int] = (0, 1),
    **sizes: Any,
) -> Batches:
    """`config.images_per_prompt` images of every prompt, those of `evaluate_model`; of several processes (number and
    count) each makes every so many-th batch. Images that are not finite are left out and counted in `about`."""
    n = config.images_per_prompt
    wanted = [(group, p) for group, p in enumerate(prompts) for _ in range(n)]
    seeds = image_seeds(config, len(wanted))
    cache = EmbedCache(model)
    about |= {"images": 0, "not_finite": 0}
    number, count = process
    for start in range(number * micro_batch_size, len(wanted), count * micro_batch_size):
        part = slice(start, start + micro_batch_size)
        texts = [p for _, p in wanted[part]]
        images, finite = render(
            model,
            texts,
            seeds[part],
            config,
            micro_batch_size=micro_batch_size,
            cache=cache,
            **sizes,
        )
        about["images"] += int(finite.sum())
        about["not_finite"] += int((~finite).sum())
        kept = [g for (g, _), good in zip(wanted[part], finite.tolist(), strict=True) if good]
        if kept:
            yield images[finite], kept


def drawn_batches(
    draw: Callable[[Prompt, int], np.ndarray],
    prompts: Sequence[Prompt],
    *,
    images_per_prompt: int,
    batch_size: int,
) -> Batches:
    """Images that are drawn rather than generated: `draw(prompt, seed)` gives (H, W, 3) uint8."""
    wanted = [(number, p) for number, p in enumerate(prompts) for _ in range(images_per_prompt)]
    for start in range(0, len(wanted), batch_size):
        part = wanted[start : start + batch_size]
        pixels = np.stack([draw(p, start + i) for i, (_, p) in enumerate(part)])
        yield torch.from_numpy(pixels).permute(0, 3, 1, 2), [number for number, _ in part]


def compare(generated: FeatureSet, reference: FeatureSet) -> dict[str, Any]:
    """All distances that the two sets allow: FID always; KID, CMMD, precision and recall where features were kept.

    Raises:
        FeatureError: the sets were seen by different networks or have different dimensions.
    """
    known = {s.network for s in (generated, reference)} - {"unknown"}
    if len(known) > 1:
        raise FeatureError(f"features of different networks cannot be compared: {known}")
    shapes = [len(s.moments.mean) for s in (generated, reference)]
    if shapes[0] != shapes[1]:
        raise FeatureError(f"features of {shapes[0]} and {shapes[1]} dimensions cannot be compared")
    found: dict[str, Any] = {
        "fid": distances.frechet_distance(generated.moments, reference.moments)
    }
    if generated.features is not None and generated.group is not None:
        found["diversity_within_prompt"] = distances.diversity(generated.features, generated.group)
    if generated.features is not None and reference.features is not None:
        a, b = generated.features, reference.features
        found["kid"], found["kid_std"] = distances.kernel_distance(a, b)
        found["cmmd"] = distances.cmmd(a, b)
        if min(len(a), len(b)) > NEIGHBOURS:
            found["precision"], found["recall"] = distances.precision_recall(a, b, k=NEIGHBOURS)
    return {k: v if np.isfinite(v) else None for k, v in found.items()}
