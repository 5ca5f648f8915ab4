"""Models by name, families by pipeline class. Strings until one is used: listing loads neither torch nor diffusers."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.core.errors import UsageError, UserError

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
}


@dataclass(frozen=True)
class ModelSpec:
    """A named model: where it is, and what its pipeline does not know about itself."""

    source: str
    description: str
    max_sequence_length: int | None = None
    lora: str | None = None
    """Of a student that is published as one, merged into the weights; behind a colon the file in it."""
    scheduler: str | None = None
    """Of a student, where its base has another, as `schedulers.stock` reads it."""


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
}


class UnknownModel(UserError, ValueError):
    """Neither a known name, nor a pipeline folder, nor a hub id, or of a family that is not supported."""


def available() -> dict[str, ModelSpec]:
    """Named models; those that ship with the suite only where their files are there."""
    return {
        n: s for n, s in MODELS.items() if not s.source.startswith("package:") or _path(s).is_dir()
    }


def resolve(name: str) -> ModelSpec:
    """The specification of a name, a folder or a hub id."""
    known = available()
    if name in known:
        return known[name]
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise UnknownModel(
                f"model.name: {name} has no model_index.json; expected a pipeline in diffusers' layout"
            )
        return ModelSpec(name, "local folder")
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return ModelSpec(name, "hub id")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"
    raise UnknownModel(
        f"model.name: no model {name!r}; {hint} A folder or a hub id (owner/name) works, too"
    )


def family_of(pipeline_class: str) -> type[TextToImageModel]:
    """The family that drives a diffusers pipeline class."""
    if pipeline_class not in FAMILIES:
        raise UnknownModel(
            f"pipeline class {pipeline_class} is not supported; supported are {', '.join(FAMILIES)}"
        )
    module, _, attribute = FAMILIES[pipeline_class].partition(":")
    return getattr(import_module(module), attribute)


def load_pipeline(source: str, **kwargs: Any) -> Any:
    """`DiffusionPipeline.from_pretrained`, with what stock diffusers leaves lying in a folder of this suite put to use:
    weights packed by `diffalign quantize`, and the factors that `diffalign qsched` found for the scheduler.

    Args:
        source: a folder or a hub id.
        kwargs: of `from_pretrained`, such as `torch_dtype`: float32, unless it is given. (Left to themselves diffusers
            loads its parts in float32 and transformers its own in the dtype of their files, and the two do not fit.)

    Raises:
        UnknownModel: nothing is there, or not all of it.
        UserError: the backend that its weights are quantised with is missing, or its factors are damaged.
    """
    from safetensors import SafetensorError
    from torch import float32

    import diffalign.quantization.quantizer  # noqa: F401 (registers packed weights)
    from diffalign.pipelines.loading import apply_factors, check_backends, loader_of

    if not {"torch_dtype", "dtype"} & set(kwargs):
        kwargs["torch_dtype"] = float32
    check_backends(source, kwargs)
    try:
        pipeline = loader_of(source, kwargs).from_pretrained(source, **kwargs)
    except UserError:
        raise
    except (OSError, SafetensorError, ImportError, NotImplementedError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UnknownModel(f"{source} could not be loaded: {reason}") from error
    apply_factors(pipeline)
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
    """Load a stock pipeline by name, folder or hub id, and wrap it in its family. `dtype` defaults to bfloat16; further
    arguments are of `from_pretrained`."""
    import torch

    from diffalign.pipelines.loading import as_student, class_name

    spec = resolve(name)
    source = _source(spec)
    if spec.lora is not None and kwargs.get("quantization_config") is not None:
        raise UsageError(
            f"{name} has a LoRA in its weights and cannot be quantised while they are read: `diffalign merge` makes a "
            "folder of it"
        )
    index = Path(source) / "model_index.json"
    if index.is_file():  # refuse an unsupported pipeline before its weights are read
        family_of(class_name(json.loads(index.read_text(encoding="utf-8"))))
    pipeline = load_pipeline(
        source, torch_dtype=dtype or torch.bfloat16, revision=revision, **kwargs
    )
    as_student(pipeline, lora=spec.lora, scheduler=spec.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return checked(_wrap(pipeline, spec, max_sequence_length), source).to(device)


def load_meta_model(
    name: str,
    *,
    dtype: Any = None,
    revision: str | None = None,
    max_sequence_length: int | None = None,
) -> TextToImageModel:
    """Build the same model with all modules on the meta device: configurations are read, weights are not.

    Models that are known by name have their published configurations, without a look at the hub.
    """
    import diffusers
    import torch
    import transformers

    from diffalign.pipelines import published
    from diffalign.pipelines.loading import as_student, class_name, pipeline_class

    spec = resolve(name)
    if revision is None and published.is_published(name):
        pipeline = published.pipeline(name)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                torch.nn.Module.to(part, dtype or torch.bfloat16)
        as_student(pipeline, scheduler=spec.scheduler)
        return _wrap(pipeline, spec, max_sequence_length)
    source = _source(spec)
    index = diffusers.DiffusionPipeline.load_config(source, revision=revision)
    parts: dict[str, Any] = {}
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list):
            continue
        library, kind = entry
        where = {"subfolder": part, "revision": revision}
        if library is None:
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
    told = {
        k: index[k] for k in ("image_size", "max_sequence_length") if k in index
    }  # of moved ones
    pipeline = pipeline_class(class_name(index))(**parts, **told)
    as_student(pipeline, scheduler=spec.scheduler)
    return _wrap(pipeline, spec, max_sequence_length)


def wrap_pipeline(
    pipeline: Any,
    *,
    max_sequence_length: int | None = None,
    default_size: tuple[int, int] | None = None,
) -> TextToImageModel:
    """A pipeline that is loaded already, in its family."""
    return family_of(type(pipeline).__name__)(
        pipeline, max_sequence_length=max_sequence_length, default_size=default_size
    )


def checked(model: TextToImageModel, source: str) -> TextToImageModel:
    """A moved model with the autoencoder and the text tokens that it was trained with.

    Raises:
        CodecError: it has others.
    """
    from diffalign.latents.codec import CodecError

    told = model.pipeline.config.get("codec")
    if told is None:
        return model
    model.codec.check(told, where=source)
    tokens = model.pipeline.config.max_sequence_length
    if tokens not in (None, model.max_sequence_length):
        raise CodecError(
            f"model.max_sequence_length: {source} was trained with {tokens} text tokens, not "
            f"{model.max_sequence_length}; leave it out"
        )
    return model


def _wrap(pipeline: Any, spec: ModelSpec, max_sequence_length: int | None) -> TextToImageModel:
    return family_of(type(pipeline).__name__)(
        pipeline,
        max_sequence_length=max_sequence_length
        or spec.max_sequence_length
        or pipeline.config.get("max_sequence_length"),  # of moved ones
    )


def _source(spec: ModelSpec) -> str:
    """A folder or a hub id."""
    return str(_path(spec)) if spec.source.startswith("package:") else spec.source


def _path(spec: ModelSpec) -> Path:
    from diffalign.shapes import CHECKPOINTS

    return CHECKPOINTS / spec.source.removeprefix("package:")
