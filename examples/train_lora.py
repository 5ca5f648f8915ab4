"""Train a LoRA from Python, and draw with it in stock diffusers.

    python examples/train_lora.py [--training.num_updates=20 ...]

Settings are those of `diffalign train`. The demo recipe plans ten minutes; the run resumes if it is interrupted.
"""

import sys

import torch

import diffalign
from diffalign import config
from diffalign.training.run import run


def main(settings: list[str]) -> None:
    """Train, print the scores before and after, and save an image."""
    settings = ["--output_dir=runs/example-lora", *settings]
    run_config = config.load("demo", settings)
    summary = run(run_config)
    print("GenEval before:", summary["geneval_before"], "after:", summary["geneval_after"])

    pipeline = diffalign.load("shapes-sd3", torch_dtype=torch.float32)
    pipeline.load_lora_weights(f"{run_config.output_dir}/lora")
    image = pipeline(
        "a photo of a red circle and a blue square",
        num_inference_steps=10,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    image.save(f"{run_config.output_dir}/image.png")


if __name__ == "__main__":
    main(sys.argv[1:])
