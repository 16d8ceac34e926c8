"""The catalogue of a factory: one SQLite file that is queried, and that a kill at any moment leaves whole.

Its tables stand in catalogue.sql. A row is written when its files are final. Several processes write a file each, which
the first one takes over.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

NAME, PARTS, VERSION = "catalogue.sqlite", "part-*.sqlite", 1
STAGE_ONE = ("diptych", "split", "dino", "judge", "export")
STAGES = (*STAGE_ONE, "find", "redraw", "dino2", "judge2", "export2")
SCORES = {"split": "seam", "dino": "dino", "judge": "judge", "dino2": "dino2", "judge2": "judge2"}  # in pairs
WAIT = 60  # seconds for another process's lock
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}


@dataclass(frozen=True)
class Item:
    """A pair that is to be made.

    category: of the first subject, such as cat; mood: how its subjects were thought of
    second: the other subject of the target; "" if there is none
    scene3: for what is drawn again
    grid: 1x2 or 2x1; size: of a panel, WIDTHxHEIGHT in pixels
    caption: of the diptych; prompt: of its second panel alone, the target
    """

    id: int
    category: str
    mood: str
    subject: str
    second: str
    scene1: str
    scene2: str
    scene3: str
    grid: str
    size: str
    caption: str
    prompt: str


@dataclass(frozen=True)
class Outcome:
    """What a stage makes of an item; a reason against it drops it whatever its score is."""

    score: float | None = None
    against: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


COLUMNS = [field.name for field in fields(Item)]


class Catalogue:
    """One file, open for writing. Errors: ValueError for a file of another version; sqlite3.Error for a damaged one"""

    def __init__(self, path: Path):
        self.path, self.db = path, sqlite3.connect(path, WAIT)
        (version,) = self.db.execute("PRAGMA user_version").fetchone()
        if version == 0 and not self.db.execute("SELECT * FROM sqlite_master").fetchone():
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.executescript(Path(__file__).with_suffix(".sql").read_text())
        elif version != VERSION:
            raise ValueError(f"{path} is of version {version}, not {VERSION}; use its own program, or another --out")
        if (state := self.db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(state)

    def close(self) -> None:
        """Bring everything into the one file, so that it can be read without its log.

        Errors: ValueError if another program has begun to read it and does not end
        """
        (busy, *_) = self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self.db.close()
        if busy:
            raise ValueError(f"{self.path} cannot be written whole while another program reads it; close that")

    def write(self, query: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run a query for every row, all or none."""
        with self.db:
            self.db.executemany(query, rows)

    def add(self, items: Iterable[Item]) -> None:
        """Add items."""
        self.write(f"INSERT INTO items VALUES (?{', ?' * (len(COLUMNS) - 1)})", map(astuple, items))

    def record(self, item: int, stage: str, outcome: Outcome, bar: float | None = None) -> None:
        """Write one item's row of a stage; a score below the bar drops it."""
        score, data = outcome.score, json.dumps(dict(outcome.data), sort_keys=True)
        score = None if score is None else round(score, 4)
        against = (not outcome.against, outcome.against)
        verdict = against if score is None or bar is None else hold(score, bar)
        self.write("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?)", [(item, stage, score, *verdict, data)])

    def hold_again(self, stage: str, bar: float | None) -> None:
        """Hold the scores of a stage against a bar."""
        if bar is not None:
            query = "SELECT item, score FROM results WHERE stage = ? AND score IS NOT NULL"
            rows = [(*hold(score, bar), item, stage) for item, score in self.db.execute(query, [stage])]
            self.write("UPDATE results SET kept = ?, reason = ? WHERE item = ? AND stage = ?", rows)

    def export(self, stage: str, items: Iterable[Item], reason: str) -> None:
        """Note which items an export holds, in place of those that an earlier one held."""
        with self.db:
            self.db.execute("DELETE FROM results WHERE stage = ?", [stage])
            rows = [(item.id, stage, reason) for item in items]
            self.db.executemany("INSERT INTO results VALUES (?, ?, NULL, 1, ?, '{}')", rows)

    def settle(self, stage: str, settings: Mapping[str, str]) -> None:
        """Note what makes a stage's results. Errors: ValueError if those that are there were made otherwise"""
        made = stage == "taxonomy" or self.db.execute("SELECT 1 FROM results WHERE stage = ?", [stage]).fetchone()
        for name, value in settings.items():
            if made and (before := self.noted(stage, name) or value) != value:
                line = f"{self.path.parent} has a {stage} made with {name} {before}, not {value}"
                raise ValueError(f"{line}; give the same, or --redo {stage}, or another --out")
            self.note(stage, name, value)

    def note(self, stage: str, name: str, value: str) -> None:
        """Keep a value, until its stage is forgotten."""
        self.write("INSERT OR REPLACE INTO settings VALUES (?, ?, ?)", [(stage, name, value)])

    def noted(self, stage: str, name: str) -> str | None:
        """Give a value that was kept."""
        row = self.db.execute("SELECT value FROM settings WHERE stage = ? AND name = ?", [stage, name]).fetchone()
        return row and row[0]

    def forget(self, stages: Sequence[str]) -> None:
        """Drop the results of stages, and what was noted of them; with those of taxonomy, the items."""
        with self.db:
            for table in ("results", "settings"):
                self.db.executemany(f"DELETE FROM {table} WHERE stage = ?", [(stage,) for stage in stages])
            if "taxonomy" in stages:
                self.db.execute("DELETE FROM items")

    def merge_parts(self) -> None:
        """Take over what other processes have written, and remove their files."""
        for part in sorted(self.path.parent.glob(PARTS)):
            with closing(Catalogue(part)) as other:
                rows = other.db.execute("SELECT * FROM results").fetchall()
            self.write("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?)", rows)
            part.unlink()


