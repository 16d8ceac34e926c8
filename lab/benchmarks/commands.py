"""Seconds and peak memory of every command on the tiny model, each in a process of its own.

    python -m lab.benchmarks.commands

Prints the table that stands in lab/results/benchmarks.md. Run it with nothing else running.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lab import entry

from .rounds import table

ROOT = Path(__file__).parents[2]
CAT = "weights/tiny/examples/references/cat.png"
COMMANDS = (  # OUT is a folder, see rows(); later ones read what earlier ones wrote
    "sample.py --grid 2x2 --mask 3 --out OUT/set",
    "sample.py --jobs OUT/jobs.jsonl --out OUT/reference",
    f"sample.py --lora weights/tiny/loras/uno.safetensors --ref {CAT} --prompt 'a cat on a beach.' --out OUT/uno",
    "sample.py --quantize fp8 --out OUT/fp8",
    "sample.py --offload --out OUT/offload",
    "-m iclora.data sets/walk",
    "train.py --data sets/walk --steps 20 --out OUT/walk",
    "train.py --data sets/walk --steps 20 --batch 1 --checkpointing --out OUT/walk-less",
    "-m lab.pairs --kind one --count 100 --out OUT/pairs",
    "train.py --method uno --data OUT/pairs/one.json --steps 20 --out OUT/uno-run",
    "-m iclora.convert OUT/walk/lora.safetensors OUT/diffusers.safetensors --to diffusers",
    "-m iclora.curate --count 10 --out OUT/factory",
    "-m lab.caption OUT/sets --overwrite",
    "-m iclora.evaluate --jobs OUT/jobs.jsonl --made OUT/reference",
    "-m lab.sets --out OUT/demo",
    "-m lab.panels --count 20 --out OUT/panels",
    "-m lab.report --sets 4 --columns 2 --out OUT/report",
    "-m lab.experiments bundled --count 4 --work OUT/work --out OUT/results",
)  # fmt: skip


def measure(argv: list[str]) -> tuple[float, float, float]:
    """Run one command of this project to its end.

    argv: without the interpreter
    Returns: seconds, CPU seconds, peak of resident memory in bytes (of the largest process, if it starts some)
    Errors: ValueError with the last line that it printed if it fails
    """
    with tempfile.TemporaryFile("w+") as printed:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            printed.seek(0)
            last = (printed.read().strip().splitlines() or [""])[-1]
            raise ValueError(f"python {shlex.join(argv)} ended with status {process.returncode}: {last}")
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * unit


def rows(out: Path) -> list[list[str]]:
    """Run all commands. out: an empty folder for what they read and write"""
    shutil.copytree(ROOT / "sets" / "walk", out / "sets")
    (out / "jobs.jsonl").write_text(json.dumps({"ref": [str(ROOT / CAT)], "prompt": "a cat on a beach."}) + "\n")
    lines = []
    for command in COMMANDS:
        seconds, cpu, peak = measure(shlex.split(command.replace("OUT", str(out))))
        lines.append([f"`{command}`", f"{seconds:.1f}", f"{cpu:.1f}", f"{peak / 1e6:.0f}"])
        print(lines[-1][0], file=sys.stderr)
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.benchmarks.commands", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip

    def work(_: argparse.Namespace) -> None:
        with tempfile.TemporaryDirectory() as folder:
            print("\n".join(table(["`python ...`", "seconds", "CPU seconds", "peak MB"], rows(Path(folder)))))

    return entry.run(parser, work, argv)


if __name__ == "__main__":
    sys.exit(main())
