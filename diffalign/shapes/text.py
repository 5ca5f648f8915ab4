"""Text encoders of Shapes: CLIP and T5 tokenizers with tiny pretrained encoders.

CLIP learns from four hundred million captions. The meaning of a Shapes caption is known, so the encoders are
pretrained on it directly: from an embedding of the whole caption, linear heads predict both objects, their colours,
counts and relation. The tokens of T5 predict their own object. The heads are discarded. Frozen encoders that understand
the text let the denoiser learn fast.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffalign.geneval.rules import RELATIONS, plural
from diffalign.shapes.prompts import prompts, sample_prompts
from diffalign.shapes.world import COLORS, KINDS

MAX_LENGTH = 16
"""Tokens per caption; the longest prompt of Shapes has 12."""
PADDED_LENGTHS = (*[MAX_LENGTH] * 10, 40, 256)
"""Padded lengths on which T5 is trained: pipelines pad to 256 or 512 without a mask."""
WIDTH = 64
PREFIXES = ("a photo of ", "a photo of ", "a picture of ", "an image of ", "")
"""Prefixes of a caption.

The denoiser is trained on the first only; the encoders map all of them to one meaning.
"""

# Number of classes by target; index 0 means "not said".
TARGETS = {
    "kind_0": len(KINDS) + 1,
    "kind_1": len(KINDS) + 1,
    "color_0": len(COLORS) + 1,
    "color_1": len(COLORS) + 1,
    "count": 5,
    "relation": len(RELATIONS) + 1,
}

# Number of classes by target of one object; `place` is where it lies relative to the other one.
OBJECT_TARGETS = {
    "kind": len(KINDS) + 1,
    "color": len(COLORS) + 1,
    "count": 5,
    "place": len(RELATIONS) + 1,
}
KIND_WORDS = tuple(word for kind in KINDS for word in (kind, plural(kind)))


def _corpus() -> list[str]:
    texts = {entry["prompt"] for entry in prompts("train")}
    return sorted(prefix + t.removeprefix(PREFIXES[0]) for t in texts for prefix in PREFIXES)


def _learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges until every word is one token, with ties in alphabetical order.

    The trainer of the tokenizers library breaks ties randomly, which would give two encoders of one pipeline two
    vocabularies.
    """
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        counts: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in itertools.pairwise(parts):
                counts[pair] += words[word]
        if not counts:
            return merges
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for parts in pieces.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1


def build_clip_tokenizer() -> CLIPTokenizer:
    """Build CLIP's byte-level BPE with merges learned on the captions.

    It contains all bytes, so any text has tokens.
    """
    merges = _learn_merges(Counter(word for text in _corpus() for word in text.split()))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def build_t5_tokenizer() -> T5Tokenizer:
    """Build a unigram model in the style of sentencepiece.

    Whole words have their log-frequency; characters are the fallback. Unknown characters become <unk>.
    """
    words = Counter(f"▁{word}" for text in _corpus() for word in text.split())
    total = sum(words.values())
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0)]
    vocab += [(word, math.log(n / total)) for word, n in sorted(words.items())]
    vocab += [(chr(c), -12.0) for c in range(33, 127)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=MAX_LENGTH)


def clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Return the configuration of a tiny text tower."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=WIDTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_clip(tokenizer: CLIPTokenizer, *, projection: bool) -> PreTrainedModel:
    """Build an untrained CLIP text encoder, with a projection for SD3, without for FLUX."""
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(clip_config(tokenizer))


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Build an untrained T5 encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=2 * WIDTH,
            d_kv=32,
            d_ff=4 * WIDTH,
            num_layers=3,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


def caption_targets(entry: dict[str, Any]) -> list[int]:
    """Return class indices of a caption in the order of TARGETS.

    Objects are in the order in which the caption names them.
    """
    clauses = entry["include"]
    relation = 0
    # GenEval lists the target of a relation first; the caption names it last.
    if entry["tag"] == "position":
        relation = 1 + RELATIONS.index(clauses[1]["position"][0])
        clauses = clauses[::-1]
    kinds = [1 + KINDS.index(c["class"]) for c in clauses]
    colors = [1 + list(COLORS).index(c["color"]) if "color" in c else 0 for c in clauses]
    pad = [0] * (2 - len(clauses))
    return [*kinds, *pad, *colors, *pad, clauses[0]["count"], relation]


def object_targets(entry: dict[str, Any]) -> list[list[int]]:
    """Return class indices of each object of a caption in the order of OBJECT_TARGETS.

    Objects are in the order in which the caption names them.
    """
    kind_0, kind_1, color_0, color_1, count, relation = caption_targets(entry)
    # RELATIONS holds opposites side by side
    opposite = 1 + ((relation - 1) ^ 1) if relation else 0
    first = [kind_0, color_0, count, relation]
    return [first, [kind_1, color_1, count, opposite]] if kind_1 else [first]


