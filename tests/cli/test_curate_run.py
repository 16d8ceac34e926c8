"""The data factory as a command: whole runs, runs that go on, refusals; drawing is by the world, but in slow tests."""

import contextlib
import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chat_server import pictures, serve
from iclora import chat
from iclora.cli import parse
from iclora.curate import __main__ as package
from iclora.curate import catalogue as catalogue_module
from iclora.curate import stages
from iclora.curate.__main__ import main
from iclora.curate.catalogue import NAME, Catalogue
from iclora.curate.chain import curate
from iclora.curate.options import CHAIN, CurateConfig
from iclora.curate.stages import Workshop
from iclora.data import main as check_data
from iclora.judge import Verdict
from lab import curate as lab_curate
from lab.sets import composite
from lab.world import random_set

ROOT = Path(__file__).parents[2]
TINY = ROOT / "weights" / "tiny"
LORA = TINY / "loras" / "uno.safetensors"
COUNT = 14
KILLS = int(os.environ.get("KILLS", 8))


def pretend(self, loras, requests):
    """What the model would draw, if it were the world: a set of a pair, or one subject."""
    for request in requests:
        rng = np.random.default_rng(request["seed"])
        rows, cols = map(int, request.get("grid", "1x1").split("x"))
        yield Image.fromarray(composite(random_set(rng, rows, cols, 1), rows, cols))
        self.drawn.append(request)


def judge(first, second):
    """Three pairs of five are alike, by chance."""
    score = 4 if zlib.crc32(first.tobytes()) % 5 > 1 else 2
    return Verdict({"all": score}, score)


def locate(picture, words):
    return None if zlib.crc32(picture.tobytes() + words.encode()) % 3 == 0 else (10.0, 10.0, 40.0, 50.0)


@pytest.fixture
def drawn(monkeypatch):
    """The requests of pictures that were drawn."""
    requests = []
    monkeypatch.setattr(Workshop, "draw", pretend)
    monkeypatch.setattr(Workshop, "drawn", requests, raising=False)
    return requests


def run(out, *flags, **options):
    notes = []
    options = {"count": COUNT, "seam": 0, "dino": -1, **options}
    curate(CurateConfig(out=str(out), **options), notes.append, ("half", judge), ("spots", locate))
    return notes


def content(out):
    """All that a catalogue says, and the bytes of all files but its own."""
    with sqlite3.connect(out / NAME) as db:
        rows = [
            db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in ("items", "results", "pairs")
        ]
    names = [path for path in out.rglob("*") if path.is_file() and not path.name.startswith(NAME)]
    return rows, {path.relative_to(out).as_posix(): path.read_bytes() for path in names}


class Killed(BaseException):
    """What nothing catches."""


def dying(record, rows):
    """A way to write rows that ends after some; the next one's pictures are there then, its row is not."""

    def record_or_die(*values):
        nonlocal rows
        if not rows:
            raise Killed
        rows -= 1
        record(*values)

    return record_or_die


def query(out, text):
    with sqlite3.connect(out / NAME) as db:
        return db.execute(text).fetchall()


# whole runs


def test_the_chain_makes_pairs_that_training_reads_and_says_why_each_was_kept_or_dropped(tmp_path, drawn, capsys):
    notes = run(tmp_path / "f", lora=str(LORA), count=30)
    single, several = (json.loads((tmp_path / "f" / name).read_text()) for name in ("pairs.json", "pairs-2.json"))
    assert 5 < len(single) < 25 and 0 < len(several) < len(single)
    assert notes[0] == f"{len(single)} pairs: {tmp_path / 'f' / 'pairs.json'}"
    for rows, most in ((single, 1), (several, 2)):
        assert max(len(row["image_paths"]) for row in rows) == most
        assert all(set(row) == {"prompt", "image_paths", "image_tgt_path"} for row in rows)
    for name in ("pairs.json", "pairs-2.json"):
        assert check_data([str(tmp_path / "f" / name)]) == 0
    rows = query(tmp_path / "f", "SELECT dropped, exported, exported2 FROM pairs")
    assert len(rows) == 30 and all(bool(dropped) != bool(exported2) for dropped, _, exported2 in rows)
    assert {dropped.split(":")[0] for dropped, *_ in rows} == {"", "judge", "find", "judge2"}
    assert len({request["seed"] for request in drawn}) == len(drawn) > 30
    page = (tmp_path / "f" / "index.html").read_text()
    assert f"Kept: {len(single)}" in page and all(
        (tmp_path / "f" / name).exists() for name in ("kept.png", "dropped.png")
    )


