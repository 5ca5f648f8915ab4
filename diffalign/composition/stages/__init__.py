"""Stages of a composition, one file each."""