def object_of_tokens(ids: Tensor, kinds: Tensor) -> Tensor:
    """Return which object of its caption each token belongs to.

    A token belongs to the next object that is named: its number is that of the kinds before it. Tokens after the last
    kind have a number that no object has.

    Args:
        ids: (B, N) token ids.
        kinds: ids of the tokens that name a kind, in singular or plural.
    """
    is_kind = torch.isin(ids, kinds).long()
    return is_kind.cumsum(1) - is_kind


@dataclass(frozen=True)
class Features:
    """Features of captions, from which heads predict what the captions say.

    Attributes:
        captions: embeddings (B, D), each of which must name the whole caption.
        tokens: (B, N, D) tokens, each of which must name its own object; None if there is no such demand.
    """

    captions: tuple[Tensor, ...]
    tokens: Tensor | None = None


Encode = Callable[[Tensor], Features]
"""Function from token ids (B, N) to features."""


def clip_features(model: PreTrainedModel, *, last: bool = False) -> Encode:
    """Return a function that computes CLIP's features as pipelines do.

    Both the pooled embedding and the last token, which alone sees the whole caption, name it. The token is taken before
    the last layer or, with `last`, after it and its norm, as SD1.5 does.
    """

    def encode(ids: Tensor) -> Features:
        out = model(ids, output_hidden_states=True)
        pooled = (
            out.text_embeds if isinstance(model, CLIPTextModelWithProjection) else out.pooler_output
        )
        tokens = out.last_hidden_state if last else out.hidden_states[-2]
        return Features((pooled, tokens[:, -1]))

    return encode


def t5_features(model: T5EncoderModel) -> Encode:
    """Return a function that computes T5's tokens as pipelines do, and their mean.

    The mean names the caption, a token its own object and where that object lies. A transformer that has T5's tokens
    alone looks up what it sees in them: it learns no relation from tokens that are all alike.
    """

    def encode(ids: Tensor) -> Features:
        tokens = model(ids).last_hidden_state[:, :MAX_LENGTH]
        return Features((tokens.mean(1),), tokens)

    return encode


def train_text_encoder(
    model: PreTrainedModel,
    *,
    encode: Encode,
    tokenizer: Any,
    width: int,
    lengths: tuple[int, ...] = (MAX_LENGTH,),
    steps: int = 600,
    batch_size: int = 128,
    seed: int = 0,
) -> float:
    """Train an encoder in place.

    Returns:
        Share of captions for which the pooled embedding gets every target right, over the last 20 steps.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    heads = nn.ModuleList(nn.Linear(width, sum(TARGETS.values())) for _ in range(2))
    object_head = nn.Linear(width, sum(OBJECT_TARGETS.values()))
    kinds = torch.tensor(
        [tokenizer(word, add_special_tokens=False).input_ids[-1] for word in KIND_WORDS]
    )
    parameters = [*model.parameters(), *heads.parameters(), *object_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    right = 0.0
    bar = tqdm(range(steps), desc=f"text encoder {type(model).__name__}", mininterval=10)
    for step in bar:
        entries = sample_prompts(rng, batch_size)
        texts = [str(rng.choice(PREFIXES)) + e["prompt"].removeprefix(PREFIXES[0]) for e in entries]
        length = int(rng.choice(lengths))
        ids = tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        targets = torch.tensor([caption_targets(e) for e in entries])
        features = encode(ids)
        # T5 has one embedding of the whole caption, CLIP two
        parts = zip(heads, features.captions, strict=False)
        losses = [_naming_loss(head(part), targets, TARGETS) for head, part in parts]
        exact = losses[0][1]
        loss = torch.stack([part for part, _ in losses]).sum()
        if features.tokens is not None:
            loss = loss + _objects_loss(object_head(features.tokens), ids, kinds, entries)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step >= steps - 20:
            right += exact / 20
        bar.set_postfix(right=f"{exact:.3f}", refresh=False)
    model.eval()
    return right


def _objects_loss(logits: Tensor, ids: Tensor, kinds: Tensor, entries: list[Any]) -> Tensor:
    """Return the cross-entropy of what each token says of its own object."""
    numbers = object_of_tokens(ids[:, : logits.shape[1]], kinds)
    rows, labels = [], []
    for row, entry in enumerate(entries):
        for number, target in enumerate(object_targets(entry)):
            own = (numbers[row] == number).nonzero()[:, 0]
            rows.append(logits[row, own])
            labels += [target] * len(own)
    return _naming_loss(torch.cat(rows), torch.tensor(labels), OBJECT_TARGETS)[0]


def _naming_loss(
    logits: Tensor, targets: Tensor, classes: Mapping[str, int]
) -> tuple[Tensor, float]:
    """Return the sum of cross-entropies, and the share of rows without an error."""
    parts = logits.split(list(classes.values()), dim=-1)
    losses = [nn.functional.cross_entropy(p, targets[:, i]) for i, p in enumerate(parts)]
    exact = torch.stack([p.argmax(-1) == targets[:, i] for i, p in enumerate(parts)]).all(0)
    return torch.stack(losses).sum(), exact.float().mean().item()
