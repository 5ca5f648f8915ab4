"""diffalign: align diffusion models, make them fast, and prove both."""

from typing import Any

__version__ = "0.1.0"


def load(source: str, **kwargs: Any) -> Any:
    """A diffusers pipeline as `DiffusionPipeline.from_pretrained(source, **kwargs)` loads it, with packed weights and
    Q-Sched's factors in force where the folder has them (docs/qsched.md)."""
    from diffalign.pipelines.registry import load_pipeline

    return load_pipeline(source, **kwargs)
