"""Registry of models by name, and of families by pipeline class.

Entries are strings until one is used, so that listing loads neither torch nor diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.core.errors import UsageError
from diffalign.core.nearest import nearest
from diffalign.pipelines.places import UnknownModel, look

if TYPE_CHECKING:
    from diffalign.pipelines.base import TextToImageModel


FAMILIES = {
    "StableDiffusion3Pipeline": "diffalign.pipelines.sd3:SD3Model",
    "FluxPipeline": "diffalign.pipelines.flux:FluxModel",
    "DCGenFluxPipeline": "diffalign.pipelines.flux:DCGenFluxModel",
    "DCGenStableDiffusion3Pipeline": "diffalign.pipelines.sd3:SD3Model",
    "DCGenSanaPipeline": "diffalign.pipelines.sana:SanaModel",
    "StableDiffusionPipeline": "diffalign.pipelines.sd:SDModel",
    "StableDiffusionXLPipeline": "diffalign.pipelines.sdxl:SDXLModel",
    "SanaPipeline": "diffalign.pipelines.sana:SanaModel",
    "Flux2Pipeline": "diffalign.pipelines.flux2:Flux2Model",
    "Flux2KleinPipeline": "diffalign.pipelines.flux2:Flux2Model",
    "ZImagePipeline": "diffalign.pipelines.z_image:ZImageModel",
    "QwenImagePipeline": "diffalign.pipelines.qwen_image:QwenImageModel",
}


@dataclass(frozen=True)
class ModelSpec:
    """Entry of a named model: its source, and settings that its pipeline does not store."""

    source: str
    description: str
    max_sequence_length: int | None = None
    lora: str | None = None
    """LoRA that is merged into the base model to make a published student.

    The file in its repository follows after a colon.
    """
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    scheduler: str | None = None
    """Scheduler of a student, if it differs from its base's, in the notation of `schedulers.stock`."""


SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
MODELS = {
    "shapes-sd3": ModelSpec(
        "package:shapes-sd3",
        "8 M parameters, SD3.5's layout, 64 px Shapes; ships with diffalign",
    ),
    "shapes-flux": ModelSpec(
        "package:shapes-flux",
        "6 M parameters, FLUX.1's layout, 64 px Shapes; ships with diffalign",
    ),
    "shapes-sd": ModelSpec(
        "package:shapes-sd",
        "4 M parameters, Stable Diffusion 1.5's layout, 64 px Shapes; ships with diffalign",
    ),
    "shapes-flux-schnell": ModelSpec(
        "package:shapes-flux-schnell",
        "a student of shapes-flux for 1 to 4 steps without guidance; ships with diffalign",
    ),
    "shapes-sd-lcm": ModelSpec(
        "package:shapes-sd-lcm",
        "a student of shapes-sd for 2 to 8 steps without guidance; ships with diffalign",
    ),
    "sd3.5-medium": ModelSpec(
        "stabilityai/stable-diffusion-3.5-medium", "Stable Diffusion 3.5 medium, 2.5 B"
    ),
    "sd3.5-large": ModelSpec(
        "stabilityai/stable-diffusion-3.5-large", "Stable Diffusion 3.5 large, 8 B"
    ),
    "sd1.5": ModelSpec(SD15, "Stable Diffusion 1.5, 0.9 B"),
    "lcm-sd1.5": ModelSpec(
        SD15,
        "Stable Diffusion 1.5 with LCM-LoRA in its weights, for 2 to 8 steps without guidance",
        lora="latent-consistency/lcm-lora-sdv1-5",
        scheduler="LCMScheduler",
    ),
    "pcm-sd1.5": ModelSpec(
        SD15,
        "Stable Diffusion 1.5 with PCM in its weights, for 4 steps without guidance",
        lora="wangfuyun/PCM_Weights:sd15/pcm_sd15_smallcfg_4step_converted.safetensors",
        scheduler="TCDScheduler,timestep_spacing=trailing",
    ),
    "sdxl": ModelSpec(
        "stabilityai/stable-diffusion-xl-base-1.0", "Stable Diffusion XL base 1.0, 2.6 B"
    ),
    "sdxl-turbo": ModelSpec("stabilityai/sdxl-turbo", "SDXL Turbo, 2.6 B, for 1 to 4 steps"),
    "flux.1-dev": ModelSpec("black-forest-labs/FLUX.1-dev", "FLUX.1 [dev], 12 B"),
    "flux.1-krea": ModelSpec("black-forest-labs/FLUX.1-Krea-dev", "FLUX.1 Krea [dev], 12 B"),
    "flux.1-schnell": ModelSpec("black-forest-labs/FLUX.1-schnell", "FLUX.1 [schnell], 12 B", 256),
    "sana-1.6b": ModelSpec(
        "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", "SANA 1.6 B, 1024 px"
    ),
    "flux.2-klein-base-4b": ModelSpec(
        "black-forest-labs/FLUX.2-klein-base-4B", "FLUX.2 [klein] 4 B base, for training"
    ),
    "flux.2-klein-base-9b": ModelSpec(
        "black-forest-labs/FLUX.2-klein-base-9B", "FLUX.2 [klein] 9 B base, for training"
    ),
    "flux.2-klein-4b": ModelSpec(
        "black-forest-labs/FLUX.2-klein-4B", "FLUX.2 [klein] 4 B, distilled to 4 steps"
    ),
    "flux.2-klein-9b": ModelSpec(
        "black-forest-labs/FLUX.2-klein-9B", "FLUX.2 [klein] 9 B, distilled to 4 steps"
    ),
    "flux.2-dev": ModelSpec("black-forest-labs/FLUX.2-dev", "FLUX.2 [dev], 32 B"),
    "z-image": ModelSpec("Tongyi-MAI/Z-Image", "Z-Image, 6 B, for training"),
    "z-image-turbo": ModelSpec(
        "Tongyi-MAI/Z-Image-Turbo", "Z-Image-Turbo, 6 B, distilled to 8 steps"
    ),
    "qwen-image": ModelSpec("Qwen/Qwen-Image", "Qwen-Image, 20 B"),
    "qwen-image-2512": ModelSpec("Qwen/Qwen-Image-2512", "Qwen-Image of December 2025, 20 B"),
}


