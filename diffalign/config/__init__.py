"""Settings of runs: dataclasses (one file per method), loaded from YAML with overrides.

This package does not import torch. Every error names the field and, for a misspelt one, the nearest valid name.
"""

from diffalign.config.algorithms import (
    WEIGHTS,
    AlgorithmConfig,
    AWMConfig,
    DiffusionNFTConfig,
    FlowGRPOConfig,
    ForwardProcessConfig,
)
from diffalign.config.base import (
    SOLVERS,
    AnyRunConfig,
    DrawingConfig,
    EvaluationConfig,
    PlanConfig,
    PromptsConfig,
)
from diffalign.config.checks import ConfigError
from diffalign.config.distillation import (
    ConsistencyConfig,
    DistillationConfig,
    DistillationRunConfig,
    ReflowConfig,
    TeacherConfig,
)
from diffalign.config.latents import (
    DCGenConfig,
    LatentLoopConfig,
    LatentRunConfig,
    LatentsConfig,
)
from diffalign.config.loading import (
    decode,
    describe_recipes,
    differences,
    dump,
    load,
    recipes,
    to_dict,
)
from diffalign.config.methods import METHODS
from diffalign.config.model import LoraConfig, ModelConfig, OptimizerConfig
from diffalign.config.online import (
    RolloutConfig,
    RunConfig,
    TrainingConfig,
)
from diffalign.config.preference import (
    DiffusionDPOConfig,
    InversionConfig,
    InversionDPOConfig,
    PairsConfig,
    PreferenceAlgorithmConfig,
    PreferenceRunConfig,
)
from diffalign.core.nearest import nearest

__all__ = [
    "METHODS",
    "SOLVERS",
    "WEIGHTS",
    "AWMConfig",
    "AlgorithmConfig",
    "AnyRunConfig",
    "ConfigError",
    "ConsistencyConfig",
    "DCGenConfig",
    "DiffusionDPOConfig",
    "DiffusionNFTConfig",
    "DistillationConfig",
    "DistillationRunConfig",
    "DrawingConfig",
    "EvaluationConfig",
    "FlowGRPOConfig",
    "ForwardProcessConfig",
    "InversionConfig",
    "InversionDPOConfig",
    "LatentLoopConfig",
    "LatentRunConfig",
    "LatentsConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PairsConfig",
    "PlanConfig",
    "PreferenceAlgorithmConfig",
    "PreferenceRunConfig",
    "PromptsConfig",
    "ReflowConfig",
    "RolloutConfig",
    "RunConfig",
    "TeacherConfig",
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
