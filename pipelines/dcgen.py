"""Stock pipelines with a deeply compressed autoencoder, one token per latent position.

Transformer, autoencoder and scheduler are stock classes. A saved folder contains a copy of this file, which imports
diffusers only, so that the folder loads in any environment:

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
"""

import functools
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import FluxPipeline, SanaPipeline, StableDiffusion3Pipeline
from diffusers.image_processor import PixArtImageProcessor, VaeImageProcessor
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
from diffusers.pipelines.sana import pipeline_sana
from diffusers.utils.torch_utils import randn_tensor
from torch.nn import functional

MODULE = "pipeline_dcgen"
BINS = {
    512: pipeline_pixart_alpha.ASPECT_RATIO_512_BIN,
    1024: pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN,
    2048: pipeline_pixart_sigma.ASPECT_RATIO_2048_BIN,
    4096: pipeline_sana.ASPECT_RATIO_4096_BIN,
}
"""Image sizes of SANA by aspect ratio, for each square side in pixels."""


def compression_of(vae: Any) -> int:
    """Return the number of pixels per side of the image area that one latent covers."""
    if hasattr(vae, "spatial_compression_ratio"):
        return int(vae.spatial_compression_ratio)
    return int(2 ** (len(vae.config.block_out_channels) - 1))


# type checkers accept every attribute of a stock pipeline
_Pipeline: Any = object