def available() -> dict[str, ModelSpec]:
    """Return the named models; leave out shipped models whose files are missing."""
    return {
        n: s for n, s in MODELS.items() if not s.source.startswith("package:") or _path(s).is_dir()
    }


def resolve(name: str) -> ModelSpec:
    """Return the entry of a name, a folder, a single file or a hub id.

    A hub id is `owner/name` or `owner/name@revision`.

    Raises:
        UnknownModel: the name is none of these.
    """
    specs = available()
    if name in specs:
        return specs[name]
    place = look(name)
    if place is not None:
        kinds = {"folder": "local folder", "file": "single file", "hub": "hub id"}
        return ModelSpec(place.source, kinds[place.kind], revision=place.revision)
    hint = nearest(name, specs, otherwise=f"known are {', '.join(sorted(specs))}.")
    raise UnknownModel(
        f"no model {name!r}{hint} A folder, a .safetensors file or a hub id (owner/name) works, too",
        setting="model.name",
    )


def family_of(pipeline_class: str) -> type[TextToImageModel]:
    """Return the family of a diffusers pipeline class, or raise UnknownModel."""
    if pipeline_class not in FAMILIES:
        raise UnknownModel(
            f"pipeline class {pipeline_class} is not supported; supported are {', '.join(FAMILIES)}"
        )
    module, _, attribute = FAMILIES[pipeline_class].partition(":")
    family: type[TextToImageModel] = getattr(import_module(module), attribute)
    return family


def load_pipeline(source: str, **kwargs: Any) -> Any:
    """Load a diffusers pipeline, with packed weights and Q-Sched's factors if it has them.

    It extends `DiffusionPipeline.from_pretrained`, which reads neither the weights packed by `diffalign quantize` nor
    the scheduler's factors of `diffalign qsched`.

    Args:
        source: a name of `diffalign list models`, a folder, a .safetensors file or a hub id.
        kwargs: arguments of `from_pretrained`. The default of `torch_dtype` is float32, because diffusers would load
            its parts in float32 and transformers its own in the dtype of their files, which do not fit together.

    Raises:
        UnknownModel: the model does not exist or is incomplete.
        UserError: the backend of quantised weights is missing, or the factors are damaged.
    """
    from torch import float32

    import diffalign.quantization.quantizer  # noqa: F401 (registers packed weights)
    from diffalign.pipelines.loading import (
        apply_factors,
        as_student,
        check_backends,
        from_folder,
        open_folder,
    )

    spec = available().get(str(source))
    if not {"torch_dtype", "dtype"} & set(kwargs):
        kwargs["torch_dtype"] = float32
    place = look(source_of(spec) if spec else str(source), setting="source")
    if place is None:
        raise UnknownModel(
            f"source: {source} is no name of a model, no folder, no .safetensors file and no hub id"
        )
    if place.kind == "file":
        from diffalign.pipelines.single_file import load_single_file

        return load_single_file(place.source, **kwargs)
    folder = open_folder(place, kwargs)
    check_backends(folder)
    pipeline = from_folder(folder)
    apply_factors(pipeline)
    if spec is not None:
        as_student(pipeline, lora=spec.lora, scheduler=spec.scheduler)
    if type(pipeline).__name__ in FAMILIES:
        side = family_of(type(pipeline).__name__).default_sample_size(pipeline)
        if side is not None:
            pipeline.default_sample_size = side
    return pipeline


