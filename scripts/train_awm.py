"""Launch online RL on several processes.

Usage: accelerate launch scripts/train_awm.py --config RECIPE [--key=value ...]
"""

from __future__ import annotations

import sys

from diffalign.cli import main
from diffalign.scripts.launching import arguments

if __name__ == "__main__":
    sys.exit(main(arguments(sys.argv[1:], script="train_awm")))
