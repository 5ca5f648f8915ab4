"""Launch DC-Gen on several processes.

Usage: accelerate launch scripts/train_dcgen.py --config RECIPE [--key=value ...]
"""

from __future__ import annotations

import sys

from diffalign.cli import main
from diffalign.scripts.launching import arguments

if __name__ == "__main__":
    sys.exit(main(arguments(sys.argv[1:], script="train_dcgen")))
