"""What the toybox's entry points do alike: flags in, one line on stderr and status 2 for a mistake."""

import argparse
import sys
from collections.abc import Callable


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None], argv: list[str] | None) -> int:
    """Read the flags, do the work, and give the exit status.

    argv: without the module's name; None takes the process's own
    """
    args = parser.parse_args(argv)
    try:
        work(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
