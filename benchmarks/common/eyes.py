"""FID on Shapes with features of shapes-clip, against correct images of the held-out prompts."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from diffalign.data.prompts import load_prompts
from diffalign.evaluation.fid import FeatureSet, collect, compare, drawn_batches, extract
from diffalign.rewards.features import load_network
from diffalign.shapes.world import render, sample_scene


class Eyes:
    """FID of images against correct renderings. The feature network is loaded once."""

    @cached_property
    def network(self) -> Any:
        return load_network("shapes_clip")

    @cached_property
    def reference(self) -> FeatureSet:
        """Return the features of correct images of the held-out prompts."""
        batches = drawn_batches(
            lambda p, seed: render(sample_scene(p.metadata, np.random.default_rng(seed))),
            load_prompts("shapes:held_out"),
            images_per_prompt=8,
            batch_size=64,
        )
        return extract(self.network, batches, {})

    def fid(self, images: Tensor) -> float:
        """Return the FID of images (N, 3, H, W) uint8."""
        features = collect(self.network, [self.network(images)], list(range(len(images))), {})
        return float(compare(features, self.reference)["fid"])
