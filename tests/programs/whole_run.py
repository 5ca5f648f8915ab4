"""Train from the command line: BASE PROMPTS FOLDER UPDATES."""

import sys

from whole_runs import train

base, prompts, folder, updates = sys.argv[1:]
assert train(base, prompts, folder, f"--training.num_updates={updates}") == 0
