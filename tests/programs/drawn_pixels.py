"""Print a digest of the pixels that a composed FOLDER draws."""

import hashlib
import sys

import torch

import diffalign

pipe = diffalign.load(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
arguments = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 16, "width": 16}
images = pipe(
    ["a photo of 1 red circles"], generator=generator, output_type="np", **arguments
).images
print(hashlib.sha256(images.tobytes()).hexdigest())
