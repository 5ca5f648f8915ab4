"""Train from the command line, and signal the second process in update 2: BASE PROMPTS FOLDER."""

import os
import signal
import sys

from whole_runs import train

from diffalign.methods.online.trainer import OnlineTrainer

own = OnlineTrainer.rollout


def rollout(run, plan, number):
    if number == 2 and run.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return own(run, plan, number)


base, prompts, folder = sys.argv[1:]
OnlineTrainer.rollout = rollout
more = ["--training.num_updates=4", "--training.checkpoint_every=50"]
sys.exit(train(base, prompts, folder, *more))