def load_model(
    name: str,
    *,
    dtype: Any = None,
    revision: str | None = None,
    max_sequence_length: int | None = None,
    device: Any = "cpu",
    **kwargs: Any,
) -> TextToImageModel:
    """Load a pipeline by name, folder or hub id, and wrap it in its family.

    Args:
        dtype: dtype of the weights; None for bfloat16.
        kwargs: further arguments of `from_pretrained`.
    """
    import torch

    from diffalign.pipelines.checks import check_pipeline

    spec = resolve(name)
    source = source_of(spec)
    if spec.lora is not None and kwargs.get("quantization_config") is not None:
        raise UsageError(
            f"{name} has a LoRA in its weights and cannot be quantised while they are read: `diffalign merge` makes a "
            "folder of it"
        )
    revision = revision or spec.revision
    check_pipeline(spec, revision=revision, arguments=kwargs)
    if revision is not None:
        kwargs["revision"] = revision
    pipeline = load_pipeline(name, torch_dtype=dtype or torch.bfloat16, **kwargs)
    pipeline.set_progress_bar_config(disable=True)
    return checked(_wrap(pipeline, spec, max_sequence_length), source).to(device)


def load_meta_model(
    name: str,
    *,
    dtype: Any = None,
    revision: str | None = None,
    max_sequence_length: int | None = None,
) -> TextToImageModel:
    """Build the model of `load_model` on the meta device, without reading weights.

    Named models use the published configurations, so that the hub is not queried.
    """
    import diffusers
    import torch
    import transformers

    from diffalign.pipelines import published
    from diffalign.pipelines.loading import as_student, open_folder, pipeline_class

    spec = resolve(name)
    if revision is None and published.is_published(name):
        pipeline = published.pipeline(name)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                torch.nn.Module.to(part, dtype or torch.bfloat16)
        as_student(pipeline, scheduler=spec.scheduler)
        return _wrap(pipeline, spec, max_sequence_length)
    place = look(source_of(spec))
    assert place is not None
    if place.kind == "file":
        from diffalign.pipelines.single_file import layout_of

        place = layout_of(place.source)
    folder = open_folder(place, {"revision": revision or spec.revision})
    index, source = folder.index, folder.source
    parts: dict[str, Any] = {}
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list):
            continue
        library, kind = entry
        where = {"subfolder": part, **folder.where}
        if library is None or folder.options.get(part, ...) is None:
            parts[part] = None
        elif library == "diffusers":
            cls = getattr(diffusers, kind)
            with torch.device("cpu" if kind.endswith("Scheduler") else "meta"):
                parts[part] = cls.from_config(cls.load_config(source, **where))
        elif "Tokenizer" in kind:
            parts[part] = getattr(transformers, kind).from_pretrained(source, **where)
        else:
            config = transformers.AutoConfig.from_pretrained(source, **where)
            with torch.device("meta"):
                parts[part] = getattr(transformers, kind)(config)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype or torch.bfloat16)
    # pipelines of moved models have these settings
    settings = {k: index[k] for k in ("image_size", "max_sequence_length") if k in index}
    pipeline = pipeline_class(folder.class_name)(**parts, **settings)
    as_student(pipeline, scheduler=spec.scheduler)
    return _wrap(pipeline, spec, max_sequence_length)


def wrap_pipeline(
    pipeline: Any,
    *,
    max_sequence_length: int | None = None,
    default_size: tuple[int, int] | None = None,
) -> TextToImageModel:
    """Wrap a loaded pipeline in its family."""
    return family_of(type(pipeline).__name__)(
        pipeline, max_sequence_length=max_sequence_length, default_size=default_size
    )


def checked(model: TextToImageModel, source: str) -> TextToImageModel:
    """Return a model after checking it against its training, if it was moved.

    Raises:
        CodecError: the autoencoder or the number of text tokens differs from that in training.
    """
    from diffalign.latents.codec import CodecError

    trained = model.pipeline.config.get("codec")
    if trained is None:
        return model
    model.codec.check(trained, where=source)
    tokens = model.pipeline.config.max_sequence_length
    if tokens not in (None, model.max_sequence_length):
        raise CodecError(
            f"model.max_sequence_length: {source} was trained with {tokens} text tokens, not "
            f"{model.max_sequence_length}; leave it out"
        )
    return model


def _wrap(pipeline: Any, spec: ModelSpec, max_sequence_length: int | None) -> TextToImageModel:
    # a moved model says itself how long its texts are
    length = (
        max_sequence_length
        or spec.max_sequence_length
        or pipeline.config.get("max_sequence_length")
    )
    return wrap_pipeline(pipeline, max_sequence_length=length)


def source_of(spec: ModelSpec) -> str:
    """Return the folder or the hub id of a model."""
    return str(_path(spec)) if spec.source.startswith("package:") else spec.source


def _path(spec: ModelSpec) -> Path:
    from diffalign.shapes import CHECKPOINTS

    return CHECKPOINTS / spec.source.removeprefix("package:")
