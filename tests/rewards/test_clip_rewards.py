"""Rewards on CLIP: preprocessing against Pillow and transformers, scores against computations that are not ours."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.functional.multimodal.clip_iqa import (
    _clip_iqa_compute,
    _clip_iqa_format_prompts,
)
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from diffalign.rewards import aesthetic, clip, hpsv2, open_clip, preprocessing, weights
from diffalign.rewards.base import RewardError
from diffalign.rewards.clip import ClipScorer
from diffalign.rewards.clip_iqa import ClipIqaReward
from diffalign.rewards.clip_score import ClipScoreReward
from diffalign.rewards.pickscore import PickScoreReward
from diffalign.rewards.preprocessing import (
    OPENAI_MEAN,
    OPENAI_STD,
    LetterboxPreprocessing,
    Preprocessing,
    resize,
)
from diffalign.shapes import text

PROMPTS = ["a photo of a red circle", "two blue squares " * 40, "", "a photo of a red circle"]


def pictures(n, height, width, seed=0):
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(noise).permute(0, 3, 1, 2)


def pil(images):
    return [Image.fromarray(x) for x in images.permute(0, 2, 3, 1).numpy()]


SIZES = [(64, 64), (512, 512), (300, 500), (500, 301), (224, 224), (17, 90)]  # height, width


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
def test_resizing_is_pillows_bit_for_bit(size, resample):
    images = pictures(2, *size)
    kind = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}[resample]
    for height, width in ((600, 700), (11, 13), (size[0], 40)):
        ours = resize(images, height, width, resample=resample).permute(0, 2, 3, 1).numpy()
        theirs = [np.asarray(i.resize((width, height), kind)) for i in pil(images)]
        np.testing.assert_array_equal(ours, np.stack(theirs))


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_is_transformers(size):
    images = pictures(2, *size)
    theirs = CLIPImageProcessorPil()(images=pil(images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(Preprocessing()(images), theirs, rtol=0, atol=1e-6)


@pytest.fixture(autouse=True)
def fresh():
    """Scorers are shared by name; a test must not meet another's."""
    ClipScorer.from_pretrained.cache_clear()


@pytest.mark.parametrize("size", SIZES)
def test_letterboxes_hold_the_whole_image(size):
    images = pictures(2, *size)
    found = LetterboxPreprocessing(size=32)(images)
    assert found.shape == (2, 3, 32, 32)
    # independently: one image at a time, pasted into the middle of a black square
    height, width = (round(side * 32 / max(size)) for side in size)
    for image, ours in zip(images, found, strict=True):
        square = torch.zeros(3, 32, 32)
        top, left = (32 - height) // 2, (32 - width) // 2
        scaled = torch._C._nn._upsample_bicubic2d_aa(
            image[None].float() / 255, (height, width), align_corners=False
        )[0]
        square[:, top : top + height, left : left + width] = scaled
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_MEAN, OPENAI_STD))
        torch.testing.assert_close(ours, (square - mean) / std, rtol=1e-5, atol=1e-5)


def test_large_batches_are_resized_in_parts(monkeypatch):
    images = pictures(5, 40, 52)
    expected = Preprocessing(28)(images)
    monkeypatch.setattr(preprocessing, "CHUNK", 3 * 40 * 52 * 2)
    torch.testing.assert_close(Preprocessing(28)(images), expected, rtol=0, atol=0)
    wide = pictures(1, 1, 5000)  # only what the crop needs is computed
    assert Preprocessing(224)(wide).shape == (1, 3, 224, 224)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny CLIP in transformers' layout, processor and all."""
    torch.manual_seed(0)
    tokenizer = text.build_clip_tokenizer()
    config = CLIPConfig(
        projection_dim=16,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 7,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 20,
            "eos_token_id": tokenizer.eos_token_id,
        },
    )
    folder = tmp_path_factory.mktemp("clip")
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(folder)
    return folder


