"""Tiny random pipelines, built in code: real classes, real tokenizers, milliseconds a forward."""

from __future__ import annotations

from dataclasses import replace

import tiny_llm
import torch
from diffusers import (
    AutoencoderDC,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_parts import SIZE, autoencoder, spread
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast

from diffalign.core.fingerprint import plain_tensors
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.flux import FluxModel
from diffalign.pipelines.sampling import Sampling
from diffalign.pipelines.sana import INSTRUCTION, SanaModel
from diffalign.pipelines.sd import SDModel
from diffalign.pipelines.sd3 import SD3Model
from diffalign.pipelines.sdxl import SDXLModel
from diffalign.rewards.base import Reward, RewardCard
from diffalign.shapes import text
from diffalign.shapes.prompts import prompts
from diffalign.training.peak import storages
from diffalign.types import RewardOutput


def sd3_pipeline(seed: int = 0) -> StableDiffusion3Pipeline:
    torch.manual_seed(seed)
    clip, t5 = text.build_clip_tokenizer(), text.build_t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * text.WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * text.WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    spread(transformer)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=text.build_clip(clip, projection=True).eval(),
        tokenizer=clip,
        text_encoder_2=text.build_clip(clip, projection=True).eval(),
        tokenizer_2=clip,
        text_encoder_3=text.build_t5(t5).eval(),
        tokenizer_3=t5,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux_pipeline(seed: int = 0) -> FluxPipeline:
    torch.manual_seed(seed)
    clip, t5 = text.build_clip_tokenizer(), text.build_t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * text.WIDTH,
        pooled_projection_dim=text.WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 2),
    )
    spread(transformer)
    pipeline = FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=text.build_clip(clip, projection=False).eval(),
        tokenizer=clip,
        text_encoder_2=text.build_t5(t5).eval(),
        tokenizer_2=t5,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _gemma_tokenizer() -> GemmaTokenizerFast:
    """Each word of Shapes and of SANA's instruction is a token; other text falls to pieces, at last to characters.

    Merges grow words from their front, one character at a time, so that none gets in another's way.
    """
    words = {word for entry in prompts("train") for word in entry["prompt"].split()}
    words |= {word for line in INSTRUCTION.default for word in line.split()}
    fronts = {f"▁{word}"[:n] for word in words for n in range(2, len(word) + 2)}
    merges = [(front[:-1], front[-1]) for front in sorted(fronts, key=lambda f: (len(f), f))]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *map(chr, range(33, 127))]
    tokens += [first + last for first, last in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    return GemmaTokenizerFast(vocab=vocab, merges=merges, add_bos_token=True)


def _deep_autoencoder() -> AutoencoderDC:
    """A quarter of the size, with the two kinds of blocks that DC-AE has."""
    shape = {
        "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8, 8),
        "layers_per_block": (1, 1, 1),
        "qkv_multiscales": ((), (), (5,)),
    }
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in shape.items()}
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=4, scaling_factor=1.3, **sides
    ).eval()


def sana_pipeline(seed: int = 0) -> SanaPipeline:
    torch.manual_seed(seed)
    tokenizer = _gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
    )
    spread(transformer)
    gemma = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(gemma).eval(),
        vae=_deep_autoencoder(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _unet(**kwargs) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        **kwargs,
    )
    spread(unet)
    return unet.eval()


def sd_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    clip = text.build_clip_tokenizer()
    pipeline = StableDiffusionPipeline(
        unet=_unet(cross_attention_dim=text.WIDTH),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        vae=autoencoder(None),
        text_encoder=text.build_clip(clip, projection=False).eval(),
        tokenizer=clip,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sdxl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    clip = text.build_clip_tokenizer()
    unet = _unet(
        cross_attention_dim=2 * text.WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=text.WIDTH + 6 * 4,
        use_linear_projection=True,
    )
    pipeline = StableDiffusionXLPipeline(
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        vae=autoencoder(None),
        text_encoder=text.build_clip(clip, projection=False).eval(),
        tokenizer=clip,
        text_encoder_2=text.build_clip(clip, projection=True).eval(),
        tokenizer_2=clip,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sd_model(seed: int = 0) -> SDModel:
    return SDModel(sd_pipeline(seed), default_size=(SIZE, SIZE))


def sdxl_model(seed: int = 0) -> SDXLModel:
    return SDXLModel(sdxl_pipeline(seed), default_size=(SIZE, SIZE))


def sd3_model(seed: int = 0) -> SD3Model:
    return SD3Model(sd3_pipeline(seed), max_sequence_length=16)


def flux_model(seed: int = 0) -> FluxModel:
    return FluxModel(flux_pipeline(seed), max_sequence_length=16, default_size=(SIZE, SIZE))


def sana_model(seed: int = 0) -> SanaModel:
    """Of 32 pixels, the least that the stock pipeline makes; latents are as large as the other models'."""
    return SanaModel(sana_pipeline(seed), max_sequence_length=16)


MOVABLE = {"sd3": sd3_model, "flux": flux_model, "sana": sana_model}
"""Families that DC-Gen moves into other latents."""
MODELS = {**MOVABLE, **tiny_llm.MODELS}
UNETS = {"sd": sd_model, "sdxl": sdxl_model}


def rollout(model, prompts, *, generator, guidance_scale):
    """(B, H, W, 3) uint8: what our sampler makes of a model, for comparison with its stock pipeline."""
    guided = model.costs_a_forward(guidance_scale)
    negative = model.encode_prompt([""] * len(prompts)) if guided else None
    batch = Sampling(model, model.encode_prompt(prompts), Drawing(4, guidance_scale), negative)
    latents = batch.draw(generator)
    return model.decode(latents).permute(0, 2, 3, 1).numpy()


def tensor_bytes(tensor):
    """Return the bytes of a tensor's data, inner tensors of a subclass included."""
    return sum(t.nbytes for t in plain_tensors(tensor))


def saved_bytes(module, forward):
    """Return the bytes of all tensors that autograd saves in a forward, without parameters."""
    held = storages(module.parameters())
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        # the dictionary holds a reference to the tensor, so that its address is not reused
        if storage._cdata not in held:
            saved[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(size for size, _ in saved.values())


def make_embeddings_depend_on_their_batch(monkeypatch) -> None:
    """Patch every family so that the size of a batch is seen in its embeddings, as it is in their last bits."""
    for kind in (SD3Model, FluxModel, SanaModel, SDModel, SDXLModel):
        monkeypatch.setattr(kind, "encode_prompt", _marked(kind.encode_prompt))


def _marked(encode):
    def encode_prompt(self, prompts):
        found = encode(self, prompts)
        return replace(found, prompt_embeds=found.prompt_embeds * (1 + len(prompts) / 64))

    return encode_prompt


class Brightness(Reward):
    """A reward of somebody else."""

    card = RewardCard(name="brightness", description="mean of all pixels")

    def score(self, images, prompts, metadata):
        return RewardOutput((images.float().mean((1, 2, 3)) / 255).numpy())


class Redness(Reward):
    """More red, less blue: a reward that any model can learn."""

    card = RewardCard(name="redness", description="red less blue", raw_range=(-1, 1))

    def score(self, images, prompts, metadata):
        values = (images[:, 0].float() - images[:, 2].float()).mean((1, 2)) / 255
        return RewardOutput(values.numpy())


class Blueness(Redness):
    """The opposite of `Redness`: what one gains the other loses."""

    card = RewardCard(name="blueness", description="blue less red", raw_range=(-1, 1))

    def score(self, images, prompts, metadata):
        return RewardOutput(-super().score(images, prompts, metadata).values)
