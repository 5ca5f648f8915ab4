"""Measure a shipped Shapes model on held-out prompts, with and without guidance, three seeds.

Usage: python -m diffalign.scripts.shapes.measure shapes-sd3 --output benchmarks/results/shapes-sd3.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from diffalign.core.versions import versions
from diffalign.pipelines.registry import load_model
from diffalign.scripts.shapes.evaluation import evaluate_shapes
from diffalign.scripts.shapes.relations import measure_relations

SEEDS = (1, 2, 3)


def measure(
    name: str, steps: Sequence[int], guidance: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Return the median over seeds of every task, by guidance and number of steps.

    There are 98 held-out prompts with two images each.
    """
    model = load_model(name)
    rows_by_setting = {}
    for scale, number in product(guidance, steps):
        label = f"guidance {scale:g}" if scale > 1 else "without guidance"
        if len(steps) > 1:
            label += f", {number} steps"
        rows = [
            evaluate_shapes(model, seed=seed, num_inference_steps=number, guidance_scale=scale)
            for seed in SEEDS
        ]
        rows_by_setting[label] = {
            k: round(statistics.median(r[k] for r in rows), 4) for k in rows[0]
        }
        rows_by_setting[label]["overall_low"] = round(min(r["overall"] for r in rows), 4)
        rows_by_setting[label]["overall_high"] = round(max(r["overall"] for r in rows), 4)
    return rows_by_setting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[10])
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0, 3.0])
    args = parser.parse_args()
    result = {
        "command": shlex.join(["python", "-m", "diffalign.scripts.shapes.measure", *sys.argv[1:]]),
        "model": args.model,
        "num_inference_steps": args.num_inference_steps,
        "seeds": SEEDS,
        "held_out": measure(args.model, args.num_inference_steps, args.guidance_scale),
        "relations": measure_relations(load_model(args.model), seed=SEEDS[0]),
        "versions": versions(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
