"""Launch preference training on several processes.

The flags of diffusers' training scripts are accepted:

accelerate launch scripts/train_inversion_dpo.py --pretrained_model_name_or_path=sd1.5 --train_data_dir=pickapic
    --resolution=512 --train_batch_size=4 --gradient_accumulation_steps=16 --beta_dpo=2000 --max_train_steps=2000

`--config RECIPE` starts from another recipe than `inversion-dpo`; `--key.sub=value` sets anything.
"""

from __future__ import annotations

import sys

from diffalign.cli import main
from diffalign.scripts.launching import arguments

if __name__ == "__main__":
    sys.exit(main(arguments(sys.argv[1:], script="train_inversion_dpo", default="inversion-dpo")))
