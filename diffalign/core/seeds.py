"""Every random choice is a function of the run's seed and of counters, so that it depends neither on the number of
processes nor on what was drawn before it, and a resumed run needs no generator states.
"""

from __future__ import annotations

import numpy as np


def stream(*key: int) -> int:
    """A 63-bit seed for a tuple of counters: a stream of its own for every purpose, update and image."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


# First element of every key, so that no two purposes share a stream.
PROMPTS, IMAGES, TIMESTEPS, EVALUATION, WINDOW, PAIRS, GEOMETRY, STATES, VALIDATION = range(9)
ALIGNMENT = 9
