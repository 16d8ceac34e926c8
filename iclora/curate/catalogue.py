"""The catalogue of a factory: one SQLite file that is queried, and that a kill at any moment leaves whole.

  items      a pair that is to be made: its words, its grid and its size
  results    one row an item and stage: the score, whether it is kept, and why
  pairs      a view of both, a column a score; what --where sees
  settings   what made a stage's results, so that others are not mixed with them
  writings   what a language model wrote, by what it was asked

A row is written when its files are final. Several processes write a file each, which the first one merges.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

NAME, PARTS, VERSION = "catalogue.sqlite", "part-*.sqlite", 1
STAGES = (
    *("diptych", "split", "dino", "judge", "export"),  # stage I
    *("find", "redraw", "dino2", "judge2", "export2"),  # stage II
)
SCORES = {"split": "seam", "dino": "dino", "judge": "judge", "dino2": "dino2", "judge2": "judge2"}  # names in the view
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


def _schema() -> str:
    columns = ", ".join(field.name for field in fields(Item) if field.name != "id")
    scores = ", ".join(
        f"(SELECT score FROM results WHERE item = id AND stage = '{stage}') AS {name}" for stage, name in SCORES.items()
    )
    order = " ".join(f"WHEN '{stage}' THEN {number}" for number, stage in enumerate(STAGES))
    dropped = f"SELECT stage, reason FROM results WHERE item = id AND kept = 0 ORDER BY CASE stage {order} END LIMIT 1"
    return f"""
        BEGIN;
        CREATE TABLE items (id INTEGER PRIMARY KEY, {columns});
        CREATE TABLE results (item INTEGER, stage TEXT, score REAL, kept INTEGER, reason TEXT, data TEXT,
            PRIMARY KEY (item, stage)) WITHOUT ROWID;
        CREATE TABLE settings (stage TEXT, name TEXT, value TEXT, PRIMARY KEY (stage, name));
        CREATE TABLE writings (request TEXT PRIMARY KEY, text TEXT);
        CREATE VIEW pairs AS SELECT items.*, {scores}, coalesce((SELECT stage || ': ' || reason FROM ({dropped})), '')
            AS dropped, EXISTS (SELECT 1 FROM results WHERE item = id AND stage = 'export' AND kept) AS exported,
            EXISTS (SELECT 1 FROM results WHERE item = id AND stage = 'export2' AND kept) AS exported2 FROM items;
        PRAGMA user_version = {VERSION};
        COMMIT;
    """


class Catalogue:
    """One file, open for writing. Errors: ValueError for a file of another version; sqlite3.Error for a damaged one"""

    def __init__(self, path: Path):
        self.path = path
        self.db = sqlite3.connect(path, timeout=WAIT, isolation_level=None)
        (version,) = self.db.execute("PRAGMA user_version").fetchone()
        if version == 0 and not self.db.execute("SELECT * FROM sqlite_master").fetchone():
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.executescript(_schema())
        elif version != VERSION:
            raise ValueError(f"{path} is of version {version}, not {VERSION}; use its own program, or another --out")
        (state,) = self.db.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise sqlite3.DatabaseError(state)

    def close(self) -> None:
        """Bring everything into the one file, so that it can be read without its log."""
        self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.db.close()

    def add(self, items: Iterable[Item]) -> None:
        """Add items that are new."""
        marks = ", ".join("?" * len(fields(Item)))
        self.db.execute("BEGIN IMMEDIATE")
        self.db.executemany(f"INSERT OR IGNORE INTO items VALUES ({marks})", map(astuple, items))
        self.db.execute("COMMIT")

    def record(self, item: int, stage: str, outcome: Outcome, bar: float | None) -> None:
        """Write one item's row of a stage; a score below the bar drops it."""
        score, data = outcome.score, json.dumps(dict(outcome.data), sort_keys=True)
        row = (item, stage, None if score is None else round(score, 4), not outcome.against, outcome.against, data)
        self.db.execute("BEGIN IMMEDIATE")
        self.db.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?)", row)
        self.judge_again(stage, bar, item)
        self.db.execute("COMMIT")

    def judge_again(self, stage: str, bar: float | None, item: int | None = None) -> None:
        """Hold the scores of a stage, or of one item there, against a bar; what has none stays as it is."""
        if bar is not None:
            name = SCORES[stage]
            self.db.execute(
                "UPDATE results SET kept = score >= :bar, reason = CASE WHEN score >= :bar THEN :at_least ELSE :below "
                "END WHERE stage = :stage AND score IS NOT NULL AND (:item IS NULL OR item = :item)",
                {"bar": bar, "stage": stage, "item": item}
                | {"at_least": f"{name} is at least {bar:g}", "below": f"{name} is below {bar:g}"},
            )

    def settle(self, stage: str, settings: Mapping[str, str]) -> None:
        """Note what makes a stage's results. Errors: ValueError if those that are there were made otherwise"""
        before = dict(self.db.execute("SELECT name, value FROM settings WHERE stage = ?", [stage]))
        for name, value in settings.items():
            if before.get(name, value) != value:
                raise ValueError(
                    f"{self.path.parent} has a {stage} made with {name} {before[name]}, not {value}; give the same, "
                    f"or --redo {stage}, or another --out"
                )
        rows = [(stage, name, value) for name, value in settings.items()]
        self.db.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?, ?)", rows)

    def forget(self, stages: Iterable[str]) -> None:
        """Drop the results of stages, and what was noted of them."""
        self.db.execute("BEGIN IMMEDIATE")
        for stage in stages:
            self.db.execute("DELETE FROM results WHERE stage = ?", [stage])
            self.db.execute("DELETE FROM settings WHERE stage = ?", [stage])
            if stage == "taxonomy":
                self.db.execute("DELETE FROM items")
                self.db.execute("DELETE FROM writings")
        self.db.execute("COMMIT")

    def note_export(self, stage: str, items: Iterable[Item], reason: str) -> None:
        """Note which items an export holds, in place of those that an earlier one held."""
        self.db.execute("BEGIN IMMEDIATE")
        self.db.execute("DELETE FROM results WHERE stage = ?", [stage])
        rows = [(item.id, stage, reason) for item in items]
        self.db.executemany("INSERT INTO results VALUES (?, ?, NULL, 1, ?, '{}')", rows)
        self.db.execute("COMMIT")

    def merge_parts(self) -> None:
        """Take over what other processes have written, and remove their files."""
        for part in sorted(self.path.parent.glob(PARTS)):
            with closing(Catalogue(part)) as other:
                rows = other.db.execute("SELECT * FROM results").fetchall()
            self.db.execute("BEGIN IMMEDIATE")
            self.db.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?)", rows)
            self.db.execute("COMMIT")
            part.unlink()

    def written(self, request: str) -> str | None:
        """Give what a language model wrote when it was asked this, if it was."""
        row = self.db.execute("SELECT text FROM writings WHERE request = ?", [request]).fetchone()
        return row and row[0]

    def keep_writing(self, request: str, text: str) -> None:
        self.db.execute("INSERT OR REPLACE INTO writings VALUES (?, ?)", [request, text])


