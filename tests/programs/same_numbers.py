"""Print what two updates of every method give on tiny models, bit for bit and as numbers.

    python tests/programs/same_numbers.py > after.json     # the same in a checkout of the commit before

A refactoring gives the same digests in both checkouts on one machine. The numbers hold on every machine up to rounding;
tests/house/test_same_numbers.py compares them with tests/expected/same_numbers.json.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import tiny_moves
import tiny_pairs
import tiny_runs
import tiny_students

from diffalign import lora
from diffalign.data.prompts import Prompt
from diffalign.tuning.evaluator import Drawing
from diffalign.tuning.tune import Settings, tune
from diffalign.types import RewardOutput

ONLINE = ("awm", "diffusion_nft", "crd", "dgpo", "flow_grpo", "flow_dppo")
PAIRS = ("inversion_dpo", "diffusion_dpo")
STUDENTS = {"reflow": "flux", "consistency": "sd"}
UPDATES = 2
LOGGED = ("loss", "grad_norm", "reward")


def trained(trainer) -> dict:
    """Train, and return a digest of the adapter, norms of its matrices, and what the log says."""
    rows = [trainer.train_update() for _ in range(UPDATES)]
    log = {f"{key} {i}": row[key] for i, row in enumerate(rows) for key in LOGGED if key in row}
    state = lora.adapter_state(trainer.model.denoiser, lora.CURRENT)
    digest = hashlib.sha256()
    squares = {"lora_A": 0.0, "lora_B": 0.0}
    for name in sorted(state):
        tensor = state[name].float().contiguous()
        digest.update(tensor.numpy().tobytes())
        squares["lora_A" if "lora_A" in name else "lora_B"] += tensor.double().square().sum().item()
    return {"digest": digest.hexdigest(), **log, **{k: v**0.5 for k, v in squares.items()}}


def contrast(images, prompts, metadata) -> RewardOutput:
    """Return the spread of an image's pixels, which factors of a schedule can raise."""
    values = images.float().flatten(1).std(1).numpy()
    return RewardOutput(values, details={"contrast": values})


def searched() -> dict:
    """Search factors of a quantisation-aware schedule, and return the best candidate."""
    prompts = [Prompt(f"a photo of {n} things") for n in range(8)]
    settings = Settings({"contrast": 1.0}, engine="cma", budget=12)
    model = tiny.flux_model()
    drawing = Drawing(num_inference_steps=2, micro_batch_size=8, mixed_precision="no")
    factors = tune(model, prompts, contrast, settings, drawing).best
    values = [*factors.sample, *factors.model_output]
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    return {"digest": digest, **{f"factor {i}": v for i, v in enumerate(values)}}


def numbers(work: Path) -> dict[str, dict]:
    """Return the results of all methods; `work` is an empty folder."""
    torch.set_num_threads(1)
    results = {}
    for name in ONLINE:
        algorithm = {"type": name, **tiny_runs.FEW.get(name, tiny_runs.TWO)}
        run = tiny_runs.trainer(work / name, algorithm=algorithm)
        results[name] = trained(run)
    source = tiny_pairs.write_pairs(work / "pairs")
    for name in PAIRS:
        run = tiny_pairs.trainer(source, work / name, algorithm={"type": name})
        results[name] = trained(run)
    for name, family in STUDENTS.items():
        run = tiny_students.trainer(work / name, family, algorithm={"type": name})
        results[name] = trained(run)
    images = tiny_moves.image_folder(work / "images")
    tiny_moves.deep_autoencoder().save_pretrained(work / "autoencoder")
    move = tiny_moves.trainer(work / "dcgen", images, work / "autoencoder")
    move.prepare()
    results["dcgen"] = trained(move)
    results["qsched"] = searched()
    return results


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(numbers(Path(folder)), indent=1))
