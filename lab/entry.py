"""What the lab's entry points do alike: flags in, one line on stderr and status 2 for a mistake."""

import argparse
import sys
from collections.abc import Callable

from iclora.cli import check_folder, guard


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None], argv: list[str] | None) -> int:
    """Read the flags, do the work, and give the exit status.

    argv: without the module's name; None takes the process's own
    """

    def fail(message: str) -> None:
        raise ValueError(f"{message}; see {parser.prog} --help")

    def parse_and_work() -> None:
        words = sys.argv[1:] if argv is None else argv
        if "" in words:
            fail("a value is empty; give one, or leave its option out")
        args = parser.parse_args(words)
        if out := getattr(args, "out", None):
            default = parser.get_default("out")
            folder = out if default and not default.suffix else out.parent
            if folder != out and out.is_dir():
                fail(f"--out {out} is a folder; name a file")
            check_folder(folder)
        work(args)

    parser.error = fail
    return guard(parse_and_work)


def positive(text: str) -> int:
    """Read a number from 1 on, as argparse wants it: ValueError for anything else."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not possible, give 1 or more")
    return number
