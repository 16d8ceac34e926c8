"""Pictures shared by two processes, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun sets it
# without -- torchrun takes --num for an option of its own
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
JOBS = [
    {"prompt": "one picture of a red ball", "grid": "1x1", "num": 2, "seed": 5},
    {"grid": "2x2", "mask": "3"},
    {"prompt": "one picture of a cube", "grid": "1x1"},
]


def content(folder):
    """The bytes of all files, without the times that a JSON tells."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {
        name: {k: v for k, v in json.loads(data).items() if k != "seconds"} if name.endswith(".json") else data
        for name, data in files.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--jobs", "jobs.jsonl"], ["--prompt", "a star", "--num", "3"]])
def test_two_processes_make_the_same_files_as_one(tmp_path, flags):
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in JOBS))
    flags = [str(tmp_path / flag) if flag == "jobs.jsonl" else flag for flag in flags] + ["--steps", "2"]
    listed = []
    for name, start in (("one", []), ("two", TORCHRUN)):
        command = [sys.executable, *start, str(ROOT / "sample.py"), *flags, "--out", name]
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        listed.append(sorted(line.partition("/")[2] for line in done.stdout.splitlines()))
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert one == two and len([name for name in one if name.endswith(".json")]) == (4 if "--jobs" in flags else 3)
    assert listed[0] == listed[1] and sorted(one) == sorted({*listed[1]})
