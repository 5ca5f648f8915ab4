"""Tokenizers of Shapes: real ones that round-trip through files and take any text."""

import pytest
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


def test_a_text_encoder_learns_what_captions_ask_for():
    import torch

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
