"""Signals that ask a run to end: the first is obeyed at the next good moment, the second at once.

SIGINT (Ctrl-C), SIGTERM (a scheduler that takes the machine back) and SIGHUP (a terminal that is
closed) end it with exit code 128 + the signal's number: 130, 143, 129.
"""

import os
import signal
import threading
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
        self.received = None
        self.before = {}

    def __enter__(self):
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # Under nohup a closed terminal is to be ignored.
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                self.before[number] = signal.signal(number, self._handle)
        if parallel.size() > 1:
            # One that waits for a rank that never answers cannot run a handler; a thread can.
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=[reader], daemon=True).start()
        return self

    def __exit__(self, *exception):
        if parallel.size() > 1:
            signal.set_wakeup_fd(-1)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.received is not None and parallel.size() == 1:
            os._exit(128 + number)  # files are whole or absent, so nothing saved is lost
        self.received = self.received or number

    def _watch(self, reader):
        """Exits at the second signal, among several ranks."""
        at = None
        while number := os.read(reader, 1):
            # A scheduler can send one to torchrun and to its processes, and torchrun passes it on:
            # what comes within three seconds counts as one.
            if number[0] in self.before:
                at = at or time.monotonic()
                if time.monotonic() - at > 3:
                    os._exit(128 + number[0])

    def check(self, due=False):
        """Raises Preempted once a signal has come, to this rank or to another.

        Returns whether `due` is true on any rank: one exchange tells both.
        """
        number, due = parallel.agree(self.received or 0, int(due))
        if number:
            raise Preempted(number)
        return bool(due)
