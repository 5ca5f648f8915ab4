"""Load a folder with diffusers alone, and print what it is: FOLDER."""

import sys

sys.modules["diffalign"] = None

from diffusers import DiffusionPipeline  # noqa: E402

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(pipeline).__name__, pipeline.vae_scale_factor, pipeline.default_sample_size)
