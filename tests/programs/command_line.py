"""Run a command of diffalign in this process: VERB ARGUMENTS."""

import sys

from diffalign.cli import main

sys.exit(main(sys.argv[1:]))
