"""Rules of combinations: what is dropped or refused, why, and what to do.

An option that "auto" chose is dropped and listed in the report. An option that the caller named is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffalign.core.errors import UsageError


@dataclass(frozen=True)
class Situation:
    """Facts about a pipeline and a call that rules look at.

    Attributes:
        options: values of the options that are on.
        steps: number of steps.
        device: type of the denoiser's device.
        capability: compute capability of a CUDA device; (0, 0) without one.
        cache_problem: reason of `conditions.why_no_cache`, or None.
        has_lora: whether the denoiser carries a LoRA.
        has_factors: whether Q-Sched's factors are in force.
        is_quantized: whether the denoiser is quantised already.
        guides: whether guidance costs a second half of the batch.
        attention_parts: number of parts whose attention a backend can compute.
        block_lists: whether the denoiser has lists of blocks.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 28
    device: str = "cpu"
    capability: tuple[int, int] = (0, 0)
    cache_problem: str | None = None
    has_lora: bool = False
    has_factors: bool = False
    is_quantized: bool = False
    guides: bool = True
    attention_parts: int = 1
    block_lists: bool = True


@dataclass(frozen=True)
class Rule:
    """Condition under which an option cannot be in force.

    Attributes:
        option: option that is dropped or refused.
        when: condition.
        why: reason, a text or a function of the situation.
        remedy: what the caller can do.
        source: where the reason was learnt.
    """

    option: str
    when: Callable[[Situation], bool]
    why: str | Callable[[Situation], str]
    remedy: str
    source: str

    def reason(self, situation: Situation) -> str:
        """Return the reason as text."""
        return self.why if isinstance(self.why, str) else self.why(situation)


@dataclass(frozen=True)
class Dropped:
    """Option that is not in force, with the reason and the remedy."""

    option: str
    why: str
    remedy: str


RULES = (
    Rule(
        "cache",
        lambda s: s.cache_problem is not None,
        lambda s: s.cache_problem or "",
        "use a deterministic first-order scheduler with more than 8 steps",
        "unslothai/unsloth#6703: a cache gains nothing with few steps",
    ),
    Rule(
        "cache",
        lambda s: s.has_factors,
        "Q-Sched's factors belong to predictions that are computed in every step",
        "keep one of the two: remove the factors, or leave the cache out",
        "the factors' fingerprint",
    ),
    Rule(
        "quantize",
        lambda s: s.is_quantized,
        "the denoiser is quantised already",
        "load the original weights to quantise them otherwise",
        "diffalign.quantization.packed.check_unquantized",
    ),
    Rule(
        "quantize",
        lambda s: s.has_lora,
        "the denoiser carries a LoRA, and quantised weights cannot be fused with it later",
        "merge the LoRA (`diffalign merge`), or accelerate first and load the LoRA then",
        "huggingface/diffusers#10621 and #11752",
    ),
    Rule(
        "quantize",
        lambda s: "fp8" in str(s.options["quantize"]) and s.capability < (8, 9),
        "float8 needs a CUDA device of compute capability 8.9",
        "choose int8 or int4, which run everywhere",
        "diffalign.quantization.backends",
    ),
    Rule(
        "quantize",
        lambda s: (
            s.options["quantize"] in ("torchao-int8", "torchao-fp8") and "compile" not in s.options
        ),
        "8-bit activations are slower than plain weights unless they are compiled",
        "compile the blocks (compile='blocks'), or choose int8",
        "pytorch/ao#1600",
    ),
    Rule(
        "attention",
        lambda s: s.attention_parts == 0,
        "no attention of this denoiser goes through torch's kernel or diffusers' dispatcher",
        "leave the backend out, or put diffusers' default processors back",
        "diffalign.acceleration.attention.parts_of",
    ),
    Rule(
        "guidance",
        lambda s: not s.guides,
        "this call has no second half of the batch for guidance",
        "leave the option out",
        "FLUX.1-dev embeds its guidance; students have none",
    ),
    Rule(
        "compile",
        lambda s: s.device != "cuda",
        "on this device compiling takes longer than it gains in hundreds of images",
        "name it to compile anyway: compile='blocks'",
        "measured on a CPU: 1.13x after 10 seconds for a model of 6 M parameters",
    ),
    Rule(
        "compile",
        lambda s: not s.block_lists,
        "the denoiser has no list of blocks",
        "leave the option out",
        "diffalign.pipelines.compiled",
    ),
    Rule(
        "compile",
        lambda s: s.options.get("offload") == "group",
        "group offloading moves weights between compiled blocks and undoes the gain",
        "choose offload='model', or do not compile",
        "huggingface/diffusers#11584",
    ),
    Rule(
        "offload",
        lambda s: s.device != "cuda",
        "the weights are not on a CUDA device, so there is nothing to offload",
        "move the pipeline to CUDA, or leave the option out",
        "diffusers' enable_model_cpu_offload",
    ),
)
"""All rules; of two options that exclude each other the rule names the weaker."""
NAMED_IS_ENOUGH = ("on this device compiling",)
"""Beginnings of reasons that do not hold against an option that the caller named."""


def settle(
    options: Mapping[str, tuple[Any, bool]], situation: Situation
) -> tuple[dict[str, Any], list[Dropped]]:
    """Return the options that can be in force together, and those that were dropped.

    Args:
        options: value of each option, and whether the caller named it.
        situation: facts about the pipeline; its `options` are replaced.

    Raises:
        UsageError: the caller named an option that a rule excludes.
    """
    from dataclasses import replace

    values = {name: value for name, (value, _) in options.items()}
    dropped: list[Dropped] = []
    # the second round sees what the first one dropped
    for rule in (*RULES, *RULES):
        if rule.option not in values:
            continue
        present = replace(situation, options=values)
        if not rule.when(present):
            continue
        why, named = rule.reason(present), options[rule.option][1]
        if named and why.startswith(NAMED_IS_ENOUGH):
            continue
        if named:
            raise UsageError(
                f"{rule.option}={values[rule.option]!r}: {why}. What helps: {rule.remedy}."
            )
        del values[rule.option]
        dropped.append(Dropped(rule.option, why, rule.remedy))
    return values, dropped
