"""GenEval's eyes: Mask2Former against transformers, colours against a computation with Pillow, on tiny weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from diffalign.geneval.rules import CLASSES, COLORS, Detection
from diffalign.rewards import geneval
from diffalign.rewards.base import RewardError
from diffalign.rewards.geneval import GenEvalCompatReward, GenEvalReward, crop
from diffalign.rewards.mask2former import (
    DetectorPreprocessing,
    Instances,
    ObjectDetector,
    boxes,
    instances,
)


def noise(n, height, width, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (n, 3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


@pytest.mark.parametrize(
    "size", [(64, 64), (512, 512), (48, 200), (300, 500), (901, 800), (100, 33)]
)
def test_preprocessing_is_transformers(size):
    images = noise(2, *size)
    theirs = Mask2FormerImageProcessorPil(
        size={"shortest_edge": 80, "longest_edge": 133}, size_divisor=32
    )
    pictures = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images]
    expected = torch.from_numpy(
        np.stack(theirs(images=pictures, return_tensors="np")["pixel_values"])
    )
    found = DetectorPreprocessing(size=80, longest=133)(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_published_sizes():
    known = {(1024, 1024): (800, 800), (512, 512): (800, 800), (768, 1360): (768, 1344)}
    for before, after in known.items():
        assert DetectorPreprocessing().resized(*before) == after


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            image_size=32,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        num_labels=80,
        num_queries=6,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
    )
    folder = tmp_path_factory.mktemp("mask2former")
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def test_scores_are_those_of_transformers_where_the_resolution_is_its_own(checkpoint):
    """Its post-processing works at 384 x 384: for an image of that size both must agree."""
    torch.manual_seed(1)
    classes, masks = 3 * torch.randn(6, 81), 4 * torch.randn(6, 24, 24)

    class Output:
        class_queries_logits = classes[None]
        masks_queries_logits = masks[None]

    theirs = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        Output(), threshold=0.05, target_sizes=[(384, 384)], return_binary_maps=True
    )[0]
    ours = instances(classes, masks, (384, 384), threshold=0.05)
    assert len(ours.scores) == len(theirs["segments_info"]) > 2
    expected = sorted((round(s["score"], 4), s["label_id"]) for s in theirs["segments_info"])
    assert sorted(
        zip(ours.scores.round(decimals=4).tolist(), ours.labels.tolist(), strict=True)
    ) == [(pytest.approx(s, abs=2e-4), label) for s, label in expected]
    areas = sorted(theirs["segmentation"].flatten(1).sum(1).int().tolist())
    assert sorted(ours.masks.flatten(1).sum(1).tolist()) == areas


def test_masks_are_interpolated_to_the_image_and_not_to_blocks():
    """A diagonal edge of a 4 x 4 mask, at 64 x 64: nearest pixels would make steps of 16."""
    logits = torch.arange(4.0)[:, None] - torch.arange(4.0)[None, :] + 0.25
    classes = torch.full((1, 81), -20.0)
    classes[0, 5] = 20
    found = instances(classes, logits[None], (64, 64), threshold=0.3)
    width = found.masks[0, 8:52].sum(1)  # its borders are flat: there is no pixel beyond
    assert width.diff().abs().max() <= 2
    assert width[0] < width[-1]


def test_boxes_end_one_past_the_last_pixel():
    masks = torch.zeros(3, 10, 12, dtype=torch.bool)
    masks[0, 2:5, 3:9] = True
    masks[1] = True
    masks[2, 9, 11] = True
    assert boxes(masks).tolist() == [[3, 2, 9, 5], [0, 0, 12, 10], [11, 9, 12, 10]]


def test_nothing_above_the_threshold_is_nothing():
    classes = torch.zeros(4, 81)
    found = instances(classes, torch.zeros(4, 8, 8), (16, 16), threshold=0.3)
    assert len(found.labels) == len(found.boxes) == len(found.masks) == 0


def test_an_empty_mask_is_no_object():
    classes = torch.full((1, 81), -20.0)
    classes[0, 5] = 20
    found = instances(classes, torch.full((1, 8, 8), -5.0), (16, 16), threshold=0.0)
    assert len(found.labels) == 0


def test_a_checkpoint_is_read_and_every_image_has_its_objects(checkpoint):
    detector = ObjectDetector.from_pretrained(str(checkpoint))
    detector.preprocessing = DetectorPreprocessing(size=64, longest=128)
    images = noise(3, 40, 56)
    together = detector(images, threshold=0.0)
    alone = [detector(images[i : i + 1], threshold=0.0)[0] for i in range(3)]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)
        assert a.masks.shape[1:] == (40, 56)


def test_missing_weights_say_so(tmp_path):
    with pytest.raises(RewardError, match="could not be loaded"):
        ObjectDetector.from_pretrained(str(tmp_path / "none"))


def test_crops_are_grey_outside_the_mask():
    """Against Pillow: the image pasted over #999 through the mask, then cropped."""
    image = noise(1, 20, 30)[0]
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[4:10, 5:9] = True
    mask[6:12, 8:20] = True
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    ground = Image.new("RGB", picture.size, "#999")
    pasted = Image.composite(picture, ground, Image.fromarray(mask.numpy()))
    box = boxes(mask[None])[0].tolist()
    expected = np.asarray(pasted.crop(tuple(map(int, box))))
    np.testing.assert_array_equal(crop(image, mask, box).permute(1, 2, 0).numpy(), expected)


