"""Train on pairs for two updates with three losses: FOLDER PAIRS."""

import sys
from pathlib import Path

from processes import save_result
from tiny_pairs import build
from tiny_runs import weights

folder, source = map(Path, sys.argv[1:])
results = {}
for name in ("chord", "dpo", "kto"):
    run = build(source, folder / name, name, training={"pairs_per_update": 5})
    losses = [run.train_update()["loss"] for _ in range(2)]
    results[name] = weights(run), losses, run.cache.manifest["pairs"]
save_result(folder, results)
