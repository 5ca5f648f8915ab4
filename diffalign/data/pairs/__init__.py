"""Preference pairs: their records, source tables, caches and recorded states."""

from diffalign.data.pairs.records import PreferencePair, Skipped, held_out, read_pairs

__all__ = ["PreferencePair", "Skipped", "held_out", "read_pairs"]
