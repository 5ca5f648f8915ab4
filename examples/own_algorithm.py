"""Train with an algorithm of your own: reward-weighted regression.

A package names `METHOD` by an entry point of the group "diffalign.algorithms". Settings are those of `diffalign train`:
python examples/own_algorithm.py [--training.num_updates=20 ...]
"""

import sys
from dataclasses import dataclass

from diffalign import config
from diffalign.algorithms.forward_process import ForwardLoss, matching_error
from diffalign.config.algorithms import ForwardProcessConfig
from diffalign.config.methods import METHODS, Method, available
from diffalign.training.run import run


@dataclass
class Regression(ForwardProcessConfig):
    """Settings of the algorithm."""

    type: str = "regression"
    temperature: float = 1.0


def loss(sample, settings: Regression):
    """Return exp(A / temperature) e (B,), and the metrics by name."""
    error = matching_error(sample.model_pred, sample.target)
    weight = (sample.advantages.clamp(max=settings.advantage_clip) / settings.temperature).exp()
    return weight * error, {"error": error.detach()}


LOSS, AWM = ForwardLoss(loss, metrics=("error",)), METHODS["awm"]
METHOD = Method(f"{__name__}:Regression", AWM.run, AWM.trainer, "Own", loss=f"{__name__}:LOSS")
if __name__ == "__main__":
    METHODS["regression"] = METHOD
    available.cache_clear()
    settings = ["--algorithm.type=regression", "--output_dir=runs/example-algorithm"]
    print(run(config.load("demo", [*settings, *sys.argv[1:]]))["geneval_after"])
