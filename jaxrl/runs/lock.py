"""One writer per folder, by a POSIX record lock (`fcntl.lockf`) on a file in it.

The kernel drops such a lock when its process ends, however it ends, so that a crash leaves none behind; NFS and Lustre
carry it to other machines, which `flock` does not promise; and worker processes do not inherit it. Within one process
it excludes nothing, and closing any descriptor of the file drops it: `_HELD` sees to both.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Generator
from pathlib import Path

from jaxrl.errors import UserError

_HELD: set[tuple[int, int] | None] = set()  # device and inode of the locks of this process
_TAKEN = (errno.EACCES, errno.EAGAIN)


class Lock:
    """The right to write in a folder, held by this process."""

    def __init__(self, folder: Path, path: Path, file: int) -> None:
        """Remembers which file it is, to notice when it is no longer in its folder."""
        self.folder, self.path, self.file = folder, path, file

    def check(self) -> None:
        """Raises UserError if the folder was moved or removed, or another is in its place."""
        if _identity(self.path) != _identity(self.file):
            raise UserError(f"{self.folder} was moved or removed while it was written: resume it where it is now")


@contextlib.contextmanager
def only_writer(folder: Path, name: str = "lock") -> Generator[Lock]:
    """A context in which no other process writes in an existing folder. Raises UserError if one does already.

    On a file system without locks, the run goes on after a warning.
    """
    path = folder / name
    if path.exists() and _identity(path) in _HELD:
        raise UserError(f"{folder} is being written by this process already")
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    try:
        _take(file, folder)
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        _HELD.add(key := _identity(file))
        try:
            yield Lock(folder, path, file)
        finally:
            _HELD.remove(key)
    finally:
        os.close(file)


def _take(file: int, folder: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _TAKEN:
            print(f"{folder}: its file system has no locks: start no second process there", file=sys.stderr)
            return
        try:
            by = json.loads(os.pread(file, 1000, 0))
            owner = f"process {by['process']} on {by['host']}"
        except (ValueError, KeyError, TypeError):
            owner = "another process"
        raise UserError(f"{folder} is being written by {owner}: wait for it, or stop it") from error


@contextlib.contextmanager
def reading(path: Path) -> Generator[str | None]:
    """A context in which `unread` finds a file in use; gives its text, None if it cannot be read."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        with contextlib.suppress(OSError):  # without locks a file that vanishes is noticed by its reader
            fcntl.lockf(file, fcntl.LOCK_SH)
        with open(file, "rb", closefd=False) as content:
            yield content.read().decode(errors="replace")
    finally:
        os.close(file)


@contextlib.contextmanager
def unread(path: Path) -> Generator[bool]:
    """A context that gives whether no other process is `reading` a file, and in which none begins to."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        yield True
        return
    try:
        free = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            free = error.errno not in _TAKEN
        yield free
    finally:
        os.close(file)


def _identity(file: Path | int) -> tuple[int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino
