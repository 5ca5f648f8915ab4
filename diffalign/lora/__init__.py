"""LoRA policies on one base (`policies`), files of stock pipelines (`files`), other formats (`formats`)."""

from diffalign.lora.files import export_lora, load_lora
from diffalign.lora.policies import (
    AVERAGED,
    CURRENT,
    LAGGED,
    REFERENCE,
    SAMPLER,
    adapter_parameters,
    adapter_state,
    attach,
    blend,
    folded,
    keep_input_dtype,
    load_adapter_state,
    merged,
    policy,
    trainable,
    unresolved,
)
from diffalign.lora.source import WEIGHT_NAME

__all__ = [
    "AVERAGED",
    "CURRENT",
    "LAGGED",
    "REFERENCE",
    "SAMPLER",
    "WEIGHT_NAME",
    "adapter_parameters",
    "adapter_state",
    "attach",
    "blend",
    "export_lora",
    "folded",
    "keep_input_dtype",
    "load_adapter_state",
    "load_lora",
    "merged",
    "policy",
    "trainable",
    "unresolved",
]
