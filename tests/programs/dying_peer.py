"""Resume and train to update 4, and save after update 2: FOLDER live|die.

With `die` the second process kills itself before update 4.
"""

import os
import signal
import sys
from pathlib import Path

from processes import save_result
from tiny_runs import trainer, weights

folder, fate = sys.argv[1:]
Path(folder, "run").mkdir(exist_ok=True)
run = trainer(f"{folder}/run")
run.resume()
while run.progress.update < 4:
    if fate == "die" and run.progress.update == 3 and run.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    run.train_update()
    if run.progress.update == 2:
        run.save()
save_result(folder, weights(run))
