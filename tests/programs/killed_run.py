"""Train, and kill itself in the middle of update 3: rollout|update|checkpoint FOLDER.

The signal is SIGKILL, as an operator or a machine sends it: nothing can be cleaned up.
"""

import os
import signal
import sys
from pathlib import Path

from tiny_runs import trainer

from diffalign.evaluation.scoring import BackgroundScorer
from diffalign.methods.online.forward_update import ForwardProcessUpdate
from diffalign.training import checkpoint


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def at_the_second_call(function):
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            die()
        return function(*args, **kwargs)

    return wrapper


moment, folder = sys.argv[1], Path(sys.argv[2])
run = trainer(folder, training={"micro_batch_size": 5})
run.resume()
for number in range(1, 5):
    if number == 3:
        if moment == "rollout":
            run.rollouts.scorer = BackgroundScorer(die)
        elif moment == "update":
            ForwardProcessUpdate.micro_batch = at_the_second_call(ForwardProcessUpdate.micro_batch)
        else:
            checkpoint.save_file = at_the_second_call(checkpoint.save_file)
    run.folder.append_log(run.train_update())
    run.save()
