"""What the lab's entry points do alike: flags in, one line on stderr and status 2 for a mistake."""

import argparse
from collections.abc import Callable

from iclora.cli import guard


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None], argv: list[str] | None) -> int:
    """Read the flags, do the work, and give the exit status.

    argv: without the module's name; None takes the process's own
    """

    def fail(message: str) -> None:
        raise ValueError(f"{message}; see {parser.prog} --help")

    parser.error = fail
    return guard(lambda: work(parser.parse_args(argv)))


def positive(text: str) -> int:
    """Read a number from 1 on, as argparse wants it: ValueError for anything else."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not possible, give 1 or more")
    return number
