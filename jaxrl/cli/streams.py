"""Standard output and error that outlive their readers: a command goes on without them."""

import contextlib
import errno
import os
import sys
from collections.abc import Generator
from typing import Any, TextIO


class Lasting:
    """A text stream; once it cannot be written, what is written to it is dropped."""

    def __init__(self, stream: TextIO, name: str) -> None:
        """Stores the stream and its name for the message that it was lost."""
        self.stream, self.name = stream, name

    def write(self, text: str) -> int:
        """Returns the number of characters, written or dropped."""
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered, or drops it."""
        self._try(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, action: Any) -> None:
        try:
            action()
        except (OSError, ValueError) as error:  # a ValueError says that the stream is closed
            with contextlib.suppress(OSError, ValueError):  # what is buffered has to go somewhere when Python exits
                _to_nowhere(self.stream.fileno())
            self.stream = open(os.devnull, "w")
            if getattr(error, "errno", errno.EPIPE) != errno.EPIPE and self.name == "stdout":
                print(f"jaxrl: stdout cannot be written ({error}): going on without it", file=sys.stderr)


@contextlib.contextmanager
def lasting() -> Generator[None]:
    """A context in which `sys.stdout` and `sys.stderr` can always be written."""
    before = sys.stdout, sys.stderr
    for number in range(3):  # a file opened later must not take the place of a closed stream
        try:
            os.fstat(number)
        except OSError:
            _to_nowhere(number)
    sys.stdout, sys.stderr = (
        Lasting(stream if stream is not None else open(os.devnull, "w"), name)
        for stream, name in zip(before, ("stdout", "stderr"), strict=True)
    )
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
