"""In-Context LoRA and UNO: the two methods, built from model/ and sampling/."""

import os
import sys
from pathlib import Path
from types import TracebackType


def end_in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End a command that fails while its modules are still loading, which its own guard does not see yet."""
    if issubclass(kind, KeyboardInterrupt):
        line, status = "interrupted", 130
    elif issubclass(kind, ImportError | OSError | MemoryError):
        line, status = f"error: {kind.__name__}: {' '.join(str(error).split())[:300] or 'no memory left'}", 2
    else:
        return sys.__excepthook__(kind, error, trace)
    try:
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))
    finally:
        os._exit(status)


if Path(sys.argv[0]).name in ("-m", "sample.py", "train.py"):  # a command, and not somebody's own program
    sys.excepthook = end_in_one_line
