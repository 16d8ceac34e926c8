"""Locks on folders, which die with their process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


@contextmanager
def lock(folder: Path, shared: bool = False) -> Iterator[bool | None]:
    """Hold the lock of a folder for a while.

    shared: together with others who share it, after waiting for who is alone; else alone, without waiting
    Returns whether it is held; None where the system, or the file system, has no locks
    """
    held, handle = None, os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
    except BlockingIOError:
        held = False
    except OSError:  # a file system without locks
        pass
    try:
        yield held
    finally:
        if fcntl:
            os.close(handle)
