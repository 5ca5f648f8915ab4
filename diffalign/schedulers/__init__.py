"""Q-Sched: diffusers' schedulers with two factors per step, and their closed form."""

from diffalign.schedulers.coefficients import Coefficients
from diffalign.schedulers.qsched import LINEAR_SCHEDULERS, QSched

__all__ = ["LINEAR_SCHEDULERS", "Coefficients", "QSched"]
