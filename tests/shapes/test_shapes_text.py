"""Tokenizers of Shapes: real ones that round-trip through files and take any text."""

import pytest
import torch
from transformers import CLIPTokenizer, T5Tokenizer

from diffalign.geneval.rules import TASKS
from diffalign.shapes import text
from diffalign.shapes.prompts import plural, prompts

STRANGE = [
    "",
    " ",
    "Ünknown 漢字 🙂",
    "a" * 500,
    "A PHOTO of A Red CIRCLE!!",
    "\x00\t<|endoftext|>",
]


@pytest.mark.parametrize(
    ("build", "kind"),
    [(text.build_clip_tokenizer, CLIPTokenizer), (text.build_t5_tokenizer, T5Tokenizer)],
)
class TestTokenizers:
    def test_is_the_same_every_time_and_after_saving(self, build, kind, tmp_path):
        tokenizer = build()
        assert tokenizer.get_vocab() == build().get_vocab()
        tokenizer.save_pretrained(tmp_path)
        loaded = kind.from_pretrained(tmp_path)
        for entry in [*prompts("train")[::9], *({"prompt": s} for s in STRANGE)]:
            assert loaded(entry["prompt"]).input_ids == tokenizer(entry["prompt"]).input_ids

    def test_known_words_are_one_token_and_prompts_fit(self, build, kind):
        tokenizer = build()
        for split in ("train", "held_out"):
            for entry in prompts(split):
                ids = tokenizer(entry["prompt"]).input_ids
                extra = 2 if kind is CLIPTokenizer else 1
                assert len(ids) == len(entry["prompt"].split()) + extra <= text.MAX_LENGTH

    def test_any_text_has_tokens_within_the_vocabulary(self, build, kind):
        tokenizer = build()
        for strange in STRANGE:
            ids = tokenizer(strange, truncation=True, max_length=16, padding="max_length").input_ids
            assert len(ids) == 16
            assert all(0 <= i < len(tokenizer) for i in ids)


def test_caption_targets_follow_the_caption():
    found = {t: next(p for p in prompts("train") if p["tag"] == t) for t in TASKS}
    names = list(text.TARGETS)
    for task, entry in found.items():
        targets = dict(zip(names, text.caption_targets(entry), strict=True))
        words = entry["prompt"].split()
        assert targets["relation"] == 0 or task == "position"
        kinds = [text.KINDS[targets[k] - 1] for k in ("kind_0", "kind_1") if targets[k]]
        singular = {plural(kind): kind for kind in text.KINDS}
        named = [singular.get(word, word) for word in words]
        assert kinds == [word for word in named if word in text.KINDS]
        assert targets["count"] == {"two": 2, "three": 3, "four": 4}.get(words[3], 1)


def kind_ids(tokenizer):
    """Return the tokens that name kinds."""
    words = [tokenizer(word, add_special_tokens=False).input_ids for word in text.KIND_WORDS]
    assert all(len(ids) == 1 for ids in words)
    return torch.tensor(words).flatten()


def padded_ids(tokenizer, captions):
    """Return the token ids (B, 16) of captions."""
    options = {"padding": "max_length", "max_length": text.MAX_LENGTH, "return_tensors": "pt"}
    return tokenizer(captions, **options).input_ids


def test_tokens_belong_to_the_object_that_they_name():
    tokenizer = text.build_t5_tokenizer()
    ids = padded_ids(tokenizer, ["a photo of a red circle left of two rings"])
    numbers = text.object_of_tokens(ids, kind_ids(tokenizer))[0].tolist()
    # words of the prefix and the first object, then of the relation and the second, then the end and padding
    assert numbers == [0] * 6 + [1] * 4 + [2] * 6


@pytest.mark.parametrize("task", TASKS)
def test_each_object_of_a_caption_has_its_targets(task):
    entries = [p for p in prompts("train") if p["tag"] == task]
    for entry in entries:
        whole = dict(zip(text.TARGETS, text.caption_targets(entry), strict=True))
        objects = text.object_targets(entry)
        assert len(objects) == (2 if whole["kind_1"] else 1)
        for number, target in enumerate(objects):
            kind, color, count, place = target
            assert (kind, color) == (whole[f"kind_{number}"], whole[f"color_{number}"])
            assert count == whole["count"]
            assert bool(place) == (task == "position")
        if task == "position":
            places = [text.RELATIONS[target[3] - 1] for target in objects]
            assert places[0] in entry["prompt"]
            opposites = ({"left of", "right of"}, {"above", "below"})
            assert set(places) in opposites


def test_the_tokens_of_t5_learn_to_name_their_own_object():
    torch.manual_seed(0)
    tokenizer = text.build_t5_tokenizer()
    encoder = text.build_t5(tokenizer)
    text.train_text_encoder(
        encoder,
        encode=text.t5_features(encoder),
        tokenizer=tokenizer,
        width=2 * text.WIDTH,
        steps=60,
        batch_size=32,
    )
    entries = [p for p in prompts("held_out") if p["tag"] == "color_attr"]
    ids = padded_ids(tokenizer, [e["prompt"] for e in entries])
    with torch.no_grad():
        tokens = encoder(ids).last_hidden_state
    numbers = text.object_of_tokens(ids, kind_ids(tokenizer))
    second = torch.stack([row[n == 1][-1] for row, n in zip(tokens, numbers, strict=True)])
    colors = torch.tensor([text.object_targets(e)[1][1] for e in entries])
    means = torch.stack([second[colors == c].mean(0) for c in colors.unique()])
    nearest = colors.unique()[torch.cdist(second, means).argmin(1)]
    assert (nearest == colors).float().mean() > 0.5  # chance is one in six


def test_a_text_encoder_learns_what_captions_ask_for():
    torch.manual_seed(0)
    tokenizer = text.build_clip_tokenizer()
    encoder = text.build_clip(tokenizer, projection=True)
    right = text.train_text_encoder(
        encoder,
        encode=text.clip_features(encoder),
        tokenizer=tokenizer,
        width=text.WIDTH,
        steps=120,
        batch_size=64,
    )
    assert right > 0.5  # chance is below one in a thousand
