"""Quantise a few-step model and tune its schedule with Q-Sched.

python examples/quantize_and_repair.py [BUDGET]
"""

import sys
from pathlib import Path

from diffalign.data.prompts import load_prompts
from diffalign.pipelines.registry import load_model
from diffalign.quantization.apply import quantize_model
from diffalign.rewards.composition import CompositeReward
from diffalign.tuning.evaluator import Drawing
from diffalign.tuning.tune import Settings, tune

OBJECTIVE = {"verifier": 1.0, "flatness": 0.25}


def main(budget: int = 24, num_prompts: int = 48) -> None:
    """Search factors for two steps of `shapes-sd-lcm` in coarse int4, and save the model with them."""
    full, small = load_model("shapes-sd-lcm"), load_model("shapes-sd-lcm")
    # one scale per row is coarse: groups of 64, the default, leave little to repair
    quantize_model(small.denoiser, "int4", group_size=None)
    result = tune(
        small,
        load_prompts("shapes:train", limit=num_prompts),
        CompositeReward.from_config(OBJECTIVE).score,
        Settings(OBJECTIVE, budget=budget),
        Drawing(num_inference_steps=2),
        reference=full,
        file=Path("runs/example-qsched/scores.jsonl"),
    )
    print("accepted:", result.accepted, "factors:", result.coefficients)
    result.apply(small.pipeline)
    small.pipeline.save_pretrained("runs/example-qsched/model")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
