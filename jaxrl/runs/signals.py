"""Ctrl-C and SIGTERM: the first requests a run to save and stop, the second stops it immediately."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Generator

NOT_FINITE = 3  # exit code of a run whose parameters became NaN or infinite
SAVED = 75  # exit code "stopped, saved, run me again" (EX_TEMPFAIL), for schedulers that requeue
ABORTED = 130  # exit code of a second Ctrl-C


@contextlib.contextmanager
def stopping_at_once() -> Generator[None]:
    """A context in which Ctrl-C ends the process at once, with a line instead of a trace.

    A KeyboardInterrupt would be raised inside other libraries, some of which drop it or turn it into another error, and
    not before a program is compiled; so a thread listens for the signal, as in `StopRequests`.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread has signal handlers
        yield
        return

    def listen() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGINT:
                with contextlib.suppress(OSError):
                    os.write(2, b"jaxrl: stopped at once\n")
                os._exit(ABORTED)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=listen, daemon=True).start()
    previous = signal.signal(signal.SIGINT, lambda *_: None)
    previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        signal.signal(signal.SIGINT, previous)
        os.close(writer)


class StopRequests:
    """A context in which SIGINT and SIGTERM are counted instead of raising.

    Python runs signal handlers only between bytecodes, so never while the main thread waits for a compiled program.
    The second signal must take effect immediately: a thread listens on the wakeup descriptor, to which the interpreter
    writes each signal without delay. Exiting there is safe, since checkpoints are written atomically.
    """

    count = 0

    @property
    def requested(self) -> bool:
        """Whether the run should save and stop after the current epoch."""
        return self.count > 0

    def __enter__(self) -> "StopRequests":
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        watched = (signal.SIGINT, signal.SIGTERM)
        self.previous = {number: signal.signal(number, lambda *_: None) for number in watched}
        self.previous_fd = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()
        return self

    def __exit__(self, *raised: object) -> None:
        signal.set_wakeup_fd(self.previous_fd)
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.writer.close()
        self.listener.join()

    def _listen(self) -> None:
        while number := self.reader.recv(1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            self.count += 1
            if self.count == 1:
                print("\nsaving at the end of this epoch; once more to stop at once", file=sys.stderr, flush=True)
            else:
                print("\nstopped at once; the last checkpoint is whole", file=sys.stderr, flush=True)
                os._exit(ABORTED)
        self.reader.close()


class StopRequested(Exception):  # noqa: N818  (not an error)
    """Raised when the run saved its carry and stopped on request."""
