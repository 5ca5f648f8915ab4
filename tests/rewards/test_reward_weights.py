"""Weights of rewards: asked for at the commit that the card declares, and computed with in bfloat16."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_clip_rewards import checkpoint, fresh, pictures  # noqa: F401 - fixtures
from test_geneval_detector import checkpoint as detector_folder  # noqa: F401
from test_image_reward import HEADS, released, tokenizer  # noqa: F401
from torch import nn
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from diffalign.rewards import aesthetic, hpsv2, hpsv3, image_reward, mask2former, registry, weights
from diffalign.rewards.aesthetic import AestheticHead, AestheticReward
from diffalign.rewards.clip import ClipScorer
from diffalign.rewards.features import ClipFeatures
from diffalign.rewards.image_reward import ImageReward, build
from diffalign.rewards.judged import Asking
from diffalign.rewards.mask2former import DetectorPreprocessing, ObjectDetector
from diffalign.rewards.pickscore import PickScoreReward
from diffalign.shapes import CHECKPOINTS

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(monkeypatch, tmp_path, checkpoint):  # noqa: F811
    """What is asked of the hub: (id, revision) of every call; it answers with small things."""
    calls = []

    def answer(found):
        def ask(model_id, *_, revision=None, **kwargs):
            calls.append((model_id, revision))
            return found() if callable(found) else found

        return ask

    def file(model_id, name, *, revision=None):
        calls.append((model_id, revision))
        if name == "config.json":
            return str(tmp_path / "snapshots" / COMMIT / name)
        torch.save(AestheticHead(16).state_dict(), tmp_path / "file.pth")
        return str(tmp_path / "file.pth")

    real = CLIPModel.from_pretrained
    size = {"size": 28, "crop_size": 28, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    small = SimpleNamespace(place=lambda: None)
    monkeypatch.setattr(weights, "hf_hub_download", file)
    monkeypatch.setattr(CLIPModel, "from_pretrained", answer(lambda: real(checkpoint)))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", answer(None))
    monkeypatch.setattr(CLIPImageProcessor, "get_image_processor_dict", answer((size, {})))
    monkeypatch.setattr(hpsv2, "read", lambda path: real(checkpoint))
    monkeypatch.setattr(image_reward, "build", lambda state: small)
    monkeypatch.setattr(hpsv3.Qwen2VLConfig, "from_pretrained", answer(None))
    monkeypatch.setattr(hpsv3, "with_reward_token", lambda same: same)
    monkeypatch.setattr(hpsv3, "load_file", lambda path: {})
    monkeypatch.setattr(hpsv3, "build", lambda *a: small)
    detector = mask2former.Mask2FormerForUniversalSegmentation
    monkeypatch.setattr(detector, "from_pretrained", answer(lambda: nn.Linear(1, 1)))
    return calls


# rewards that ask a judge name its model, and the judge's own card has the commit
HUB = [
    name
    for name in sorted(registry.BUILT_IN)
    if "/" in (registry.create(name).card.model_id or "")
    and not isinstance(registry.create(name), Asking)
]


@pytest.mark.parametrize("name", HUB)
def test_the_hub_is_asked_for_the_commits_of_the_card(asked, name):
    reward = registry.create(name)
    reward.prepare()
    card = reward.card
    declared = {card.model_id: card.revision, **card.auxiliary}
    assert all(len(revision) == 40 for revision in declared.values())
    newest = {(card.model_id, None)} if name.startswith("geneval") else set()
    assert set(asked) == set(declared.items()) | newest
    if (
        newest
    ):  # nobody knows its commit beforehand: the one that the hub names is the one that is read
        assert card.revision == COMMIT
        assert type(reward).card.revision is None


def test_features_are_pinned_and_stay_in_float32(asked, monkeypatch):
    monkeypatch.setattr("diffalign.rewards.clip.tower_dtype", lambda: torch.bfloat16)
    network = ClipFeatures()
    assert set(asked) == {(weights.CLIP_L_336, weights.REVISIONS[weights.CLIP_L_336])}
    assert weights.REVISIONS[weights.CLIP_L_336][:12] in network.weights
    assert network.scorer.model.dtype == torch.float32


def test_a_folder_is_not_asked_for_a_commit(asked, monkeypatch, tmp_path):
    """Also where it is called what the hub calls a repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / weights.CLIP_L).mkdir(parents=True)
    ClipScorer.from_pretrained(weights.CLIP_L, revision=weights.REVISIONS[weights.CLIP_L])
    (tmp_path / mask2former.__name__).mkdir()
    assert ObjectDetector.from_pretrained(mask2former.__name__).revision is None
    assert {revision for _, revision in asked} == {None}
    (tmp_path / aesthetic.HEAD_ID).mkdir(parents=True)
    assert weights.file_of(aesthetic.HEAD_ID, "x").as_posix() == f"{aesthetic.HEAD_ID}/x"


