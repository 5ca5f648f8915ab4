"""Embedded world of simple shapes with exact rewards, for tests and demos on a laptop."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"
"""Folder of the shipped models."""
