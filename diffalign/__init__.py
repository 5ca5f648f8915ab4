"""diffalign: align diffusion models, make them fast, and prove both."""

from typing import Any

__version__ = "0.1.0"


def load(source: str, **kwargs: Any) -> Any:
    """Load a diffusers pipeline, with packed weights and Q-Sched's factors if it has them.

    Args:
        source: a name of `diffalign list models`, a folder, a single file or a hub id.
        kwargs: arguments of `DiffusionPipeline.from_pretrained`; `torch_dtype` defaults to float32.
    """
    from diffalign.pipelines.registry import load_pipeline

    return load_pipeline(source, **kwargs)
