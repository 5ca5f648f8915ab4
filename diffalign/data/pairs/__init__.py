"""Preference pairs: their records, the tables that they come from, and what is made of them."""

from diffalign.data.pairs.records import PreferencePair, Skipped, held_out, read_pairs

__all__ = ["PreferencePair", "Skipped", "held_out", "read_pairs"]