class FakeClip:
    """Sees the mean colour of a crop; texts name colours."""

    WAVE = {
        c: torch.nn.functional.one_hot(torch.tensor(i), 10).float() for i, c in enumerate(COLORS)
    }

    def __init__(self):
        self.texts = []

    def crop_features(self, crops):
        shade = {(255, 0, 0): "red", (0, 0, 255): "blue"}
        return torch.stack([self.WAVE[shade[tuple(c.flatten(1).amax(1).tolist())]] for c in crops])

    def text_features(self, texts):
        self.texts += texts
        return torch.stack([next(w for c, w in self.WAVE.items() if f" {c}" in t) for t in texts])


def reward_with(objects, image, cls=GenEvalReward):
    """The reward where the detector finds `objects`: (class, box, score)."""

    def detector(images, *, threshold):
        kept = [o for o in objects if o[2] > threshold]
        masks = torch.zeros(len(kept), *image.shape[-2:], dtype=torch.bool)
        for mask, (_, (x1, y1, x2, y2), _) in zip(masks, kept, strict=True):
            mask[y1:y2, x1:x2] = True
        found = Instances(
            torch.tensor([CLASSES.index(n) for n, _, _ in kept]),
            torch.tensor([s for _, _, s in kept]),
            torch.tensor([b for _, b, _ in kept]).float(),
            masks,
        )
        return [found] * len(images)

    return cls(detector, FakeClip())


def scene():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[0, 5:15, 5:15] = 255  # a red thing
    image[2, 5:15, 40:50] = 255  # a blue one to the right
    return image


CAR = {"class": "car", "count": 1}
OBJECTS = [
    ("car", (5, 5, 15, 15), 0.95),
    ("bus", (40, 5, 50, 15), 0.6),
    ("car", (0, 30, 5, 35), 0.2),
]


@pytest.mark.parametrize(
    ("metadata", "correct", "score"),
    [
        ({"tag": "single_object", "include": [CAR]}, 1, 1.0),
        ({"tag": "colors", "include": [{**CAR, "color": "red"}]}, 1, 1.0),
        ({"tag": "colors", "include": [{**CAR, "color": "blue"}]}, 0, 0.5),
        (
            {
                "tag": "position",
                "include": [CAR, {"class": "bus", "count": 1, "position": ["right of", 0]}],
            },
            1,
            1.0,
        ),
        (
            {
                "tag": "position",
                "include": [CAR, {"class": "bus", "count": 1, "position": ["left of", 0]}],
            },
            0,
            2 / 3,
        ),
        # counting asks for more confidence: the bus at 0.6 is not seen, the car at 0.95 is
        (
            {
                "tag": "counting",
                "include": [{"class": "bus", "count": 1}],
                "exclude": [{"class": "bus", "count": 2}],
            },
            0,
            0.0,
        ),
    ],
)
def test_the_rules_judge_what_is_seen(metadata, correct, score):
    image = scene()
    reward = reward_with(OBJECTS, image)
    found = reward.score(image[None], ["x"], [metadata])
    assert found.values.tolist() == pytest.approx([score])
    assert found.details["correct"].tolist() == [correct]


def test_compat_has_the_position_bug_of_the_release():
    """Right number of both, a wrong place: parts 1, 1, 0, and the release's further 1."""
    wrong = {
        "tag": "position",
        "include": [CAR, {"class": "bus", "count": 1, "position": ["left of", 0]}],
    }
    image = scene()
    found = reward_with(OBJECTS, image, GenEvalCompatReward).score(image[None], ["x"], [wrong])
    assert found.values.tolist() == pytest.approx([3 / 4])


def test_colours_are_asked_for_in_three_texts():
    image = scene()
    reward = reward_with(OBJECTS, image)
    entry = {"tag": "colors", "include": [{**CAR, "color": "red"}]}
    [objects] = reward.detect(image[None], [entry])
    assert objects == [Detection("car", (5.0, 5.0, 15.0, 15.0), pytest.approx(0.95), "red")]
    assert len(reward._clip.texts) == 30
    assert reward._clip.texts[0] == "a photo of a red car"
    assert "a photo of a blue-colored car" in reward._clip.texts
    assert "a photo of a white object" in reward._clip.texts


def test_with_a_real_clip_the_texts_average(monkeypatch, tmp_path):
    """The nearest of ten means of three unit vectors, computed one by one."""
    torch.manual_seed(0)
    table: dict[str, torch.Tensor] = {}

    def features(texts):
        for text in texts:
            table.setdefault(text, torch.nn.functional.normalize(torch.randn(6), dim=0))
        return torch.stack([table[t] for t in texts])

    seen = torch.nn.functional.normalize(torch.randn(4, 6), dim=1)

    class Clip:
        text_features = staticmethod(features)
        crop_features = staticmethod(lambda crops: seen)

    names = ["car", "bus", "car", "dog"]
    found = GenEvalReward(lambda *a: None, Clip())._colors([scene()] * 4, names)
    for name, vector, color in zip(names, seen, found, strict=True):
        means = {}
        for c in COLORS:
            texts = (f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}")
            rows = [table[t] for t in (*texts, f"a photo of a {c} object")]
            mean = sum(rows) / 3
            means[c] = float(mean / mean.norm() @ vector)
        assert color == max(means, key=means.get)


def test_at_most_sixteen_of_a_class_count():
    image = torch.zeros(3, 40, 400, dtype=torch.uint8)
    many = [("dog", (i * 10, 0, i * 10 + 8, 8), 0.99 - i / 1000) for i in range(30)]
    entry = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    [objects] = reward_with(many, image).detect(image[None], [entry])
    assert len(objects) == 16
    assert min(o.score for o in objects) > 0.97


def test_unknown_classes_are_refused():
    with pytest.raises(RewardError, match="class among person"):
        GenEvalReward().check_metadata(
            [{"prompt": "x", "include": [{"class": "circle", "count": 1}]}]
        )
    assert geneval.TEXTS[0].count("{") == 2
