"""FID on Shapes with features of shapes-clip, against correct images of the held-out prompts."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from diffalign.evaluation.fid import FeatureSet, collect, compare
from diffalign.evaluation.fid_sides import reference_side
from diffalign.rewards.features import load_network


class Eyes:
    """FID of images against correct renderings. The feature network is loaded once."""

    @cached_property
    def network(self) -> Any:
        return load_network("shapes_clip")

    @cached_property
    def reference(self) -> FeatureSet:
        """Return the features of correct images of the held-out prompts."""
        return reference_side("shapes:held_out", batch_size=64)(self.network)()

    def fid(self, images: Tensor) -> float:
        """Return the FID of images (N, 3, H, W) uint8."""
        features = collect(self.network, [self.network(images)], list(range(len(images))), {})
        return float(compare(features, self.reference)["fid"])
