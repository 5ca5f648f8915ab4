"""Sets of images as features: from a folder, a model or Shapes itself; saved, loaded, compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffalign.core.errors import UserError
from diffalign.core.files import aside, check_target
from diffalign.data.images import CaptionedImage, batches
from diffalign.data.prompts import Prompt
from diffalign.evaluation import distances
from diffalign.evaluation.distances import Moments
from diffalign.evaluation.intervals import Estimate, mean
from diffalign.evaluation.score import image_seeds
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampler import Sampler

NEIGHBOURS = 3
"""k of precision and recall."""
UNKNOWN = "unknown"
"""Network and resizing of statistics that another program made."""
TOLERANCE = 1e-4
"""Error of a covariance, relative to its largest eigenvalue, that single precision explains."""
FEW = 10
"""Images per feature dimension below which the bias of FID is pointed out."""
COUNTS = ("images", "unreadable", "not_finite")
Batches = Iterator[tuple[Tensor, list[int]]]
"""(B, 3, H, W) uint8, and the number of each image's prompt."""


class FeatureError(UserError, ValueError):
    """Features that cannot be had or compared."""


class Network(Protocol):
    """Feature network, as far as this module needs it."""

    name: str
    weights: str
    resize: str

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class FeatureSet:
    """Features of a set of images, made by `network`.

    The `moments` are always there, the `features` (N, D) and each one's prompt `group` (N,) only where they were saved.
    `about` says what the images were.
    """

    network: str
    resize: str
    moments: Moments
    features: Tensor | None = None
    group: Tensor | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def dimension(self) -> int:
        """Numbers per feature."""
        return len(self.moments.mean)

    def save(self, file: Path) -> Path:
        """Write the statistics as .npz and return the path.

        The suffix is added if `file` lacks it."""
        file = statistics_path(file)
        arrays: dict[str, Any] = {
            "mu": self.moments.mean.numpy(),
            "sigma": self.moments.covariance.numpy(),
        }
        if self.features is not None and self.group is not None:
            arrays |= {"features": self.features.numpy(), "group": self.group.numpy()}
        notes = {"network": self.network, "resize": self.resize, "n": self.moments.n, **self.about}
        file.parent.mkdir(parents=True, exist_ok=True)
        # an open file: to a name numpy would add a suffix of its own
        with aside(file) as hidden, hidden.open("wb") as opened:
            np.savez(opened, **arrays, notes=np.array(json.dumps(notes)))
        return file

    @classmethod
    def load(cls, file: Path) -> FeatureSet:
        """Load a file of `save`, or any .npz with `mu` and `sigma`.

        The latter (pytorch-fid's) does not name its network.

        Raises:
            FeatureError: the file is missing or damaged, or its arrays are not finite or do not fit each other.
        """
        try:
            with np.load(file, allow_pickle=False) as opened:
                arrays = {name: opened[name] for name in opened.files}
            notes = dict(json.loads(str(arrays.get("notes", np.array("{}")))))
            tensors = {
                name: torch.from_numpy(values)
                for name, values in arrays.items()
                if name in ("mu", "sigma", "features", "group")
            }
            n = int(notes.pop("n", 0))
            for name in (name for name, values in tensors.items() if values.is_complex()):
                raise TypeError(f"{name} holds complex numbers")
            mean, covariance = tensors["mu"].double(), tensors["sigma"].double()
        # a damaged archive raises whatever zipfile, zlib and numpy run into
        except Exception as error:
            raise FeatureError(
                f"{file} holds no statistics of features: {type(error).__name__}: {error}. Expected an .npz with mu "
                "and sigma"
            ) from error
        features, group = tensors.get("features"), tensors.get("group")
        _check_statistics(file, mean, covariance, features, group)
        network, resize = notes.pop("network", UNKNOWN), notes.pop("resize", UNKNOWN)
        return cls(network, resize, Moments(n, mean, covariance), features, group, notes)

    def check_network(self, network: Network) -> None:
        """Raise FeatureError where features of `network` cannot be compared with these."""
        name = _full_name(network)
        if self.network not in (UNKNOWN, name):
            raise FeatureError(
                f"features of different networks cannot be compared: {self.network} and {name}"
            )
        dimension = network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape[1]
        if dimension != self.dimension:
            raise FeatureError(
                f"features of {dimension} ({name}) and {self.dimension} dimensions cannot be compared"
            )


