"""Q-Sched: diffusers' schedulers with two factors a step, and how good factors are found."""

from diffalign.schedulers.coefficients import Coefficients
from diffalign.schedulers.qsched import LINEAR_SCHEDULERS, QSched

__all__ = ["LINEAR_SCHEDULERS", "Coefficients", "QSched"]