def _fill_up(channels: int) -> Any:
    """Return a hook that pads latents with zero channels up to `channels`.

    A denoiser of the first channels (DC-AE 1.5) does not generate the others.
    """

    def hook(decoder: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        latents = arguments[0]
        missing = channels - latents.shape[1]
        return (functional.pad(latents, (0, 0, 0, 0, 0, missing)), *arguments[1:])

    return hook


class DeepLatents(_Pipeline):
    """Base of the pipelines in this file.

    Three settings are stored in `model_index.json`: `image_size`, the default side of images in pixels;
    `max_sequence_length`, the number of text tokens; and `codec`, the properties of the autoencoder that the denoiser
    was trained with.
    """

    def _use(
        self, vae: Any, image_size: int | None, max_sequence_length: int | None, codec: Any
    ) -> None:
        """Add the autoencoder, after the stock pipeline was initialised without one."""
        reads = None if self.transformer is None else self.transformer.config.in_channels
        if None not in (vae, reads) and vae.config.latent_channels < reads:
            raise ValueError(
                f"this transformer reads latents of {reads} channels, the autoencoder makes "
                f"{vae.config.latent_channels}: it is another autoencoder"
            )
        if None not in (vae, codec):
            for name, present in (
                ("autoencoder", type(vae).__name__),
                ("compression", compression_of(vae)),
                ("channels", self.transformer.config.in_channels),
                ("scale", vae.config.scaling_factor),
            ):
                if codec[name] != present:
                    raise ValueError(
                        f"this model was trained with another autoencoder: {name} was {codec[name]}, not {present}"
                    )
        if vae is not None and reads is not None and vae.config.latent_channels > reads:
            vae.decoder.register_forward_pre_hook(_fill_up(vae.config.latent_channels))
        self.register_modules(vae=vae)
        self.register_to_config(
            image_size=image_size, max_sequence_length=max_sequence_length, codec=codec
        )
        self.vae_scale_factor = 32 if vae is None else compression_of(vae)
        if vae is not None and getattr(vae.config, "shift_factor", None) is None:
            # stock pipelines read it; `save_pretrained` removes it again
            vae.register_to_config(shift_factor=0.0)
        self.default_sample_size = (
            image_size or 32 * self.vae_scale_factor
        ) // self.vae_scale_factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def _check_size(self, height: int, width: int) -> None:
        f = self.vae_scale_factor
        if height % f or width % f or height <= 0 or width <= 0:
            near = [max(f, round(side / f) * f) for side in (height, width)]
            raise ValueError(
                f"`height` and `width` must be multiples of {f} pixels, not {height} and {width}; the nearest are "
                f"{near[0]} and {near[1]}"
            )

    def _text_length(self, length: int | None) -> Any:
        trained = self.config.max_sequence_length
        if None not in (length, trained) and length != trained:
            raise ValueError(
                f"`max_sequence_length` is {length}, but this model was trained with {trained} text "
                "tokens; leave it out"
            )
        return length or trained

    def _given(self, shape: tuple[int, ...], latents: Any, dtype: Any, device: Any) -> Any:
        if tuple(latents.shape) != tuple(shape):
            raise ValueError(
                f"`latents` must have the shape {tuple(shape)}, not {tuple(latents.shape)}"
            )
        return latents.to(device=device, dtype=dtype)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: Any,
        device: Any,
        generator: Any,
        latents: Any = None,
    ) -> Any:
        """Return the latents (B, C, h, w) of the caller, or noise."""
        f = self.vae_scale_factor
        channels = self.transformer.config.in_channels
        shape = (batch_size, channels, int(height) // f, int(width) // f)
        if latents is not None:
            return self._given(shape, latents, dtype, device)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} images")
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)

    @classmethod
    def _dict_from_json_file(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a configuration with the plain name of the class."""
        # this class exists already, and with a plain name `from_pretrained` runs no code from the folder
        config = super()._dict_from_json_file(*args, **kwargs)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][1]
        return config

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save like the stock method, with a copy of this file that the folder names."""
        if kwargs.pop("push_to_hub", False):
            raise ValueError(
                "save the folder first and upload it as a whole: it holds a file of code"
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        _edit(
            folder / "model_index.json",
            lambda c: c | {"_class_name": [MODULE, type(self).__name__]},
        )
        if self.vae is not None and self.vae.config.get("shift_factor") == 0.0:
            _edit(
                folder / "vae" / "config.json",
                lambda c: {k: c[k] for k in c if k != "shift_factor"},
            )
        shutil.copyfile(inspect.getfile(type(self)), folder / f"{MODULE}.py")


def _edit(file: Path, change: Any) -> None:
    config = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class DCGenFluxPipeline(DeepLatents, FluxPipeline):
    """FluxPipeline over deep latents; an argument `latents` is packed, (B, h w, C)."""

    def __init__(
        self,
        scheduler,
        vae,
        text_encoder,
        tokenizer,
        text_encoder_2,
        tokenizer_2,
        transformer,
        image_encoder=None,
        feature_extractor=None,
        image_size: int | None = None,
        max_sequence_length: int | None = None,
        codec: dict | None = None,
    ):
        super().__init__(
            scheduler=scheduler,
            vae=None,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self._use(vae, image_size, max_sequence_length, codec)

    def check_inputs(
        self, prompt: Any, prompt_2: Any, height: int, width: int, *args: Any, **kwargs: Any
    ) -> None:
        self._check_size(height, width)
        factor = self.vae_scale_factor
        # the stock check only warns about sizes, and counts in patches of two
        self.vae_scale_factor = 1
        try:
            super().check_inputs(prompt, prompt_2, 2 * height, 2 * width, *args, **kwargs)
        finally:
            self.vae_scale_factor = factor

    @staticmethod
    def _pack_latents(
        latents: Any, batch_size: int, num_channels_latents: int, height: int, width: int
    ) -> Any:
        return latents.flatten(2).transpose(1, 2)

    @staticmethod
    def _unpack_latents(latents: Any, height: int, width: int, vae_scale_factor: int) -> Any:
        size = int(height) // vae_scale_factor, int(width) // vae_scale_factor
        return latents.transpose(1, 2).unflatten(2, size)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: Any,
        device: Any,
        generator: Any,
        latents: Any = None,
    ) -> Any:
        """Return packed latents (B, h w, C) and their position ids."""
        h, w = int(height) // self.vae_scale_factor, int(width) // self.vae_scale_factor
        channels = self.transformer.config.in_channels
        ids = self._prepare_latent_image_ids(batch_size, h, w, device, dtype)
        if latents is not None:
            return self._given((batch_size, h * w, channels), latents, dtype, device), ids
        noise = super().prepare_latents(
            batch_size, channels, height, width, dtype, device, generator
        )
        return self._pack_latents(noise, batch_size, channels, h, w), ids

    @functools.wraps(FluxPipeline.__call__)
    def __call__(self, *args: Any, max_sequence_length: int | None = None, **kwargs: Any) -> Any:
        return super().__call__(
            *args, max_sequence_length=self._text_length(max_sequence_length) or 512, **kwargs
        )


class DCGenStableDiffusion3Pipeline(DeepLatents, StableDiffusion3Pipeline):
    """StableDiffusion3Pipeline over deep latents."""

    def __init__(
        self,
        transformer,
        scheduler,
        vae,
        text_encoder,
        tokenizer,
        text_encoder_2,
        tokenizer_2,
        text_encoder_3,
        tokenizer_3,
        image_encoder=None,
        feature_extractor=None,
        image_size: int | None = None,
        max_sequence_length: int | None = None,
        codec: dict | None = None,
    ):
        super().__init__(
            transformer=transformer,
            scheduler=scheduler,
            vae=None,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self._use(vae, image_size, max_sequence_length, codec)

    def check_inputs(
        self,
        prompt: Any,
        prompt_2: Any,
        prompt_3: Any,
        height: int,
        width: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self._check_size(height, width)
        super().check_inputs(prompt, prompt_2, prompt_3, height, width, *args, **kwargs)

    @functools.wraps(StableDiffusion3Pipeline.__call__)
    def __call__(self, *args: Any, max_sequence_length: int | None = None, **kwargs: Any) -> Any:
        return super().__call__(
            *args, max_sequence_length=self._text_length(max_sequence_length) or 256, **kwargs
        )


class DCGenSanaPipeline(DeepLatents, SanaPipeline):
    """SanaPipeline over deep latents.

    It selects the table of aspect ratios by the default image size. The stock pipeline selects it by the side of the
    latents, which a deeper autoencoder halves.
    """

    def __init__(
        self,
        tokenizer,
        text_encoder,
        vae,
        transformer,
        scheduler,
        image_size: int | None = None,
        max_sequence_length: int | None = None,
        codec: dict | None = None,
    ):
        super().__init__(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=None,
            transformer=transformer,
            scheduler=scheduler,
        )
        self._use(vae, image_size, max_sequence_length, codec)
        self.image_processor = PixArtImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @functools.wraps(SanaPipeline.__call__)
    def __call__(
        self,
        *args: Any,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        use_resolution_binning: bool = True,
        max_sequence_length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        side = self.config.image_size or 1024
        target = height or side, width or side
        size, bins = target, BINS.get(side)
        binned = use_resolution_binning and bins is not None
        if binned:
            size = self.image_processor.classify_height_width_bin(*target, ratios=bins)
        # images that are cropped afterwards are returned as a tensor first
        tensor = binned and size != target and output_type != "latent"
        self._check_size(*size)
        output = super().__call__(
            *args,
            height=size[0],
            width=size[1],
            output_type="pt" if tensor else output_type,
            use_resolution_binning=False,
            max_sequence_length=self._text_length(max_sequence_length) or 300,
            **kwargs,
        )
        if tensor:
            images = self.image_processor.resize_and_crop_tensor(
                2 * output.images - 1, target[1], target[0]
            )
            output.images = self.image_processor.postprocess(images, output_type=output_type)
        return output if return_dict else (output.images,)