def statistics_path(file: Path) -> Path:
    """Return the path of a statistics file, which ends in .npz.

    Raises:
        UsageError: the path is a folder, or cannot be written.
    """
    path = file if file.suffix.lower() == ".npz" else file.with_name(f"{file.name}.npz")
    check_target(path, setting="save_statistics", folder=False)
    return path


def _check_statistics(
    file: Path, mean: Tensor, covariance: Tensor, features: Tensor | None, group: Tensor | None
) -> None:
    """Raise FeatureError where arrays do not fit each other or hold no numbers."""
    shapes = f"mu is {tuple(mean.shape)} and sigma {tuple(covariance.shape)}"
    if mean.dim() != 1 or len(mean) == 0 or covariance.shape != (len(mean), len(mean)):
        raise FeatureError(f"{file}: {shapes}; expected (D,) and (D, D) of the same features")
    rows = 0 if features is None else len(features)
    if (features is None) != (group is None) or (
        features is not None
        and group is not None
        and (features.shape != (rows, len(mean)) or group.shape != (rows,))
    ):
        raise FeatureError(f"{file}: features and group do not fit mu of {len(mean)} numbers")
    for name, values in (("mu", mean), ("sigma", covariance), ("features", features)):
        if values is not None and not values.isfinite().all():
            raise FeatureError(
                f"{file}: {name} holds NaN or infinity; compute the statistics again"
            )
    _check_covariance(file, covariance)


def _check_covariance(file: Path, sigma: Tensor) -> None:
    """Raise FeatureError for a matrix that is no covariance of real features."""
    values = torch.linalg.eigvalsh(sigma)
    error = TOLERANCE * values.abs().max()
    why = "is not symmetric" if (sigma - sigma.T).abs().max() > error else ""
    if not why and values[0] < -error:
        why = f"has the negative eigenvalue {float(values[0]):.3g}"
    if why:
        raise FeatureError(f"{file}: sigma {why}: no covariance; compute the statistics again")


def extract(
    network: Network,
    images: Batches,
    about: dict[str, Any],
    *,
    gather: Callable[[list[Any]], list[Any]] = list,
) -> FeatureSet:
    """Return the features of all images.

    Args:
        gather: puts the lists of all processes together.

    Raises:
        FeatureError: there are fewer than two, or a feature is not finite.
    """
    parts = []
    for pixels, numbers in images:
        parts.append((network(pixels).float(), numbers))
    parts = gather(parts)
    for each in gather([dict(about)])[1:]:
        for key in COUNTS:
            if key in about:
                about[key] += each[key]
    return collect(network, [f for f, _ in parts], [n for _, g in parts for n in g], about)


def collect(
    network: Network, features: Sequence[Tensor], group: Sequence[int], about: dict[str, Any]
) -> FeatureSet:
    """Return the feature set of parts, such as those of several processes."""
    if sum(map(len, features)) < 2:
        raise FeatureError(f"a distribution needs at least two images: {about}")
    table = torch.cat(list(features))
    if not table.isfinite().all():
        raise FeatureError(f"features of {network.name} are not finite: {about}")
    return FeatureSet(
        _full_name(network),
        network.resize,
        distances.moments(table),
        table,
        torch.tensor(group),
        about,
    )


def _full_name(network: Network) -> str:
    return f"{network.name} ({network.weights})"


def folder_batches(
    images: Sequence[CaptionedImage],
    about: dict[str, Any],
    *,
    batch_size: int,
    process: tuple[int, int] = (0, 1),
) -> Batches:
    """Yield the readable images of a folder, and count the images in `about`.

    The argument `process`: number and count of the processes that share the work in turns of an image.
    """
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
    drawing: Drawing,
    *,
    process: tuple[int, int] = (0, 1),
) -> Batches:
    """Draw the images of `evaluate_model`, `images_per_prompt` of every prompt.

    Images that are not finite are left out and counted in `about`. `process`: number and count of the processes that
    share the work in turns of a batch.
    """
    rows = [(i, p.text) for i, p in enumerate(prompts) for _ in range(drawing.images_per_prompt)]
    seeds = image_seeds(drawing, len(rows))
    sampler = Sampler(model, drawing)
    about |= {"images": 0, "not_finite": 0}
    first, count = process
    for part in list(drawing.batches(len(rows)))[first::count]:
        samples = sampler.images([text for _, text in rows[part]], seeds[part])
        finite = samples.finite
        about["images"] += int(finite.sum())
        about["not_finite"] += int((~finite).sum())
        groups = [g for (g, _), good in zip(rows[part], finite.tolist(), strict=True) if good]
        if groups:
            yield samples.images[finite], groups