def test_references_that_show_both_subjects_are_both_drawn_again(tmp_path, drawn):
    run(tmp_path, lora=str(LORA), count=30)
    with sqlite3.connect(tmp_path / NAME) as db:
        found = db.execute("SELECT item, data FROM results WHERE stage = 'find' AND kept").fetchall()
        items = dict(db.execute("SELECT id, subject FROM items"))
    crops = {item: json.loads(data)["crops"] for item, data in found}
    assert {len(rows) for rows in crops.values()} == {1, 2}
    assert all(rows[0]["subject"] == items[item] for item, rows in crops.items() if len(rows) == 2)
    for row in json.loads((tmp_path / "pairs-2.json").read_text()):
        item = int(Path(row["image_tgt_path"]).stem.split("-")[0])
        folders = [Path(name).parent.name for name in row["image_paths"]]
        assert folders == (["redrawn"] * 2 if len(crops[item]) == 2 else ["pairs", "redrawn"])
    redrawn = [request for request in drawn if "ref" in request]
    assert len(redrawn) == sum(map(len, crops.values())) and all("in the middle" in r["prompt"] for r in redrawn)


def test_the_same_command_again_makes_nothing_anew_and_more_pairs_are_added(tmp_path, drawn):
    run(tmp_path, lora=str(LORA))
    before, count = content(tmp_path), len(drawn)
    run(tmp_path, lora=str(LORA))
    assert content(tmp_path) == before and len(drawn) == count
    run(tmp_path, lora=str(LORA), count=COUNT + 4)
    rows = content(tmp_path)[0][0]
    assert rows[:COUNT] == before[0][0] and len(rows) == COUNT + 4
    assert len([request for request in drawn[count:] if "grid" in request]) == 4


def test_stages_run_alone_and_other_thresholds_keep_scores(tmp_path, drawn):
    run(tmp_path, stages="taxonomy,diptych,split")
    assert {stage for (stage,) in query(tmp_path, "SELECT DISTINCT stage FROM results")} == {"diptych", "split"}
    run(tmp_path, dino=0.99)
    assert not json.loads((tmp_path / "pairs.json").read_text())
    assert query(tmp_path, "SELECT count(*) FROM results WHERE stage = 'judge'") == [(0,)]
    scores = query(tmp_path, "SELECT item, score FROM results WHERE stage = 'dino'")
    run(tmp_path, dino=-1)
    assert query(tmp_path, "SELECT item, score FROM results WHERE stage = 'dino'") == scores
    kept = len(json.loads((tmp_path / "pairs.json").read_text()))
    run(tmp_path, stages="judge,export", judge_score=0)
    assert 0 < kept < len(json.loads((tmp_path / "pairs.json").read_text())) == COUNT and len(drawn) == COUNT
    run(tmp_path, stages="judge,export", judge_score=4)
    assert len(json.loads((tmp_path / "pairs.json").read_text())) == kept


def test_a_condition_selects_what_is_exported(tmp_path, drawn):
    run(tmp_path, where="judge < 3 and id > 2")
    rows = json.loads((tmp_path / "pairs.json").read_text())
    expected = query(tmp_path, "SELECT id FROM pairs WHERE judge < 3 AND id > 2")
    assert [int(row["image_tgt_path"][6:14]) for row in rows] == [number for (number,) in expected] != []
    reasons = query(tmp_path, "SELECT DISTINCT reason FROM results WHERE stage = 'export'")
    assert reasons == [("selected by judge < 3 and id > 2",)]


def test_a_stage_is_forgotten_with_all_behind_it(tmp_path, drawn):
    run(tmp_path, lora=str(LORA))
    before, count = content(tmp_path), len(drawn)
    run(tmp_path, lora=str(LORA), redo="find")
    assert content(tmp_path) == before and len(drawn) > count
    assert all("ref" in request for request in drawn[count:])


@pytest.mark.slow
def test_killed_between_any_two_rows_it_ends_in_the_same_catalogue(tmp_path, drawn, monkeypatch):
    run(tmp_path / "whole", lora=str(LORA), count=5)
    record = Catalogue.record

    rows = len(query(tmp_path / "whole", "SELECT * FROM results WHERE stage NOT LIKE 'export%'"))
    for last in range(0, rows, 5):
        monkeypatch.setattr(Catalogue, "record", dying(record, last))
        with pytest.raises(Killed):
            run(tmp_path / str(last), lora=str(LORA), count=5)
        monkeypatch.setattr(Catalogue, "record", record)
        (tmp_path / str(last) / "pairs" / ".00000001-1.png.abcd.tmp").write_bytes(b"half")
        run(tmp_path / str(last), lora=str(LORA), count=5)
        assert content(tmp_path / str(last)) == content(tmp_path / "whole")


