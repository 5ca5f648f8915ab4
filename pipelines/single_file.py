"""Loading of models from a single .safetensors file, which has no configuration.

ComfyUI and civitai use such files.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    infer_diffusers_model_type,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
)
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from diffalign.core.errors import one_line
from diffalign.pipelines import hub
from diffalign.pipelines.folders import CAN_BE_MISSING
from diffalign.pipelines.loading import readable
from diffalign.pipelines.places import INDEX, Place, UnknownModel, class_name, read_index

logger = logging.getLogger(__name__)
KINDS = {
    **dict.fromkeys(("v1", "v2", "xl_base", "playground-v2-5"), "U-Net"),
    **dict.fromkeys(
        ("sd3", "sd35_medium", "sd35_large", "flux-dev", "flux-schnell", "sana"), "DiT"
    ),
}
"""Model types of single files in diffusers that this suite supports."""
DENOISERS = (
    *("model.diffusion_model.", "double_blocks.", "joint_blocks.", "transformer_blocks."),
    *("down_blocks.", "blocks."),
)
AUTOENCODERS = ("first_stage_model.", "vae.")
LAYOUT = ("*.json", "*/*.json", "*/*.txt", "*/*.model")
"""Patterns of the files in a pipeline's folder that hold no weights."""


def header(path: str) -> dict[str, torch.Tensor]:
    """Return a file's tensors by name, on the meta device.

    Raises:
        UnknownModel: the file is no .safetensors file, holds a LoRA, or holds no denoiser.
    """
    stat = Path(path).stat() if Path(path).is_file() else None
    return _header(path, None if stat is None else (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=2)
def _header(path: str, version: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    """Read a file's header once for each version of the file."""
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UnknownModel(
            f"{path} is no .safetensors file that can be read: {one_line(error)}"
        ) from error
    if any("lora_" in name or ".lora." in name for name in shapes):
        raise UnknownModel(
            f"{path} holds a LoRA and no model: give its base model, and {path} as `lora`"
        )
    if not any(name.startswith(DENOISERS) for name in shapes):
        example = next(iter(shapes), "no tensor at all")
        raise UnknownModel(
            f"{path} holds no denoiser ({example}): give the file of a whole model, or of its U-Net or transformer"
        )
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def base_of(path: str) -> str:
    """Return the hub id of the model whose configuration fits a file's weights.

    Raises:
        UnknownModel: the family of the model is not supported.
    """
    kind = infer_diffusers_model_type(header(path))
    if kind not in KINDS:
        raise UnknownModel(
            f"{path} is a model of the kind {kind}, which is not supported; supported are {', '.join(KINDS)}"
        )
    return str(DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])


def layout_of(path: str, config: str | None = None) -> Place:
    """Return the folder with the configurations and tokenizers of a file's model.

    It is `config`, else a folder beside the file with the file's name, else that of the base model on the hub.

    Raises:
        UnknownModel: no such folder can be found; the message says what is needed.
    """
    beside = Path(path).with_suffix("")
    if config is None and (beside / INDEX).is_file():
        config = str(beside)
    if config is not None and Path(config).is_dir():
        read_index(config)
        return Place("folder", config)
    base = config or base_of(path)
    repo = hub.repository(base)
    try:
        folder = snapshot_download(
            base, allow_patterns=list(LAYOUT), local_files_only=not repo.reachable
        )
        return Place("folder", str(Path(folder)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, HfHubHTTPError):
            raise UnknownModel(hub.refusal(error, base)) from error
        raise UnknownModel(
            f"{path} has weights and no configuration, which is that of {base}: neither in the hub's cache nor can the "
            f"hub be reached. On a machine that reaches it: `hf download {base} --include '*.json' '*.txt' '*.model' "
            f"--local-dir {beside}`, and put that folder beside the file"
        ) from error


def load_single_file(path: str, *, config: str | None = None, **kwargs: Any) -> Any:
    """Load a pipeline from a file; load components that it lacks from its base model.

    Args:
        config: a folder or hub id with the model's configuration (see `layout_of`).
        kwargs: arguments of `from_single_file`, such as `torch_dtype` or loaded components.

    Raises:
        UnknownModel: the file cannot be read, or the configuration or a component is missing.
    """
    tensors = header(path)
    layout = layout_of(path, config)
    index = read_index(layout.source)
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", torch.float32)
    kind = getattr(diffusers, class_name(index), None)
    if kind is None or not hasattr(kind, "from_single_file"):
        raise UnknownModel(f"{path}: {class_name(index)} reads no single files")
    for part in _missing(tensors, index):
        if part not in kwargs:
            kwargs[part] = _from_base(part, index[part], path, layout, dtype)
    kwargs.pop("revision", None)
    with readable(path):
        return kind.from_single_file(
            path, config=layout.source, torch_dtype=dtype, local_files_only=True, **kwargs
        )


def _missing(tensors: dict[str, torch.Tensor], index: dict[str, Any]) -> list[str]:
    """Return the components with weights that a file lacks."""
    parts = []
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        if part == "vae" and not any(name.startswith(AUTOENCODERS) for name in tensors):
            parts.append(part)
        if part.startswith("text_encoder"):
            kind = getattr(import_module(entry[0]), entry[1])
            if not (
                is_t5_in_single_file(tensors)
                if "T5" in entry[1]
                else is_clip_model_in_single_file(kind, tensors)
            ):
                parts.append(part)
    return parts


def _from_base(part: str, entry: list[str], path: str, layout: Place, dtype: Any) -> Any:
    """Load a component from the base model; return None for a missing optional one."""
    kind = getattr(import_module(entry[0]), entry[1])
    try:
        base = base_of(path)
    except UnknownModel:
        base = None
    for place in (layout.source, base):
        if place is None:
            continue
        local = True if Path(place).is_dir() else not hub.repository(place).reachable
        try:
            return kind.from_pretrained(
                place, subfolder=part, torch_dtype=dtype, local_files_only=local
            )
        except (OSError, ValueError, SafetensorError):
            continue
    if part in CAN_BE_MISSING:
        logger.warning("%s holds no %s; it is used without", path, part)
        return None
    raise UnknownModel(
        f"{path} holds no {part}, and that of its base{f' {base}' if base else ''} is not on this machine: "
        f"`hf download {base or 'BASE'} --include '{part}/*'`, or put the folder {part} into "
        f"{Path(path).with_suffix('')}, beside the file"
    )
