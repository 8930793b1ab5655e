"""Signals that ask a run to end: the first is obeyed at the next good moment, the second at once.

SIGINT (Ctrl-C), SIGTERM (a scheduler that takes the machine back) and SIGHUP (a terminal that is
closed) end it with exit code 128 + the signal's number: 130, 143, 129.
"""

import os
import signal
import time

import parallel


class Preempted(Exception):
    """Raised by `Preemption.check` after a signal; `number` is the signal's."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Preemption:
    """While it is held (`with Preemption() as preemption`), signals wait for `check`."""

    def __init__(self):
        self.received, self.at = None, 0.0
        self.before = {}

    def __enter__(self):
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # Under nohup a closed terminal is to be ignored.
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.received is None:
            self.received, self.at = number, time.monotonic()
        # A scheduler can send one to torchrun and to its processes, and torchrun passes its own on.
        elif parallel.size() == 1 or time.monotonic() - self.at > 3:
            os._exit(128 + number)  # files are whole or absent, so nothing saved is lost

    def check(self):
        """Raises Preempted once a signal has come, to this rank or to another."""
        number = parallel.agree(self.received or 0)
        if number:
            raise Preempted(number)
