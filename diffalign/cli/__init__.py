"""The command line: one file per verb. Domain code lives in the other rooms, and knows no flags."""

from diffalign.cli.main import main

__all__ = ["main"]
