"""Take one signal as a request, and stay in the middle of something long."""

import os
import signal
import sys
import threading

from diffalign.core import interruption

interruption.SETTLING = 0.05
# a background job's handler ignores it
signal.signal(signal.SIGINT, signal.default_int_handler)
# a signal writes a byte here, whenever it comes
readable, writable = os.pipe()
os.set_blocking(writable, False)
signal.set_wakeup_fd(writable)
with interruption.Interruption("this is finished") as work:
    print("ready", flush=True)
    sys.stdin.readline()
    os.read(readable, 1)
    assert work.number
    os.write(1, b"first\n")
    threading.Event().wait()