def transformers_scores(folder, images, prompts):
    """logits_per_image and cosines, by transformers' own classes from Pillow images."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = text.build_clip_tokenizer()
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=20, return_tensors="pt")
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor(images=pil(images), return_tensors="pt")
    with torch.no_grad():
        found = model(**tokens, **pixels)
    logits = found.logits_per_image.diagonal()
    return logits.numpy(), (logits / model.logit_scale.exp()).detach().numpy()


def test_scores_are_those_of_transformers(checkpoint, monkeypatch):
    images = pictures(4, 40, 52)
    logits, cosines = transformers_scores(checkpoint, images, PROMPTS)
    scorer = ClipScorer.from_pretrained(str(checkpoint))
    assert cosines.std() > 0.01
    metadata = [{}] * 4
    pick = PickScoreReward(scorer)
    raw = pick.score(images, PROMPTS, metadata).values
    np.testing.assert_allclose(raw, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pick.normalize(raw), logits / 26, rtol=1e-4, atol=1e-4)
    score = ClipScoreReward(scorer).score(images, PROMPTS, metadata).values
    np.testing.assert_allclose(score, 100 * cosines.clip(0), rtol=1e-4, atol=1e-3)
    hps = hpsv2.HPSv21Reward(scorer).score(images, PROMPTS, metadata).values
    np.testing.assert_allclose(hps, cosines, rtol=1e-4, atol=1e-5)


def test_clip_iqa_is_that_of_torchmetrics(checkpoint):
    """Its formula, on features that transformers computes."""
    prompts, names = _clip_iqa_format_prompts(("quality",))
    model = CLIPModel.from_pretrained(checkpoint).eval()
    tokens = text.build_clip_tokenizer()(prompts, padding=True, return_tensors="pt")
    images = pictures(6, 40, 52)
    pixels = CLIPImageProcessorPil.from_pretrained(checkpoint)(
        images=pil(images), return_tensors="pt"
    )
    with torch.no_grad():
        found = model(**tokens, **pixels)  # embeddings of length 1
    expected = _clip_iqa_compute(found.image_embeds, found.text_embeds, names)
    assert expected.std() > 1e-3
    reward = ClipIqaReward(ClipScorer.from_pretrained(str(checkpoint)))
    for asked in (["a"] * 6, [""] * 6):
        here = reward.score(images, asked, [{}] * 6).values
        np.testing.assert_allclose(here, expected.numpy(), rtol=1e-3, atol=1e-5)
    assert not reward.needs_prompt


def test_a_prompt_is_embedded_once_and_batches_change_nothing(checkpoint, monkeypatch):
    scorer = ClipScorer.from_pretrained(str(checkpoint))
    images = pictures(4, 28, 28)
    seen = []
    tokenizer = scorer.tokenizer
    scorer.tokenizer = lambda texts, **kw: seen.append(len(texts)) or tokenizer(texts, **kw)
    expected = scorer.cosines(images, PROMPTS)
    assert seen == [3]
    monkeypatch.setattr(clip, "MICRO_BATCH", 1)
    torch.testing.assert_close(scorer.cosines(images, PROMPTS), expected, rtol=1e-5, atol=1e-6)


def test_the_scale_is_exact_in_low_precision(checkpoint):
    model = CLIPModel.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
    scorer = ClipScorer(model, text.build_clip_tokenizer())
    scorer.model.bfloat16()
    assert scorer.scale == pytest.approx(100, rel=1e-6)
    images = pictures(2, 28, 28)
    assert PickScoreReward(scorer).score(images, ["a", "b"], [{}] * 2).values.dtype == np.float32


def test_rewards_on_the_same_model_share_it(checkpoint):
    assert ClipScorer.from_pretrained(str(checkpoint)) is ClipScorer.from_pretrained(
        str(checkpoint)
    )


def test_weights_that_are_not_there_are_an_error_before_the_first_image(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "hf_hub_download", _nothing)
    monkeypatch.setattr(CLIPModel, "from_pretrained", _nothing)
    for kind in (
        ClipScoreReward,
        ClipIqaReward,
        PickScoreReward,
        hpsv2.HPSv2Reward,
        aesthetic.AestheticReward,
    ):
        with pytest.raises(RewardError, match="could not be loaded"):
            kind().prepare()


def _nothing(*args, **kwargs):
    raise TimeoutError("the hub does not answer")


def test_a_file_that_is_cut_is_an_error_that_names_it(tmp_path, monkeypatch):
    file = tmp_path / "HPS_v2.1_compressed.pt"
    file.write_bytes(b"PK\x03\x04 and nothing more")
    monkeypatch.setattr(weights, "hf_hub_download", lambda *a, **k: str(file))
    monkeypatch.setattr(hpsv2.AutoTokenizer, "from_pretrained", lambda *a, **k: None)
    with pytest.raises(RewardError, match=r"xswu/HPSv2/HPS_v2\.1_compressed\.pt could not be"):
        hpsv2.HPSv21Reward().prepare()


def test_other_preprocessing_is_refused():
    with pytest.raises(RewardError, match="preprocessing"):
        clip.preprocessing({"size": 224, "crop_size": 224, "resample": 2})


class OpenClipBlock(nn.Module):
    """A residual block with open_clip's names, on torch's own attention."""

    def __init__(self, width, heads, inner):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, inner))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(inner, width))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, width, heads, inner, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(OpenClipBlock(width, heads, inner) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClip(nn.Module):
    """A CLIP with the names and shapes of open_clip's ViT-H/14, small."""

    def __init__(self, vocabulary, length=20, width=(32, 24), heads=(4, 3), layers=(3, 2), out=16):
        super().__init__()
        vision, words = width
        self.length = length
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, vision, 7, stride=7, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(vision))
        self.visual.positional_embedding = nn.Parameter(torch.randn(17, vision))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(vision), nn.LayerNorm(vision)
        self.visual.transformer = Blocks(vision, heads[0], 4 * vision, layers[0])
        self.visual.proj = nn.Parameter(torch.randn(vision, out) / 4)
        self.token_embedding = nn.Embedding(vocabulary, words)
        self.positional_embedding = nn.Parameter(torch.randn(length, words))
        self.transformer = Blocks(words, heads[1], 4 * words, layers[1])
        self.ln_final = nn.LayerNorm(words)
        self.text_projection = nn.Parameter(torch.randn(words, out) / 4)
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        mask = torch.full((length, length), -math.inf).triu(1)
        self.register_buffer("attn_mask", mask)

    def encode_image(self, pixels):
        x = self.visual.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.visual.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([first, x], 1) + self.visual.positional_embedding
        x = self.visual.transformer(self.visual.ln_pre(x))
        return self.visual.ln_post(x[:, 0]) @ self.visual.proj

    def encode_text(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x, self.attn_mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A checkpoint file in the layout of HPS_v2.1_compressed.pt, its model, and its tokenizer."""
    torch.manual_seed(1)
    tokenizer = text.build_clip_tokenizer()
    assert tokenizer.eos_token_id == len(tokenizer) - 1  # the highest, as in CLIP
    model = OpenClip(len(tokenizer)).eval()
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, file)
    monkeypatch.setattr(hpsv2, "VISION_HEADS", 4)
    monkeypatch.setattr(hpsv2, "TEXT_HEADS", 3)
    return file, model, tokenizer


def test_a_released_hps_checkpoint_gives_open_clips_cosines(released):
    file, model, tokenizer = released
    scorer = ClipScorer(hpsv2.read(file), tokenizer, Preprocessing(size=28))
    images = pictures(4, 40, 52)
    tokens = tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=20, return_tensors="pt"
    ).input_ids
    end = (tokens == tokenizer.eos_token_id).int().argmax(-1)
    tokens = tokens.where(torch.arange(20) <= end[:, None], 0)  # open_clip pads with zeros
    with torch.no_grad():
        a = nn.functional.normalize(model.encode_image(Preprocessing(size=28)(images)), dim=-1)
        b = nn.functional.normalize(model.encode_text(tokens), dim=-1)
    expected = (a * b).sum(-1)
    assert expected.std() > 0.01
    found = hpsv2.HPSv21Reward(scorer).score(images, PROMPTS, [{}] * 4).values
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [hpsv2.HPSv2Reward, hpsv2.HPSv21Reward])
def test_both_hps_are_read_from_their_own_file(released, monkeypatch, kind):
    """And normalised alike: a raw 0.25 is worth (0.25 - 0.15) x 5 = 0.5."""
    file, _, tokenizer = released
    names = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}
    asked = []
    monkeypatch.setattr(weights, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or file)
    monkeypatch.setattr(hpsv2.AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer)
    reward = kind()
    # the tower of these weights is for 28 pixels
    monkeypatch.setattr(hpsv2, "LetterboxPreprocessing", lambda: LetterboxPreprocessing(size=28))
    reward.prepare()
    card = reward.card
    assert asked == [((card.model_id, names[card.name]), {"revision": card.revision})]
    assert reward.normalize(0.25) == pytest.approx(0.5)
    images, texts = pictures(2, 40, 52), ["a", "a photo of a red circle"]
    found = reward.score(images, texts, [{}] * 2).values
    by_hand = ClipScorer(hpsv2.read(file), tokenizer, LetterboxPreprocessing(size=28))
    np.testing.assert_allclose(found, by_hand.cosines(images, texts).numpy(), rtol=1e-5)
    assert found[0] != found[1]


def test_checkpoints_that_do_not_fit_are_named(released):
    file, _, _ = released
    state = torch.load(file)["state_dict"]
    with pytest.raises(RewardError, match=r"decoder\.weight is no tensor"):
        open_clip.convert_names({"decoder.weight": torch.zeros(1)})
    del state["ln_final.bias"]
    with pytest.raises(RewardError, match=r"lacks \['text_model.final_layer_norm.bias'\]"):
        open_clip.build(state, vision_heads=4, text_heads=3)


def test_the_aesthetic_head_reads_the_released_names(checkpoint):
    torch.manual_seed(2)
    sizes = {0: (16, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    state = {}
    for index, (before, after) in sizes.items():
        state[f"layers.{index}.weight"] = torch.randn(after, before) / before**0.5
        state[f"layers.{index}.bias"] = torch.randn(after)
    scorer = ClipScorer.from_pretrained(str(checkpoint))
    reward = aesthetic.AestheticReward(scorer, aesthetic.AestheticHead.from_state(state))
    images = pictures(3, 28, 28)
    x = scorer.image_features(images)
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(3))
    for index in sizes:
        x = x @ state[f"layers.{index}.weight"].T + state[f"layers.{index}.bias"]
    found = reward.score(images, ["a", "b", "c"], [{}] * 3).values
    np.testing.assert_allclose(found, x[:, 0].numpy(), rtol=1e-4, atol=1e-5)
    assert len(set(found)) == 3
