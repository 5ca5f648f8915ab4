"""The reward `geneval` from pixels to score on a tiny Mask2Former and a tiny CLIP, beside the same made of Pillow,
transformers and arithmetic written out here."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_clip_rewards import checkpoint as clip_folder  # noqa: F401 - fixtures
from test_clip_rewards import fresh, pictures, pil  # noqa: F401
from test_geneval_detector import checkpoint as detector_folder  # noqa: F401
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
)

from diffalign.geneval.rules import CLASSES, COLORS
from diffalign.rewards.clip import ClipScorer
from diffalign.rewards.geneval import GenEvalReward
from diffalign.rewards.mask2former import DetectorPreprocessing, ObjectDetector

HEIGHT, WIDTH = 40, 56


@pytest.fixture
def detector(detector_folder):  # noqa: F811
    """One that takes much for a car or a bus, and whose masks are not all the same."""
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector_folder).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.class_predictor.weight.mul_(4)  # queries differ
        for name in ("car", "bus"):
            model.class_predictor.bias[CLASSES.index(name)] += 30
    return model


def seen(model, image):
    """(name, score, mask) of the objects above 0.3, best first."""
    processor = Mask2FormerImageProcessorPil(
        size={"shortest_edge": 64, "longest_edge": 128}, size_divisor=32
    )
    with torch.no_grad():
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        output = model(pixel_values=pixels)
    logits = output.class_queries_logits[0].numpy().astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    masks = torch.nn.functional.interpolate(
        output.masks_queries_logits, (HEIGHT, WIDTH), mode="bilinear", align_corners=False
    )[0].numpy()
    queries, classes = len(shares), len(CLASSES)
    pairs = [(shares[q, c], q, c) for q in range(queries) for c in range(classes)]
    found = []
    for share, q, c in sorted(pairs, reverse=True)[:queries]:
        inside = masks[q] > 0
        if inside.any():
            score = share * (1 / (1 + np.exp(-masks[q][inside]))).mean()
            found += [(CLASSES[c], score, inside)] if score > 0.3 else []
    return sorted(found, key=lambda x: -x[1])


def color_of(folder, image, name, mask):
    """The nearest of ten colours to what the mask shows of the image."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    ground = Image.new("RGB", image.size, "#999")
    alone = Image.composite(image, ground, Image.fromarray(mask))
    crop = alone.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    model, tokenizer = (
        CLIPModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=[crop], return_tensors="pt")
    closeness = []
    for color in COLORS:
        texts = [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}"]
        texts.append(f"a photo of a {color} object")
        tokens = tokenizer(texts, padding="max_length", max_length=20, return_tensors="pt")
        with torch.no_grad():
            found = model(**tokens, **pixels)
        mean = found.text_embeds.mean(0)
        closeness.append(float(mean / mean.norm() @ found.image_embeds[0]))
    return COLORS[int(np.argmax(closeness))]


def test_from_pixels_to_score(detector, clip_folder):  # noqa: F811
    images = pictures(3, HEIGHT, WIDTH, seed=5)
    objects = [seen(detector, image) for image in pil(images)]
    cars = [[o for o in found if o[0] == "car"] for found in objects]
    buses = [[o for o in found if o[0] == "bus"] for found in objects]
    assert sum(map(len, cars)) >= 3
    colors = [
        [color_of(clip_folder, image, name, mask) for name, _, mask in found]
        for image, found in zip(pil(images), cars, strict=True)
    ]
    wanted, n, m = colors[0][0], len(cars[0]), len(buses[0])
    assert min(n, m) > 0
    bus = {"class": "bus", "count": m}
    plain = {"tag": "two_object", "include": [{"class": "car", "count": n}, bus]}
    colored = {"tag": "color_attr", "include": [{**plain["include"][0], "color": wanted}, bus]}
    expected, correct = {"plain": [], "colored": []}, {"plain": [], "colored": []}
    for found, shades, others in zip(cars, colors, buses, strict=True):
        numbers = [1 - abs(n - len(found)) / n, 1 - abs(m - len(others)) / m]
        right = shades.count(wanted) / n if len(found) == n else 0
        expected["plain"].append(sum(numbers) / 2)
        expected["colored"].append((sum(numbers) + right) / 3)
        enough = len(found) >= n and len(others) >= m
        correct["plain"].append(enough)
        correct["colored"].append(enough and shades[:n].count(wanted) == n)
    assert expected["plain"][0] == 1
    assert len(set(expected["colored"])) == 3
    eyes = ObjectDetector(detector, DetectorPreprocessing(size=64, longest=128))
    reward = GenEvalReward(eyes, ClipScorer.from_pretrained(str(clip_folder)))
    for name, metadata in (("plain", plain), ("colored", colored)):
        output = reward.score(images, ["x"] * 3, [metadata] * 3)
        np.testing.assert_allclose(output.values, expected[name], atol=1e-5)
        assert output.details["correct"].tolist() == correct[name]