def hold(score: float, bar: float) -> tuple[bool, str]:
    """Say whether a score is high enough, and why."""
    return score >= bar, f"{'at least' if score >= bar else 'below'} {bar:g}"


def reader(path: Path, shared: bool = True) -> sqlite3.Connection:
    """Open a catalogue for reading alone: nothing that is asked of it can change it.

    shared: False where nobody writes meanwhile; its folder need not have locks then, as those of other machines
    """
    db = sqlite3.connect(f"{path.absolute().as_uri()}?{'mode=ro' if shared else 'immutable=1'}", WAIT, uri=True)
    db.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in READING else sqlite3.SQLITE_DENY)
    return db


def crops_of(db: sqlite3.Connection) -> dict[int, list[dict[str, Any]]]:
    """List what find has cut out, by item."""
    rows = db.execute("SELECT item, data FROM results WHERE stage = 'find' AND kept")
    return {item: json.loads(data)["crops"] for item, data in rows}


def passed(db: sqlite3.Connection, stage: str, rank: int = 0, world_size: int = 1, anew: bool = False) -> list[Item]:
    """List the items that all stages before this one have kept.

    rank, world_size: takes every world_size-th id
    anew: whether those are listed that have a row of this stage already
    """
    before = [name for name in STAGES[: STAGES.index(stage)] if not name.startswith("export")]
    kept = f"SELECT count(*) FROM results WHERE item = id AND kept AND stage IN (''{', ?' * len(before)})"
    fresh = "NOT EXISTS (SELECT 1 FROM results WHERE item = id AND stage = ?)"
    query = f"SELECT * FROM items WHERE id % ? = ? AND ({kept}) = ? AND (? OR {fresh}) ORDER BY id"
    return [Item(*row) for row in db.execute(query, [world_size, rank, *before, len(before), anew, stage])]


def selected(db: sqlite3.Connection, stage: str, where: str) -> list[Item]:
    """List the items, of those that have pictures, for which an SQL condition holds.

    where: over the columns of the view pairs, such as "dino > 0.7 and judge >= 3"
    Errors: ValueError if it is none
    """
    query = "SELECT * FROM items WHERE id IN (SELECT item FROM results WHERE stage = ?) ORDER BY id"
    try:
        if '"' in where:  # SQLite takes a misspelt name between them for a word, and the condition for one that holds
            raise sqlite3.Warning("names stand as they are, words between single quotes")
        ids = {id_ for (id_,) in db.execute(f"SELECT id FROM pairs WHERE {where}")}
    except (sqlite3.Error, sqlite3.Warning) as error:
        columns = ", ".join([*COLUMNS, *SCORES.values()])
        raise ValueError(f"--where {ascii(where[:60])}: {error}; write an SQL condition over {columns}") from None
    items = (Item(*row) for row in db.execute(query, ["redraw" if stage == "export2" else "split"]))
    return [item for item in items if item.id in ids]