def test_what_is_known_later_is_written_on_the_card():
    reward = registry.create("ocr")
    reward.prepare()
    assert reward.card.revision.startswith("rapidocr ")
    content = (CHECKPOINTS / "shapes-clip" / "model.safetensors").read_bytes()
    card = registry.create("shapes_clip").card
    assert card.revision == hashlib.sha256(content).hexdigest()


def test_every_card_with_weights_has_a_commit_or_gets_one():
    for name in registry.BUILT_IN:
        reward = registry.create(name)
        if isinstance(reward, Asking):
            continue
        card = reward.card
        later = name in ("geneval", "geneval_compat", "ocr")
        assert (card.revision is None) == (card.model_id is None or later), name
        assert None not in card.auxiliary.values()


def on_cuda(monkeypatch):
    """The precision of CUDA, on this CPU."""
    for module in ("clip", "image_reward", "mask2former"):
        monkeypatch.setattr(f"diffalign.rewards.{module}.tower_dtype", lambda: torch.bfloat16)


def test_clip_in_bfloat16_agrees_with_float32(checkpoint, monkeypatch):  # noqa: F811
    images, prompts = pictures(12, 40, 52), [f"a photo of {i} red circles" for i in range(12)]
    exact = ClipScorer.from_pretrained(str(checkpoint))
    ClipScorer.from_pretrained.cache_clear()
    on_cuda(monkeypatch)
    low = ClipScorer.from_pretrained(str(checkpoint))
    assert (exact.model.dtype, low.model.dtype) == (torch.float32, torch.bfloat16)
    assert low.scale == exact.scale
    features = low.image_features(images)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(12))  # normalised afterwards
    expected, found = (s.cosines(images, prompts) for s in (exact, low))
    assert (expected - found).abs().max() < 0.02 < expected.std()
    scores = [PickScoreReward(s).score(images, prompts, [{}] * 12).values for s in (exact, low)]
    assert np.abs(scores[0] - scores[1]).max() < 0.02 * exact.scale
    torch.manual_seed(0)
    head = AestheticHead(16)  # in float32 beside a tower in bfloat16
    values = [AestheticReward(s, head).raw(images, prompts) for s in (exact, low)]
    assert (values[0] - values[1]).abs().max() < 0.02


def test_image_reward_in_bfloat16_agrees_with_float32(tokenizer, monkeypatch):  # noqa: F811
    images, prompts = pictures(6, 50, 40), ["a photo of red circles", "a photo", "of"] * 2

    def scores():
        model = build(released(), vision_heads=HEADS, text_heads=HEADS).place()
        return model, ImageReward(model, tokenizer).score(images, prompts, [{}] * 6).values

    _, expected = scores()
    on_cuda(monkeypatch)
    model, found = scores()
    assert model.vision.dtype == model.text.dtype == torch.bfloat16
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 0.1


def test_the_detector_in_bfloat16_agrees_with_float32(detector_folder, monkeypatch):  # noqa: F811
    images = pictures(2, 40, 56)
    exact = ObjectDetector.from_pretrained(str(detector_folder))
    on_cuda(monkeypatch)
    low = ObjectDetector.from_pretrained(str(detector_folder))
    assert (exact.dtype, low.dtype) == (torch.float32, torch.bfloat16)
    for detector in (exact, low):
        detector.preprocessing = DetectorPreprocessing(size=64, longest=128)
    for a, b in zip(exact(images, threshold=0.0), low(images, threshold=0.0), strict=True):
        assert b.scores.dtype == torch.float32
        n = min(len(a.scores), len(b.scores))
        assert n > 0
        assert (a.scores[:n] - b.scores[:n]).abs().max() < 0.03
