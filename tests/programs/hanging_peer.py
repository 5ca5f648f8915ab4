"""Wait for a second process that never answers."""

import os
import threading

from diffalign.core import processes
from diffalign.core.errors import explain

if processes.current().process_index == 1:
    threading.Event().wait()
try:
    processes.highest(1)
except RuntimeError as error:
    print(explain(error), flush=True)
    os._exit(3)
