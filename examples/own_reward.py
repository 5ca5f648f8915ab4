"""Train on a reward of your own, beside one that is only logged.

    python examples/own_reward.py [--training.num_updates=20 ...]

The same reward works on the command line: `diffalign train demo --rewards='{examples/own_reward.py:redness: 1.0}'`.
"""

import sys
from collections.abc import Sequence

from torch import Tensor

from diffalign import config
from diffalign.training.run import run


def redness(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
    """Return how much redder than green the images (B, 3, H, W), uint8, are."""
    pixels = images.float()
    return (pixels[:, 0] - pixels[:, 1]).mean((1, 2)) / 255


def main(settings: list[str]) -> None:
    """Train on `redness`, and print it and the verifier's score before and after."""
    own = f"{__file__}:redness"
    rewards = [f"--rewards={{{own!r}: 1.0}}", "--evaluation.rewards=[verifier]"]
    summary = run(config.load("demo", ["--output_dir=runs/example-reward", *rewards, *settings]))
    before, after = summary["before"]["means"], summary["after"]["means"]
    for name in (own, "verifier"):
        print(f"{name}: {before[name]:.3f} before, {after[name]:.3f} after")


if __name__ == "__main__":
    main(sys.argv[1:])
