"""Which errors are the user's to mend: they are shown as one line."""

from __future__ import annotations


class UsageError(ValueError):
    """Arguments of a command that do not fit together or to the files that are there."""


def is_user_error(error: BaseException) -> bool:
    """True for errors whose message says all that a user needs; modules are looked at only if they are loaded."""
    names = {
        "ConfigError",
        "UnknownModel",
        "UnknownReward",
        "RewardError",
        "PromptError",
        "RunFolderError",
        "CheckpointError",
        "TrainingError",
        "UsageError",
    }
    return any(
        kind.__name__ in names and kind.__module__.startswith("diffalign")
        for kind in type(error).__mro__
    )
