"""Command line, with one file per verb.

Domain code lives in the other packages and does not know flags.
"""

from diffalign.cli.main import main

__all__ = ["main"]
