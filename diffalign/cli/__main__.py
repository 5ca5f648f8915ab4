"""Entry point of `python -m diffalign.cli`."""

import sys

from diffalign.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
