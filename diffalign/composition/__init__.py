"""Composition of a model: stages from a base to one folder that is aligned, small and fast."""