# judges


def test_a_judge_that_fails_now_and_then_is_noted_and_one_that_always_fails_ends_the_run(tmp_path, drawn):
    calls = []

    def moody(first, second):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise ValueError("the judge's scores cannot be read")
        return Verdict({"all": 4}, 4.0)

    def broken(first, second):
        raise ValueError("nobody answers")

    with pytest.raises(ValueError, match="5 pairs after each other could not be judged; the last: nobody answers"):
        curate(CurateConfig(out=str(tmp_path), count=COUNT, dino=-1, seam=0), print, ("chat", broken))
    assert query(tmp_path, "SELECT count(*) FROM results WHERE stage = 'judge'") == [(0,)], "they are judged next time"
    curate(CurateConfig(out=str(tmp_path), count=COUNT, dino=-1, seam=0), print, ("chat", moody))
    failed = query(tmp_path, "SELECT kept, reason FROM results WHERE stage = 'judge' AND score IS NULL")
    assert failed == [(0, "the judge failed: the judge's scores cannot be read")] * (COUNT // 3)


@pytest.mark.skipif(chat.openai is None, reason="needs the openai client")
def test_pairs_are_judged_behind_an_endpoint_and_none_is_lost_when_it_is_down(tmp_path, drawn, capsys, monkeypatch):
    flags = ["--out", str(tmp_path), "--count", "4", "--seam", "0", "--dino", "-1", "--judge-model", "eyes"]

    def is_down(*more):
        with monkeypatch.context() as patch:
            patch.setattr("time.sleep", lambda seconds: None)  # between the five times that it is asked
            assert main([*flags, "--judge", "http://127.0.0.1:9/v1", *more]) == 2
        assert "127.0.0.1:9/v1 failed" in capsys.readouterr().err.splitlines()[-1]

    is_down()
    assert query(tmp_path, "SELECT count(*) FROM results WHERE stage = 'judge'") == [(0,)]
    with serve(lambda handler, body: "head: 4\nhat: 3" if len(body["messages"]) > 4 else "I look.") as endpoint:
        assert main([*flags, "--judge", endpoint.address]) == 0
        assert {len(pictures(body)) for body in endpoint.asked} == {2} and len(endpoint.asked) == 12
    rows = query(tmp_path, "SELECT score, kept, data FROM results WHERE stage = 'judge'")
    assert [(score, kept) for score, kept, _ in rows] == [(3.5, 1)] * 4
    assert json.loads(rows[0][2])["parts"] == [{"head": 4, "hat": 3}]
    is_down("--redo", "judge")
    assert query(tmp_path, "SELECT score, kept, data FROM results WHERE stage = 'judge'") == rows


@pytest.mark.skipif(chat.openai is None, reason="needs the openai client")
def test_a_language_model_is_asked_once_for_the_same_words(tmp_path, drawn):
    flags = ["--out", str(tmp_path), "--count", "20", "--stages", "taxonomy"]
    with serve("red cat\nblue cat\ngreen cat") as endpoint:
        assert main([*flags, "--writer", endpoint.address]) == 0
        asked = [body["messages"][0]["content"] for body in endpoint.asked]
        assert len(asked) == len(set(asked)) > 5
        assert main([*flags, "--writer", endpoint.address]) == 0 and len(endpoint.asked) == len(asked)
    assert {row[0] for row in query(tmp_path, "SELECT subject FROM items")} == {"red cat", "blue cat", "green cat"}


# refusals: one line, status 2, and nothing is lost


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, line",
    [
        (["--seed", "1"], "taxonomy made with seed 0, not 1"),
        (["--seed", "1", "--stages", "diptych"], "diptych made with seed 0, not 1"),
        (["--steps", "3"], "diptych made with steps None, not 3"),
        (["--where", "dino >> "], "write an SQL condition over id, category"),
        (["--where", "DELETE FROM items"], "write an SQL condition"),
        (["--where", '"judges" >= 3'], "names stand as they are, words between single quotes; write an SQL"),
        (["--judge", "/nowhere/clip", "--stages", "judge"], "judge made with judge half"),
        (["--redo", "judge", "--judge", "/nowhere/clip", "--stages", "judge"], "/nowhere/clip/config.json is no file"),
        (["--dino-model", "weights/tiny/clip", "--redo", "dino"], "holds a model of type 'clip', not dinov2"),
        (["--stages", "find"], "no folder of a Owlv2"),
        (["--stages", "redraw"], "redraw needs the LoRA of stage I"),
        (["--redo", "redraw", "--stages", "redraw", "--lora", "weights/tiny/ae.safetensors"], "not a LoRA for FLUX.1"),
        (["--stages", "judging"], "did you mean judge"),
        (["--words", "setup.json"], "setup.json"),
        (["--judge-score", "5"], "use 0 to 4"),
        (["--model", "enormous"], "there is no model"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_and_nothing_is_lost(tmp_path, drawn, capsys, flags, line):
    run(tmp_path)
    before = content(tmp_path)[0][0]
    base = ["--out", str(tmp_path), "--count", str(COUNT), "--seam", "0", "--dino", "-1"]
    assert main([*base, *flags]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and re.search(line, said)
    assert content(tmp_path)[0][0] == before


@pytest.mark.parametrize(
    "flags", [["--where", "dino >"], ["--seed", "1"], ["--steps", "3", "--stages", "diptych,dino"]]
)
def test_what_is_to_be_made_again_is_kept_where_the_command_cannot_work(tmp_path, drawn, flags):
    run(tmp_path)
    before = content(tmp_path)
    assert main(["--out", str(tmp_path), "--count", str(COUNT), "--dino", "-1", "--redo", "split", *flags]) == 2
    assert content(tmp_path) == before


@pytest.mark.parametrize("stage, flag, folder", [("judge", "--judge", "clip"), ("dino", "--dino-model", "dinov2")])
def test_scores_are_kept_where_what_is_to_score_again_cannot_be_loaded(tmp_path, drawn, capsys, stage, flag, folder):
    run(tmp_path / "made")
    before = content(tmp_path / "made")
    damaged = shutil.copytree(TINY / folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"{}")
    flags = ["--count", str(COUNT), "--seam", "0", "--dino", "-1", "--redo", stage, flag, str(damaged)]
    assert main(["--out", str(tmp_path / "made"), *flags]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")
    assert content(tmp_path / "made") == before


def test_hidden_files_of_others_in_the_folder_are_left_alone(tmp_path, drawn):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".notes.tmp").write_text("mine")
    run(tmp_path, count=1)
    assert (tmp_path / "mine" / ".notes.tmp").exists()


@pytest.mark.parametrize("damage", ["cut", "text", "version"])
def test_a_damaged_catalogue_or_one_of_another_version_is_left_as_it_is(tmp_path, drawn, capsys, damage):
    run(tmp_path)
    path = tmp_path / NAME
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if damage == "version":
            db.execute("PRAGMA user_version = 7")
            db.commit()
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    data = path.read_bytes()
    data = {"cut": data[: len(data) // 2], "text": b"no database at all" * 100, "version": data}[damage]
    path.write_bytes(data)
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    assert main(["--out", str(tmp_path), "--count", str(COUNT)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert str(path) in said and {"version": "version 7, not 1"}.get(damage, "give another --out") in said
    assert path.read_bytes() == data


def test_a_full_disk_is_one_line_and_what_was_finished_stays(tmp_path, drawn, capsys, monkeypatch):
    write, written = stages.write_atomic, []

    def full(path, data, *rest):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        write(path, data, *rest)

    flags = ["--out", str(tmp_path), "--count", str(COUNT), "--dino", "-1", "--seam", "0"]
    monkeypatch.setattr(stages, "write_atomic", full)
    assert main(flags) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert query(tmp_path, "SELECT count(*) FROM results") == [(3,)]
    monkeypatch.setattr(stages, "write_atomic", write)
    connect = sqlite3.connect

    def small(*args, **options):
        db = connect(*args, **options)
        if not options:
            db.execute("PRAGMA max_page_count = 9")
        return db

    monkeypatch.setattr(catalogue_module.sqlite3, "connect", small)
    assert main([*flags[:3], "4000", *flags[4:]]) == 2
    monkeypatch.undo()
    said = capsys.readouterr().err.splitlines()[-1]
    assert "database or disk is full" in said and "free space" in said
    assert query(tmp_path, "SELECT count(*) FROM results") == [(3,)]


def test_two_runs_in_one_folder_are_refused(tmp_path, drawn, capsys):
    def meanwhile(first, second):
        assert main(["--out", str(tmp_path)]) == 2
        return judge(first, second)

    curate(CurateConfig(out=str(tmp_path), count=2, dino=-1, seam=0), print, ("half", meanwhile))
    assert "another run works in" in capsys.readouterr().err


def test_a_program_that_reads_the_catalogue_without_end_costs_a_line_and_no_stage_is_passed_over(
    tmp_path, drawn, capsys, monkeypatch
):
    monkeypatch.setattr(catalogue_module, "WAIT", 0.1)
    run(tmp_path, stages="taxonomy")
    with contextlib.closing(sqlite3.connect(tmp_path / NAME).execute("SELECT * FROM items")) as rows:
        rows.fetchone()
        assert main(["--out", str(tmp_path), "--count", str(COUNT + 1), "--stages", "taxonomy,diptych"]) == 2
        assert f"{NAME} cannot be written whole while another program reads it; close that" in capsys.readouterr().err
    run(tmp_path, stages="taxonomy,diptych", count=COUNT + 1)
    assert query(tmp_path, "SELECT count(*) FROM results") == [(COUNT + 1,)]


def test_an_endpoint_is_waited_for_as_long_as_is_asked(tmp_path):
    config = CurateConfig(out=str(tmp_path), judge="http://127.0.0.1:1/v1", judge_model="judge", timeout=7)
    _, load = Workshop(config, print, None, None).choose_judge()
    assert load().chat.timeout == 7


def test_a_device_that_is_not_there_is_refused(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--device", "mps"]) == 2
    assert "--device mps is not available" in capsys.readouterr().err


def test_help_names_every_stage(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "--where" in text and ",".join(CHAIN) in "".join(text.split())


def test_commands_of_its_documents_parse():
    for text in ((ROOT / "docs" / "factory.md").read_text(), package.__doc__, lab_curate.__doc__):
        flags = re.findall(r"python -m (?:iclora|lab)\.curate (-[^\n#`]*?)(?:  |\n|#|$)", text)
        assert len(flags) >= 2
        for line in flags:
            parse(CurateConfig, shlex.split(line), "")


# real processes


def command(out, *flags, module="lab.curate"):
    base = ["-m", module, "--out", str(out), "--count", "6", "--steps", "8", "--seam", "0", "--dino", "-1"]
    return [*base, "--judge-score", "0", "--lora", str(LORA), *flags]


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run by the real model that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "factory"
    subprocess.run([sys.executable, *command(out)], cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert {stage for (stage,) in query(out, "SELECT DISTINCT stage FROM results")} == set(CHAIN[1:])
    return out


@pytest.mark.slow
def test_two_processes_make_the_same_set_of_pairs_as_one(tmp_path, whole):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = tmp_path / "factory"
    done = subprocess.run([*torchrun, *command(out)], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert content(out) == content(whole) and not list(out.glob("part-*"))


RUNS = """
import os, sys
from transformers import CLIPTextModel, T5EncoderModel  # what a run would import anyway
from lab.curate import main
for _ in sys.stdin:
    if not (run := os.fork()):
        os._exit(main(sys.argv[1:]))
    print(run, flush=True)
    print(os.waitpid(run, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_random_kills_over_all_stages_end_in_the_same_catalogue(tmp_path, whole):
    out, rng, rows = tmp_path / "factory", random.Random(20), len(query(whole, "SELECT * FROM results"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    starter = [sys.executable, "-c", RUNS, *command(out)[2:]]  # imports once, as that takes longest
    killed = 0
    with subprocess.Popen(starter, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), **pipes) as process:

        def start():
            process.stdin.write("\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        for kill in range(KILLS):
            wanted, run, end = rows * (kill + rng.random()) / KILLS, start(), time.monotonic() + 120
            while count_rows(out) < wanted and time.monotonic() < end:  # so that every stage gets its share
                time.sleep(0.01)
            time.sleep(rng.random() / 2)
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(run, signal.SIGKILL)
            killed += int(process.stdout.readline()) == signal.SIGKILL
        start()
        assert int(process.stdout.readline()) == 0
        process.stdin.close()
    assert killed >= KILLS * 3 / 4
    assert content(out) == content(whole)


def count_rows(out):
    try:
        return len(query(out, "SELECT * FROM results"))
    except sqlite3.Error:  # not made yet
        return 0
