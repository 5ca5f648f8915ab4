"""Objects in images by Mask2Former (Cheng et al. 2022): GenEval's detector, with transformers' weights.

GenEval's own weights are mmdet's; these have the same design (Swin-S, COCO instances) and other numbers, so a result
names them. transformers' post-processing shrinks every mask to 384 x 384 pixels; here mask logits are interpolated to
the image's size, as mmdet does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation, PreTrainedModel

from diffalign.rewards.preprocessing import Preprocessing, resize
from diffalign.rewards.weights import device, loading, newest, revision_of, tower_dtype

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MICRO_BATCH = 8


@dataclass(frozen=True)
class Instances:
    """Objects of one image: `labels` (N,) class numbers, `scores` (N,) in 0..1, `boxes` (N, 4) x1, y1, x2, y2 in pixels
    with x2, y2 one past the last, `masks` (N, H, W) bool."""

    labels: Tensor
    scores: Tensor
    boxes: Tensor
    masks: Tensor


@dataclass(frozen=True)
class DetectorPreprocessing(Preprocessing):
    """The shortest side to `size` unless the longest would pass `longest`, both up to multiples of `divisor`, bilinear
    as Pillow does it; then (x / 255 - mean) / std."""

    size: int = 800
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    longest: int = 1333
    divisor: int = 32

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to (B, 3, H', W') uint8."""
        height, width = self.resized(*images.shape[-2:])
        return resize(images, height, width, resample="bilinear")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """H', W' of an image."""
        short, long = sorted((height, width))
        exact = min(float(self.size), self.longest * short / long)
        shortest = round(exact)

        def side(length: int) -> int:
            if short != shortest:
                length = shortest if length == short else int(exact * length / short)
            return math.ceil(length / self.divisor) * self.divisor

        return side(height), side(width)


class ObjectDetector:
    """A Mask2Former for instances, computing in `dtype`: its weights and the places that it samples at stay float32,
    for a place in bfloat16 would be half a pixel off."""

    def __init__(
        self,
        model: PreTrainedModel,
        preprocessing: DetectorPreprocessing | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.preprocessing = preprocessing or DetectorPreprocessing()
        self.dtype, self.revision = dtype, revision

    @classmethod
    def from_pretrained(cls, model_id: str, *, revision: str | None = None) -> ObjectDetector:
        """Weights from a folder or the hub, there of `revision` or the newest commit, which `revision` of the result
        names.

        Raises:
            RewardError: they are not to be had.
        """
        with loading(model_id):
            commit = revision_of(model_id, revision) or newest(model_id)
            model = Mask2FormerForUniversalSegmentation.from_pretrained(
                model_id, revision=commit, dtype=torch.float32
            )
            return cls(model.to(device()), dtype=tower_dtype(), revision=commit)

    @torch.no_grad()
    def __call__(self, images: Tensor, *, threshold: float) -> list[Instances]:
        """All objects of B images (B, 3, H, W) uint8 whose score is above `threshold`, on the CPU."""
        found: list[Instances] = []
        for part in images.split(MICRO_BATCH):
            pixels = self.preprocessing(part.to(self.model.device))
            with torch.autocast(
                pixels.device.type, self.dtype, enabled=self.dtype != torch.float32
            ):
                output = self.model(pixel_values=pixels)
            size = (part.shape[-2], part.shape[-1])
            for classes, masks in zip(
                output.class_queries_logits, output.masks_queries_logits, strict=True
            ):
                found.append(instances(classes.float(), masks.float(), size, threshold=threshold))
        return found


def instances(
    class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], *, threshold: float
) -> Instances:
    """Objects of one image.

    Args:
        class_logits: (Q, C + 1), the last is "no object".
        mask_logits: (Q, h, w) of the queries, at any resolution.
        size: H, W of the image.
        threshold: least score, which is the class's probability times the mean probability of its mask's pixels. As in
            mmdet, the Q best pairs of query and class are looked at.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    queries, classes = probabilities.shape
    scores, index = probabilities.flatten().topk(min(queries, probabilities.numel()))
    index = index[scores > threshold]  # a mask's mean probability is at most 1
    scores, labels, query = scores[: len(index)], index % classes, index // classes
    if len(index) == 0:
        empty = torch.zeros(0)
        return Instances(empty.long(), empty, torch.zeros(0, 4), torch.zeros(0, *size).bool())
    logits = F.interpolate(mask_logits[None, query], size, mode="bilinear", align_corners=False)[0]
    masks = logits > 0
    area = masks.flatten(1).sum(1)
    inside = (logits.sigmoid() * masks).flatten(1).sum(1) / (area + 1e-6)
    scores = scores * inside
    keep = (scores > threshold) & (area > 0)
    masks = masks[keep]
    return Instances(labels[keep].cpu(), scores[keep].cpu(), boxes(masks).cpu(), masks.cpu())


def boxes(masks: Tensor) -> Tensor:
    """(N, H, W) bool, none of them empty, to (N, 4) float: x1, y1, x2, y2, the last two one past the last pixel."""
    ends = []
    for dim in (1, 2):  # columns, then rows
        line = masks.any(dim).int()
        first = line.argmax(1)
        last = line.shape[1] - line.flip(1).argmax(1)
        ends.append((first, last))
    (x1, x2), (y1, y2) = ends
    return torch.stack([x1, y1, x2, y2], 1).float()
