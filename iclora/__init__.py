"""In-Context LoRA and UNO on FLUX.1.

To import it changes nothing, except in a process that is one of our commands: what can happen to it before its modules
are loaded is seen to here. Ctrl-C and what the system refuses are one line; no standard stream ends the work.
"""

import atexit
import io
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType

COMMANDS = [Path(__file__).resolve().parents[1] / name for name in ("sample.py", "train.py")]


class Lossy(io.FileIO):
    """A standard stream that goes on where nobody reads any more, or the disk is full; the latter is said once."""

    told = False

    def write(self, data: memoryview) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            pass
        except OSError as error:
            if not self.told and self.fileno() == 1:
                leave_line(f"note: stdout cannot be written: {error.strerror}")
            self.told = True
        return memoryview(data).nbytes


def leave_line(line: str) -> None:
    """Write a line to stderr, past whatever Python has made of it."""
    with suppress(OSError):
        os.write(2, f"{' '.join(line.split())}\n".encode(errors="backslashreplace"))


def interrupt(number: int, frame: FrameType | None) -> None:
    """Do what Python does, but end at once while a module is loaded: it may swallow a KeyboardInterrupt or hide it."""
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            leave_line("interrupted")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End a command whose modules cannot be loaded, for want of a package, memory or files, in one line."""
    if issubclass(kind, ImportError | OSError | MemoryError):
        leave_line(f"error: {str(error) or 'memory ran out'} ({kind.__name__}, while modules were loaded)")
        os._exit(2)
    if issubclass(kind, KeyboardInterrupt):
        leave_line("interrupted")
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


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
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored
        signal.signal(signal.SIGINT, interrupt)
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # what is done stays done


if sys.argv[0] == "-m" or Path(sys.argv[0]).resolve() in COMMANDS:
    begin()
