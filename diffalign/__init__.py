"""diffalign: align diffusion models, make them fast, and prove both."""

from typing import Any

__version__ = "0.1.0"


def load(source: str, **kwargs: Any) -> Any:
    """Load a diffusers pipeline as `DiffusionPipeline.from_pretrained(source, **kwargs)` does.

    Packed weights and Q-Sched's factors are in force where the folder has them (docs/qsched.md). `source` may also be a
    name of `diffalign list models` or a single .safetensors file (docs/running.md).
    """
    from diffalign.pipelines.registry import load_pipeline

    return load_pipeline(source, **kwargs)
