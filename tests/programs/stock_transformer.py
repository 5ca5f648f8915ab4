"""Load a transformer with diffusers alone: FOLDER."""

import sys

from diffusers import FluxTransformer2DModel

FluxTransformer2DModel.from_pretrained(sys.argv[1])
