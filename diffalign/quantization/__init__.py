"""Smaller models: packed weights and torchao behind one list of backends, and what they really weigh.

`apply` is the door; `backends` says what there is.
"""
