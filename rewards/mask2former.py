"""Object detection by Mask2Former (Cheng et al. 2022), with transformers' weights.

GenEval's own weights are mmdet's. These weights have the same design (Swin-S, COCO instances) and other values, so
results name them. The post-processing of transformers shrinks every mask to 384 x 384 pixels; this module interpolates
mask logits to the image's size, like mmdet.
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
    """Objects of one image.

    Attributes:
        labels: (N,), numbers of the classes.
        scores: (N,), in 0..1.
        boxes: (N, 4), x1, y1, x2, y2 in pixels, with x2 and y2 one past the last pixel.
        masks: (N, H, W) bool.
    """

    labels: Tensor
    scores: Tensor
    boxes: Tensor
    masks: Tensor


@dataclass(frozen=True)
class DetectorPreprocessing(Preprocessing):
    """Preprocessing of Mask2Former: bilinear resizing like Pillow's, then normalisation.

    The shortest side becomes `size`, unless the longest would exceed `longest`; both are rounded up to multiples of
    `divisor`. Pixels become (x / 255 - mean) / std.
    """

    size: int = 800
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    longest: int = 1333
    divisor: int = 32

    def pixels(self, images: Tensor) -> Tensor:
        """Resize images (B, 3, H, W) uint8 to (B, 3, H', W') uint8."""
        height, width = self.resized(*images.shape[-2:])
        return resize(images, height, width, resample="bilinear")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the size (H', W') of a resized image."""
        short, long = sorted((height, width))
        exact = min(float(self.size), self.longest * short / long)
        shortest = round(exact)

        def side(length: int) -> int:
            if short != shortest:
                length = shortest if length == short else int(exact * length / short)
            return math.ceil(length / self.divisor) * self.divisor

        return side(height), side(width)


class ObjectDetector:
    """Mask2Former for instances, computing in `dtype`.

    Weights and sampling positions stay float32, because a position in bfloat16 would be half a pixel off.
    """

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
        """Load weights from a folder or the hub.

        The attribute `revision` of the result names the commit.

        Args:
            revision: commit on the hub; None for the one in `weights.REVISIONS`, else the newest.

        Raises:
            RewardError: the weights cannot be loaded.
        """
        with loading(model_id):
            commit = revision_of(model_id, revision) or newest(model_id)
            model = Mask2FormerForUniversalSegmentation.from_pretrained(
                model_id, revision=commit, dtype=torch.float32
            )
            return cls(model.to(device()), dtype=tower_dtype(), revision=commit)

    @torch.no_grad()
    def __call__(self, images: Tensor, *, threshold: float) -> list[Instances]:
        """Return the objects with a score above `threshold`, on the CPU.

        Args:
            images: (B, 3, H, W) uint8.
        """
        results: list[Instances] = []
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
                results.append(instances(classes.float(), masks.float(), size, threshold=threshold))
        return results


def instances(
    class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], *, threshold: float
) -> Instances:
    """Return the objects of one image.

    Args:
        class_logits: (Q, C + 1), the last class is "no object".
        mask_logits: (Q, h, w) of the queries, at any resolution.
        size: (H, W) of the image.
        threshold: smallest score, which is the class's probability times the mean probability of its mask's pixels. As
            in mmdet, the Q best pairs of query and class are considered.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    queries, classes = probabilities.shape
    scores, index = probabilities.flatten().topk(min(queries, probabilities.numel()))
    # the mask's factor is at most 1, so that pairs below the threshold can be dropped before it is computed
    index = index[scores > threshold]
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
    """Return the boxes (N, 4) of masks (N, H, W), none of which is empty.

    A box is x1, y1, x2, y2 in float, with x2 and y2 one past the last pixel.
    """
    ends = []
    for dim in (1, 2):  # columns, then rows
        line = masks.any(dim).int()
        first = line.argmax(1)
        last = line.shape[1] - line.flip(1).argmax(1)
        ends.append((first, last))
    (x1, x2), (y1, y2) = ends
    return torch.stack([x1, y1, x2, y2], 1).float()