def drawn_batches(
    draw: Callable[[Prompt, int], np.ndarray],
    prompts: Sequence[Prompt],
    *,
    images_per_prompt: int,
    batch_size: int,
) -> Batches:
    """Yield images that a program draws: `draw(prompt, seed)` returns (H, W, 3) uint8."""
    rows = [(number, p) for number, p in enumerate(prompts) for _ in range(images_per_prompt)]
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        pixels = np.stack([draw(p, start + i) for i, (_, p) in enumerate(part)])
        yield torch.from_numpy(pixels).permute(0, 3, 1, 2), [number for number, _ in part]


def compare(generated: FeatureSet, reference: FeatureSet) -> dict[str, Any]:
    """Return all distances that two sets allow.

    FID is always there; KID, CMMD, precision and recall need the features of both sets.

    Raises:
        FeatureError: the sets were seen by different networks or have different dimensions.
    """
    return measure(generated, reference)[0]


def measure(
    generated: FeatureSet, reference: FeatureSet
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the distances of `compare`, and for precision and recall which images are covered (N,).

    Raises:
        FeatureError: the sets were seen by different networks or have different dimensions.
    """
    networks = {s.network for s in (generated, reference)} - {UNKNOWN}
    if len(networks) > 1:
        raise FeatureError(f"features of different networks cannot be compared: {networks}")
    shapes = [len(s.moments.mean) for s in (generated, reference)]
    if shapes[0] != shapes[1]:
        raise FeatureError(f"features of {shapes[0]} and {shapes[1]} dimensions cannot be compared")
    inside: dict[str, Tensor] = {}
    values: dict[str, Any] = {
        "fid": distances.frechet_distance(generated.moments, reference.moments)
    }
    if generated.features is not None and generated.group is not None:
        values["diversity_within_prompt"] = distances.diversity(generated.features, generated.group)
    if generated.features is not None and reference.features is not None:
        a, b = generated.features, reference.features
        values["kid"], values["kid_std"] = distances.kernel_distance(a, b)
        values["cmmd"] = distances.cmmd(a, b)
        if min(len(a), len(b)) > NEIGHBOURS:
            inside["precision"] = distances.covered(a, b, NEIGHBOURS)
            inside["recall"] = distances.covered(b, a, NEIGHBOURS)
            values |= {name: float(x.double().mean()) for name, x in inside.items()}
    return {k: v if np.isfinite(v) else None for k, v in values.items()}, inside


def distance_intervals(
    generated: FeatureSet,
    reference: FeatureSet,
    values: Mapping[str, Any],
    inside: Mapping[str, Tensor],
) -> dict[str, dict[str, Any]]:
    """Return the 95 % intervals of KID, precision and recall, from what `measure` returns."""
    result: dict[str, dict[str, Any]] = {}
    a, b = generated.features, reference.features
    if a is None or b is None or generated.group is None or reference.group is None:
        return result
    if values.get("kid") is not None:
        bounds = distances.kernel_interval(a, b, generated.group, values["kid"])
        if bounds is not None:
            estimate = Estimate(values["kid"], *bounds, len(a), len(generated.group.unique()))
            result["kid"] = estimate.to_dict()
    groups = {"precision": generated.group, "recall": reference.group}
    for name, covered in inside.items():
        share = mean(covered.double().numpy(), [str(int(g)) for g in groups[name]])
        if share is not None:
            result[name] = share.to_dict()
    return result


def warnings(generated: FeatureSet, reference: FeatureSet) -> list[str]:
    """Return what makes a FID of these two sets doubtful, in whole sentences."""
    dimension = generated.dimension
    sentences = []
    for name, side in (("generated", generated), ("reference", reference)):
        n = side.moments.n
        if n == 0:
            sentences.append(
                f"The number of {name} images is unknown: the statistics do not say it."
            )
        elif n <= dimension:
            sentences.append(
                f"{n} {name} images are too few for FID with {dimension} features: their covariance has at most rank "
                f"{n - 1}, and FID is far too high. Use KID, which has no such bias, or at least {FEW * dimension} "
                "images."
            )
        elif n < FEW * dimension:
            sentences.append(
                f"{n} {name} images are few for FID with {dimension} features: it is biased upwards. Compare only FIDs "
                f"of the same number of images, or use KID; from about {FEW * dimension} images on the bias is small."
            )
    return sentences
