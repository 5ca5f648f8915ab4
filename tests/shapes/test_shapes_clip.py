"""shapes-clip: what its training knows about batches, and that the shipped weights tell captions apart."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from diffalign.rewards.shapes_clip import ShapesClipReward
from diffalign.scripts.shapes import clip
from diffalign.shapes import CHECKPOINTS
from diffalign.shapes.prompts import prompts
from diffalign.shapes.world import KINDS, SceneObject, render, sample_scene


def thing(kind, color, x, y):
    return SceneObject(kind, color, x, y, 14.0)


CIRCLE, SQUARE = thing("circle", "red", 12.0, 32.0), thing("square", "blue", 52.0, 32.0)


def position(a, relation, b):
    found = [p for p in prompts("train") + prompts("held_out") if p["tag"] == "position"]
    return next(p for p in found if p["prompt"] == f"a photo of a {a} {relation} a {b}")


def test_families_share_task_and_shapes():
    found = clip.families("train", "held_out")
    assert sum(map(len, found)) == len(prompts("train")) + len(prompts("held_out"))
    for family in found:
        assert len({e["tag"] for e in family}) == 1
        if family[0]["tag"] in ("position", "color_attr"):
            assert len({tuple(sorted(c["class"] for c in e["include"])) for e in family}) == 1


def test_agreement_is_what_the_rules_say():
    entries = [
        position("circle", "left of", "square"),
        position("square", "right of", "circle"),
        position("square", "left of", "circle"),
        next(
            p for p in prompts("train") + prompts("held_out") if p["prompt"] == "a photo of a ring"
        ),
    ]
    scenes = [(CIRCLE, SQUARE)] * 3 + [(thing("ring", "red", 32.0, 32.0),)]
    table = clip.agreement(entries, scenes, [0, 0, 0, 1])
    # the first three show a circle left of a square, whatever they were drawn for
    assert table[:3, :3].tolist() == [[1, 1, 0]] * 3
    assert table[:3, 3].tolist() == [0, 0, 0]  # no ring in them: a fair negative
    assert table[3].tolist() == [0, 0, 0, 1]
    # a caption of another family whose shapes are all there is not asked about
    single = [
        p for p in prompts("train") + prompts("held_out") if p["prompt"] == "a photo of a circle"
    ]
    both = clip.agreement([entries[0], single[0]], [(CIRCLE, SQUARE), (CIRCLE,)], [0, 1])
    assert both.tolist() == [[1, -1], [0, 1]]


def test_the_loss_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    table = torch.eye(2)
    rows = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1))]
    expected = (sum(rows) + sum(rows)) / 4
    assert clip.contrastive_loss(logits, table).item() == pytest.approx(expected)
    # two right captions: their probabilities add up; what nobody asked about does not count
    assert clip.contrastive_loss(logits, torch.ones(2, 2)).item() == pytest.approx(0, abs=1e-6)
    alone = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert clip.contrastive_loss(logits, alone).item() == pytest.approx(0, abs=1e-6)


def test_what_is_said_about_places_is_shown():
    rng = np.random.default_rng(0)
    for entry in (p for p in prompts("train") if p["tag"] == "position"):
        said, shown = clip.said_places(entry), clip.shown_places(sample_scene(entry, rng))
        assert sum(s >= 0 for s in said) == 2
        assert all(b == a for a, b in zip(said, shown, strict=True) if a >= 0)
    assert clip.said_places(position("circle", "left of", "square"))[:4] == [0, -100, 1, -100]
    assert set(clip.shown_places((CIRCLE,))) == {-100}


def test_maps_have_kind_and_colour_at_their_cells():
    table = clip.scene_map((CIRCLE, SQUARE)).view(3, 3, clip.LAYERS)
    assert table.sum() == 4
    assert table[1, 0, KINDS.index("circle")] == 1
    assert table[1, 2, KINDS.index("square")] == 1


def test_a_training_writes_what_transformers_reads(tmp_path):
    measured = clip.train_clip(tmp_path, steps=2, batches=1)
    assert all(0 <= v <= 1 for v in measured.values())
    assert CLIPModel.from_pretrained(tmp_path).config.vision_config.image_size == 64


def test_the_shipped_model_tells_held_out_captions_apart():
    folder = CHECKPOINTS / "shapes-clip"
    model = CLIPModel.from_pretrained(folder).float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    found = clip.told_apart(model, tokenizer, processor, batches=8)
    assert min(found.values()) > 0.7, found  # positions are its weak point
    assert np.mean(list(found.values())) > 0.95


def test_its_value_is_transformers_cosine():
    """Through Pillow, transformers' processor and its forward; the numbers were written down from that."""
    folder = CHECKPOINTS / "shapes-clip"
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    texts = ["a photo of a red circle and a blue square", "a photo of two circles"]
    pixels = np.stack([render(scene) for scene in ((CIRCLE, SQUARE), (CIRCLE,))])
    inputs = CLIPImageProcessorPil.from_pretrained(folder)(
        images=[Image.fromarray(p) for p in pixels], return_tensors="pt"
    )
    tokens = CLIPTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs, **tokens).logits_per_image.diagonal()
        expected = (logits / model.logit_scale.exp()).numpy()
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    found = ShapesClipReward().score(images, texts, [{}] * 2).values
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found, [0.6221, 0.6891], atol=1e-3)


def test_as_a_reward_it_prefers_right_images():
    rng = np.random.default_rng(0)
    entries = [p for p in prompts("held_out") if p["tag"] == "color_attr"][:20]
    right = np.stack([render(sample_scene(e, rng)) for e in entries])
    images = torch.from_numpy(right).permute(0, 3, 1, 2)
    reward = ShapesClipReward()
    texts = [e["prompt"] for e in entries]
    ours = reward.score(images, texts, entries).values
    others = reward.score(images.roll(1, 0), texts, entries).values
    assert (ours > others).mean() > 0.85
