"""Write at exit whether the group of processes was left: FOLDER."""

import atexit
import sys
from pathlib import Path

import torch


def note():
    state = "joined" if torch.distributed.is_initialized() else "left"
    Path(sys.argv[1], str(rank)).write_text(state)


# handlers run in reverse: after the suite's
atexit.register(note)

from diffalign.core import processes  # noqa: E402

rank = processes.current().process_index
torch.distributed.all_reduce(torch.ones(9))
