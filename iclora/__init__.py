"""In-Context LoRA and UNO on FLUX.1.

To import it changes nothing, except in a process that is one of our commands, while whose modules load it handles what
can end them. Ctrl-C and what the system refuses are one line; no standard stream ends the work.
"""

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

COMMANDS = [Path(__file__).resolve().parents[1] / name for name in ("sample.py", "train.py")]


class Lossy(io.FileIO):
    """A standard stream that goes on where nobody reads any more, or the disk is full."""

    def write(self, data: memoryview) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End a command whose modules cannot be loaded, for want of a package, memory or files, in one line."""
    if not issubclass(kind, KeyboardInterrupt | ImportError | OSError | MemoryError):
        return sys.__excepthook__(kind, error, trace)
    line, status = f"error: {str(error) or 'memory ran out'} ({kind.__name__}, while modules were loaded)", 2
    if issubclass(kind, KeyboardInterrupt):
        line, status = "interrupted", 130
    with suppress(OSError):  # past whatever Python has made of stderr
        os.write(2, f"{' '.join(line.split())}\n".encode(errors="backslashreplace"))
    os._exit(status)


def stream(number: int, encoding: str | None) -> io.TextIOWrapper:
    """Open a standard stream so that it takes every character, tells every line at once, and never fails."""
    raw = io.BufferedWriter(Lossy(number, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)


def begin() -> None:
    """Prepare this process for a command."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # was closed by who started us: else the next file that is opened would be a standard stream
            os.open(os.devnull, os.O_RDWR)
    encodings = [getattr(old, "encoding", None) for old in (sys.stdout, sys.stderr)]  # of a closed one there is none
    sys.stdout, sys.stderr = map(stream, (1, 2), encodings)
    sys.excepthook = end


if sys.argv[0] == "-m" or Path(sys.argv[0]).resolve() in COMMANDS:
    begin()
