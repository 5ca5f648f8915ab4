"""Train every online algorithm for two updates: FOLDER."""

import sys

import numpy as np
import torch
from processes import save_result
from tiny_runs import FEW, ONLINE, TWO, trainer, weights

from diffalign import lora
from diffalign.training.plan import Plan


def gathered(run):
    """Gather the rewards of five images, one of them without, from every process: bits and order are kept."""
    values = np.float32([0.1, 1 / 3, np.nan, -1e-30, 16777217.0])
    plan = Plan([], torch.zeros(5, dtype=torch.long), list(range(5)))
    share = plan.shard(run.accelerator.process_index, run.accelerator.num_processes)
    rewards = run.rollouts._gather(values[share.start : share.stop], plan)
    assert rewards.tobytes() == values.tobytes()
    return torch.from_numpy(rewards)


folder = sys.argv[1]
results = {}
for kind in ONLINE:
    run = trainer(folder, algorithm={"type": kind, **FEW.get(kind, TWO)})
    rows = [run.train_update() for _ in range(2)]
    policies = [lora.adapter_state(run.model.denoiser, n) for n in (lora.LAGGED, lora.AVERAGED)]
    results[kind] = weights(run), rows, policies
results["gathered"] = gathered(run)
save_result(folder, results)
