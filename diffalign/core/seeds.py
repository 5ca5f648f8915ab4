"""Seeds of every random choice, derived from the run's seed and counters.

A choice depends neither on the number of processes nor on earlier choices. A resumed run therefore needs no generator
states.
"""

from __future__ import annotations

import numpy as np


def stream(*key: int) -> int:
    """Return a 63-bit seed for a tuple of counters.

    Every combination of purpose, update and image has its own stream.
    """
    # the shift is Python's: NumPy 1 does not shift an unsigned number by a signed one
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


# First element of every key, so that no two purposes share a stream.
PROMPTS, IMAGES, TIMESTEPS, EVALUATION, WINDOW, PAIRS, GEOMETRY, STATES, VALIDATION = range(9)
ALIGNMENT, CHURN = 9, 10
