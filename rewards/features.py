"""Networks whose features FID and related distances compare.

Distances are comparable only for the same network, so a result names it.
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import Dinov2Model

from diffalign.core.errors import UserError
from diffalign.rewards.base import RewardError
from diffalign.rewards.clip import ClipScorer
from diffalign.rewards.inception import FIDInception
from diffalign.rewards.preprocessing import Preprocessing
from diffalign.rewards.weights import CLIP_L_336, REVISIONS, device, loading, revision_of
from diffalign.shapes import CHECKPOINTS

DINO = "facebook/dinov2-base"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_HASH = "6726825d"
"""First digits of the sha256 of Inception's weights, which their file name contains."""


class UnknownNetwork(UserError, ValueError):
    """Name of a feature network that does not exist."""


class FeatureNetwork(ABC):
    """Network from images to features."""

    name: str
    weights: str
    resize: str
    """Description of the resizing of images."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Return features (B, D) float32 on the CPU, of images (B, 3, H, W) uint8."""


class InceptionFeatures(FeatureNetwork):
    """Features of FID's own Inception v3, equal to those of torch-fidelity."""

    name = "inception"
    weights = "TensorFlow's Inception v3 of 2015-12-05, pool_3, as ported by torch-fidelity"
    resize = "299 x 299, bilinear as in TensorFlow 1 (no antialiasing)"

    def __init__(self, file: str | None = None) -> None:
        """Load the weights.

        Args:
            file: released weights on this machine; None downloads them.
        """
        model = FIDInception()
        try:
            with loading(file or INCEPTION_URL):
                model.load_state_dict(self._read(file))
        except RewardError as error:
            raise RewardError(
                f"{error}; network inception:FILE reads them from a file, network shapes_clip needs no download"
            ) from error
        self.model = model.eval().requires_grad_(False).to(device())

    def _read(self, file: str | None) -> dict[str, Tensor]:
        if file is None:  # the name has the hash that the content must have
            return torch.hub.load_state_dict_from_url(
                INCEPTION_URL, map_location="cpu", check_hash=True, weights_only=True
            )
        content = Path(file).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if not digest.startswith(INCEPTION_HASH):  # other weights, other features
            self.weights = f"an Inception v3 of sha256 {digest[:16]}"
        state: dict[str, Tensor] = torch.load(
            io.BytesIO(content), map_location="cpu", weights_only=True
        )
        return state

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        features: Tensor = self.model(images.to(next(self.model.parameters()).device))
        return features.cpu()


class ClipFeatures(FeatureNetwork):
    """Image embeddings of CLIP, which CMMD compares."""

    name = "clip"
    weights = f"{CLIP_L_336} at {REVISIONS[CLIP_L_336][:12]}"
    resize = "336 x 336, bicubic as in Pillow, the central square"

    def __init__(self) -> None:
        self.scorer = ClipScorer.from_pretrained(CLIP_L_336, dtype=torch.float32)

    def __call__(self, images: Tensor) -> Tensor:
        return self.scorer.image_features(images).cpu()


class ShapesFeatures(FeatureNetwork):
    """Image features of shapes-clip, before the projection to the space of texts.

    They replace Inception's features without a download.
    """

    name = "shapes_clip"
    weights = "shapes-clip, pooled output of the vision tower"
    resize = "64 x 64, bicubic as in Pillow"

    def __init__(self) -> None:
        self.scorer = ClipScorer.from_pretrained(
            str(CHECKPOINTS / "shapes-clip"), dtype=torch.float32
        )

    def __call__(self, images: Tensor) -> Tensor:
        return self.scorer.pooled_features(images).cpu()


class DinoFeatures(FeatureNetwork):
    """CLS token of DINOv2, which is common for the diversity of images."""

    name = "dinov2"
    resize = "224 x 224, bicubic as in Pillow, the central square"

    def __init__(self, place: str = DINO) -> None:
        """Load the weights.

        Args:
            place: hub id, or a folder on this machine.
        """
        with loading(place):
            where = {"revision": revision_of(place)} if revision_of(place) else {}
            self.model = Dinov2Model.from_pretrained(place, **where)
        self.model = self.model.eval().requires_grad_(False).to(device())
        commit = revision_of(place) or getattr(self.model.config, "_commit_hash", None)
        self.weights = f"{place} at {str(commit)[:12]}"
        self.preprocessing = Preprocessing(
            size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pixels = self.preprocessing(images.to(device()))
        features: Tensor = self.model(pixel_values=pixels).last_hidden_state[:, 0]
        return features.float().cpu()


NETWORKS: dict[str, Callable[..., FeatureNetwork]] = {
    c.name: c for c in (InceptionFeatures, ClipFeatures, ShapesFeatures, DinoFeatures)
}


def load_network(name: str) -> FeatureNetwork:
    """Load a feature network by name; "inception:FILE" reads Inception's weights from a file.

    Raises:
        UnknownNetwork: no network has this name.
        RewardError: the weights cannot be loaded.
    """
    kind, _, file = name.partition(":")
    if kind not in NETWORKS or (file and kind != InceptionFeatures.name):
        raise UnknownNetwork(f"network: unknown {name!r}; known are {', '.join(NETWORKS)}")
    return NETWORKS[kind](file) if file else NETWORKS[kind]()