def reader(path: Path, shared: bool = True) -> sqlite3.Connection:
    """Open a catalogue for reading alone: nothing that is asked of it can change it.

    shared: False where nobody writes meanwhile; its folder need not have locks then, as those of other machines
    """
    db = sqlite3.connect(f"{path.absolute().as_uri()}?{'mode=ro' if shared else 'immutable=1'}", WAIT, uri=True)
    db.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in READING else sqlite3.SQLITE_DENY)
    return db


def data_of(db: sqlite3.Connection, stage: str) -> dict[int, dict[str, Any]]:
    """Give what a stage noted beside its scores, by item."""
    rows = db.execute("SELECT item, data FROM results WHERE stage = ?", [stage])
    return {item: json.loads(data) for item, data in rows}


def passed(db: sqlite3.Connection, stage: str, rank: int = 0, world_size: int = 1, anew: bool = False) -> list[Item]:
    """List the items that all stages before this one have kept.

    rank, world_size: takes every world_size-th id
    anew: whether those are listed that have a row of this stage already
    """
    before = [name for name in STAGES[: STAGES.index(stage)] if not name.startswith("export")]
    marks = ", ".join("?" * len(before))
    rows = db.execute(
        f"SELECT * FROM items WHERE id % ? = ? AND (SELECT count(*) FROM results WHERE item = id AND kept AND stage IN "
        f"({marks})) = ? AND (? OR NOT EXISTS (SELECT 1 FROM results WHERE item = id AND stage = ?)) ORDER BY id",
        [world_size, rank, *before, len(before), anew, stage],
    )
    return [Item(*row) for row in rows]


def selected(db: sqlite3.Connection, stage: str, where: str) -> list[Item]:
    """List the items, of those that have pictures, for which an SQL condition holds.

    where: over the columns of the view pairs, such as "dino > 0.7 and judge >= 3"
    Errors: ValueError if it is none
    """
    names = [field.name for field in fields(Item)]
    pictures = "redraw" if stage == "export2" else "split"
    has_pictures = "id IN (SELECT item FROM results WHERE stage = ? AND kept)"
    query = f"SELECT {', '.join(names)} FROM pairs WHERE {has_pictures} AND ({where}\n) ORDER BY id"
    try:
        return [Item(*row) for row in db.execute(query, [pictures])]
    except (sqlite3.Error, sqlite3.Warning) as error:
        columns = ", ".join([*names, *SCORES.values()])
        raise ValueError(f"--where {ascii(where[:60])}: {error}; write an SQL condition over {columns}") from None
