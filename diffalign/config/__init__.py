"""What a run is: dataclasses (`schema`), and loading them from YAML with overrides (`loading`).

Nothing here imports torch. Every error names the field and, for a misspelt one, the nearest valid name.
"""

from diffalign.config.loading import (
    decode,
    describe_recipes,
    differences,
    dump,
    load,
    recipes,
    to_dict,
)
from diffalign.config.schema import (
    ALGORITHMS,
    SOLVERS,
    WEIGHTS,
    AlgorithmConfig,
    AWMConfig,
    ConfigError,
    DiffusionNFTConfig,
    EvaluationConfig,
    FlowGRPOConfig,
    ForwardProcessConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PromptsConfig,
    RolloutConfig,
    RunConfig,
    TrainingConfig,
    nearest,
)

__all__ = [
    "ALGORITHMS",
    "SOLVERS",
    "WEIGHTS",
    "AWMConfig",
    "AlgorithmConfig",
    "ConfigError",
    "DiffusionNFTConfig",
    "EvaluationConfig",
    "FlowGRPOConfig",
    "ForwardProcessConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PromptsConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainingConfig",
    "decode",
    "describe_recipes",
    "differences",
    "dump",
    "load",
    "nearest",
    "recipes",
    "to_dict",
]
