"""Compose FILE, and kill itself at a MOMENT: a stage's name, "update", "record", "copy" or "never".

A stage's name is the end of its work, when its folder is whole and not in place yet. The signal is SIGKILL.
"""

import os
import shutil
import signal
import sys

from diffalign.composition import result, run
from diffalign.composition.plan import make_plan
from diffalign.composition.recipe import load
from diffalign.composition.registry import STAGES, stage_class
from diffalign.training import checkpoint


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


moment, file = sys.argv[1:]
plan = make_plan(load(file))
if moment in STAGES:
    kind = stage_class(moment)
    make = kind.make

    def made(*args):
        make(*args)
        die()

    kind.make = made
elif moment == "update":
    # the first stage begins anew
    shutil.rmtree(plan.steps[0].place)
    checkpoint.save_file = die
elif moment == "record":
    run.write_text = die
elif moment == "copy":
    result._copy_model = die
result.write(run.compose(plan))
