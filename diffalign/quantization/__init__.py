"""Quantisation of models: packed weights and torchao behind one list of backends.

The entry points are in `apply`; `backends` lists the backends, and `accounting` measures the resulting sizes.
"""
