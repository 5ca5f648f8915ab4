"""Move a tiny model to another latent space for two updates: FOLDER IMAGES AUTOENCODER."""

import sys
from pathlib import Path

from processes import save_result
from tiny_moves import trainer
from tiny_runs import weights

folder, images, autoencoder = map(Path, sys.argv[1:])
run = trainer(folder / "run", images, autoencoder, training={"images_per_update": 5})
run.prepare()
losses = [run.train_update()["loss"] for _ in range(2)]
head = run.model.denoiser.proj_out.weight.detach().clone()
save_result(folder, (weights(run), head, losses, run.alignment))
