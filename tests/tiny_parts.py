"""Parts that tiny pipelines of several families share."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from tokenizers import pre_tokenizers
from transformers import Qwen2TokenizerFast

from diffalign.shapes.prompts import prompts

SIZE = 16
TEMPLATE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
"""Of Qwen-Image's pipeline."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
"""Qwen3's chat template, for messages of one user."""


def autoencoder(shift_factor: float | None = 0.1) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.3,
        shift_factor=shift_factor,
    ).eval()


def spread(module: torch.nn.Module) -> None:
    """Random biases and modulations, so that no path of a fresh transformer is silent."""
    for parameter in module.parameters():
        if parameter.ndim == 1 or float(parameter.detach().abs().max()) == 0:
            torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 0.5, 0.2)


def qwen_tokenizer(*templates: str) -> Qwen2TokenizerFast:
    """Each word of Shapes and of `templates` is a token; other text falls to pieces, at last to bytes."""
    texts = [*templates, *(entry["prompt"] for entry in prompts("train")), "user system assistant"]
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {piece for text in texts for piece, _ in bytes_of.pre_tokenize_str(text)}
    words |= {f"Ġ{word}" for word in words if word[0].isalpha()}
    # merges grow words from their front, so that none gets in another's way
    fronts = {word[:n] for word in words for n in range(2, len(word) + 1)}
    merges = [(front[:-1], front[-1]) for front in sorted(fronts, key=lambda f: (len(f), f))]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Qwen2TokenizerFast(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        additional_special_tokens=list(SPECIAL[1:]),
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def sizes(tokenizer: Qwen2TokenizerFast, *, layers: int) -> dict[str, int]:
    """Sizes of a tiny decoder of the Qwen kind."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
