"""The embedded world in which every claim of the suite can be checked on a laptop."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"
"""Where the shipped models lie."""
