"""Save a checkpoint, and another one where no file may be that large: FOLDER."""

import resource
import signal
import sys
from pathlib import Path

import torch

from diffalign.training import checkpoint

folder = Path(sys.argv[1])
checkpoint.save(folder, 1, {"default": {"w": torch.zeros(8)}}, {}, keep=2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoint.save(folder, 2, {"default": {"w": torch.zeros(100_000)}}, {}, keep=2)
except checkpoint.CheckpointError as error:
    print(error)
