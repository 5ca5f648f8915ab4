"""ImageReward: a checkpoint with the release's names, against BLIP's arithmetic written out in torch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import BertTokenizer

from diffalign.rewards import image_reward, weights
from diffalign.rewards.base import RewardError
from diffalign.rewards.image_reward import MEAN, STD, ImageReward, build
from diffalign.rewards.preprocessing import Preprocessing

WIDTH, TEXT, PATCH, SIZE, LAYERS, HEADS = 16, 12, 8, 32, 2, 2
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "red", "circle", "##s"]


def released(seed=0):
    """The names and shapes of ImageReward.pt, smaller."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def add(name, *shape):
        state[name] = 0.4 * torch.randn(*shape, generator=generator)

    def linear(name, out, into):
        add(f"{name}.weight", out, into)
        add(f"{name}.bias", out)

    def norm(name, width):
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        add(f"{name}.bias", width)

    v = "blip.visual_encoder"
    add(f"{v}.cls_token", 1, 1, WIDTH)
    add(f"{v}.pos_embed", 1, (SIZE // PATCH) ** 2 + 1, WIDTH)
    add(f"{v}.patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH)
    add(f"{v}.patch_embed.proj.bias", WIDTH)
    for i in range(LAYERS):
        b = f"{v}.blocks.{i}"
        norm(f"{b}.norm1", WIDTH)
        norm(f"{b}.norm2", WIDTH)
        linear(f"{b}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{b}.attn.proj", WIDTH, WIDTH)
        linear(f"{b}.mlp.fc1", 4 * WIDTH, WIDTH)
        linear(f"{b}.mlp.fc2", WIDTH, 4 * WIDTH)
    norm(f"{v}.norm", WIDTH)
    t = "blip.text_encoder"
    state[f"{t}.embeddings.position_ids"] = torch.arange(40)[None]
    add(f"{t}.embeddings.word_embeddings.weight", len(WORDS), TEXT)
    add(f"{t}.embeddings.position_embeddings.weight", 40, TEXT)
    norm(f"{t}.embeddings.LayerNorm", TEXT)
    for i in range(LAYERS):
        b = f"{t}.encoder.layer.{i}"
        for kind, width in (("attention", TEXT), ("crossattention", WIDTH)):
            linear(f"{b}.{kind}.self.query", TEXT, TEXT)
            linear(f"{b}.{kind}.self.key", TEXT, width)
            linear(f"{b}.{kind}.self.value", TEXT, width)
            linear(f"{b}.{kind}.output.dense", TEXT, TEXT)
            norm(f"{b}.{kind}.output.LayerNorm", TEXT)
        linear(f"{b}.intermediate.dense", 2 * TEXT, TEXT)
        linear(f"{b}.output.dense", TEXT, 2 * TEXT)
        norm(f"{b}.output.LayerNorm", TEXT)
    widths = (TEXT, 1024, 128, 64, 16, 1)
    for number, (into, out) in zip((0, 2, 4, 6, 7), itertools.pairwise(widths), strict=True):
        state[f"mlp.layers.{number}.weight"] = (
            torch.randn(out, into, generator=generator) / into**0.5
        )
        add(f"mlp.layers.{number}.bias", out)
    # BLIP's own training left these in the file
    linear("blip.vision_proj", 4, WIDTH)
    linear("blip.text_decoder.bert.x", 3, 3)
    add("blip.temp", 1)
    return state


def by_hand(state, pixels, ids, mask):
    def lin(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q, k, v, mask=None):
        def split(x):
            return x.view(len(x), -1, HEADS, x.shape[-1] // HEADS).transpose(1, 2)

        scores = split(q) @ split(k).transpose(-1, -2) / (q.shape[-1] // HEADS) ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, -1e9)
        return (scores.softmax(-1) @ split(v)).transpose(1, 2).flatten(2)

    v = "blip.visual_encoder"
    weight = state[f"{v}.patch_embed.proj.weight"]
    x = F.conv2d(pixels, weight, state[f"{v}.patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{v}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{v}.pos_embed"]
    for i in range(LAYERS):
        b = f"{v}.blocks.{i}"
        q, k, value = lin(f"{b}.attn.qkv", norm(f"{b}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + lin(f"{b}.attn.proj", attend(q, k, value))
        x = x + lin(f"{b}.mlp.fc2", F.gelu(lin(f"{b}.mlp.fc1", norm(f"{b}.norm2", x, 1e-6))))
    seen = norm(f"{v}.norm", x, 1e-6)
    t = "blip.text_encoder"
    places = state[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = state[f"{t}.embeddings.word_embeddings.weight"][ids] + places
    h = norm(f"{t}.embeddings.LayerNorm", h, 1e-12)
    for i in range(LAYERS):
        b = f"{t}.encoder.layer.{i}"
        for kind, source, hidden in (("attention", None, mask), ("crossattention", seen, None)):
            a = f"{b}.{kind}"
            other = h if source is None else source
            parts = (
                lin(f"{a}.self.query", h),
                lin(f"{a}.self.key", other),
                lin(f"{a}.self.value", other),
            )
            h = norm(
                f"{a}.output.LayerNorm", h + lin(f"{a}.output.dense", attend(*parts, hidden)), 1e-12
            )
        inner = F.gelu(lin(f"{b}.intermediate.dense", h))
        h = norm(f"{b}.output.LayerNorm", h + lin(f"{b}.output.dense", inner), 1e-12)
    h = h[:, 0]
    for number in (0, 2, 4, 6, 7):
        h = lin(f"mlp.layers.{number}", h)
    return (h.squeeze(-1) - MEAN) / STD


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer(str(tmp_path / "vocab.txt"))


def test_scores_are_blips_arithmetic(tokenizer):
    state = released()
    reward = ImageReward(build(state, vision_heads=HEADS, text_heads=HEADS), tokenizer)
    images = torch.randint(
        0, 256, (3, 3, 50, 40), generator=torch.Generator().manual_seed(1)
    ).byte()
    prompts = ["a photo of red circles", "a photo", "of " * 60]
    found = reward.score(images, prompts, [{}] * 3).values
    tokens = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    pixels = Preprocessing(SIZE)(images)
    expected = by_hand(state, pixels, tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    assert found.std() > 1e-3


def test_scores_do_not_depend_on_the_batch(tokenizer, monkeypatch):
    reward = ImageReward(build(released(), vision_heads=HEADS, text_heads=HEADS), tokenizer)
    images = torch.randint(
        0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(1)
    ).byte()
    prompts = ["a", "red", "photo of", "circle", "a photo"]
    whole = reward.score(images, prompts, [{}] * 5).values
    monkeypatch.setattr(image_reward, "MICRO_BATCH", 2)
    parts = reward.score(images, prompts, [{}] * 5).values
    torch.testing.assert_close(
        torch.from_numpy(parts), torch.from_numpy(whole), rtol=1e-4, atol=1e-5
    )


def test_other_checkpoints_are_refused():
    state = released()
    with pytest.raises(RewardError, match="surprise is no tensor"):
        build({**state, "surprise": torch.zeros(1)})
    with pytest.raises(RewardError, match="no tensor of ImageReward"):
        build({**state, "blip.visual_encoder.blocks.0.attn.q.weight": torch.zeros(1)})
    with pytest.raises(RewardError, match="lacks"):
        build({k: v for k, v in state.items() if "patch_embed" not in k})


def test_missing_weights_say_so(monkeypatch):
    def nothing(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(weights, "hf_hub_download", nothing)
    with pytest.raises(RewardError, match=r"ImageReward\.pt could not be loaded: no network"):
        ImageReward().prepare()
