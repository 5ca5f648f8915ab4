"""Hold the lock of a folder until the input ends: FOLDER."""

import sys
from pathlib import Path

from diffalign.core import locks

try:
    with locks.hold(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except locks.LockError as error:
    print(error, flush=True)
    sys.exit(2)
