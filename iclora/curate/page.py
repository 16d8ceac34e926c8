"""The summary page: what was kept and dropped, with scores, reasons and histograms; needs no server and no script."""

import math
import sqlite3
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw

from model.checkpoint import write_atomic
from sampling.images import fit, open_picture, to_png

from .catalogue import SCORES, STAGES

SHOWN = 100  # pairs of each kind on the page and on a sheet
BINS, WIDE, HIGH = 30, 300, 80  # of a histogram, in pixels
SIDE, COLUMNS, LABEL = 96, 4, 12  # of a picture on a sheet; pairs in a row; pixels above each
RANGES = {"seam": (0, 1), "dino": (-1, 1), "judge": (0, 4), "dino2": (-1, 1), "judge2": (0, 4)}


def write_page(folder: Path, db: sqlite3.Connection, bars: Mapping[str, float | None]) -> None:
    """Write index.html and the sheets kept.png and dropped.png.

    bars: by stage, the score from which it keeps an item
    """
    db.row_factory = sqlite3.Row
    parts = [Path(__file__).with_suffix(".html").read_text(), _stages(db), "<h2>Scores</h2><div class=row>"]
    for stage, name in SCORES.items():
        scores = [row[0] for row in db.execute(f"SELECT {name} FROM pairs WHERE {name} IS NOT NULL")]
        parts.append(_histogram(name, scores, bars[stage]) if scores else "")
    for kind, condition in (("kept", "exported OR exported2"), ("dropped", "NOT exported AND NOT exported2")):
        where = f"FROM pairs WHERE seam IS NOT NULL AND ({condition})"
        (count,) = db.execute(f"SELECT count(*) {where}").fetchone()
        rows = db.execute(f"SELECT * {where} ORDER BY id LIMIT {SHOWN}").fetchall()
        parts.append(f"</div><h2>{kind.capitalize()}: {count}{f', the first {SHOWN}' * (count > SHOWN)}</h2>")
        parts += ["<div class=row>", *(_figure(folder, row) for row in rows)]
        write_atomic(folder / f"{kind}.png", to_png(_sheet(folder, rows)))
    write_atomic(folder / "index.html", "\n".join([*parts, "</div></html>\n"]))


def _stages(db: sqlite3.Connection) -> str:
    """Count what came into each stage and what it kept, and list why things were dropped."""
    lines = ["<table><tr><th>stage<th>came in<th>kept<th>dropped because"]
    for stage in STAGES:
        count, kept = db.execute("SELECT count(*), total(kept) FROM results WHERE stage = ?", [stage]).fetchone()
        query = "SELECT reason, count(*) FROM results WHERE stage = ? AND NOT kept GROUP BY 1 ORDER BY 2 DESC LIMIT 5"
        reasons = "; ".join(f"{reason} ({times})" for reason, times in db.execute(query, [stage]))
        share = f" ({kept / count:.0%})" if count and not stage.startswith("export") else ""
        lines.append(f"<tr><td>{stage}<td>{count}<td>{kept:.0f}{share}<td>{escape(reasons)}")
    return "\n".join(lines) + "</table>"


def _histogram(name: str, scores: Sequence[float], bar: float | None) -> str:
    """Draw how scores are spread, and where the bar stands."""
    (low, high), counts, step = RANGES[name], [0] * BINS, WIDE / BINS
    for score in scores:
        counts[min(BINS - 1, max(0, int((score - low) / (high - low) * BINS)))] += 1
    svg = ""
    for place, high_ in enumerate(HIGH * count / max(counts) for count in counts):
        svg += f'<rect x="{place * step:.1f}" y="{HIGH - high_:.1f}" width="{step - 1:.1f}" height="{high_:.1f}"/>'
    x = ((bar or 0) - low) / (high - low) * WIDE
    svg += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HIGH}"/>'
    caption = f"<b>{name}</b>: {len(scores)} scores from {low} to {high}, kept from {bar:g}"
    return f'<figure><svg width="{WIDE}" height="{HIGH}">{svg}</svg><figcaption>{caption}</figcaption></figure>'


def _pictures(folder: Path, item: int) -> list[Path]:
    """List the pictures of a pair: reference, target, and what was drawn again."""
    return sorted(folder.glob(f"pairs/{item:08d}-*.png")) + sorted(folder.glob(f"redrawn/{item:08d}-*.png"))


def _figure(folder: Path, row: sqlite3.Row) -> str:
    """Show one pair, its words, its scores and why it was dropped, if it was."""
    names = [path.relative_to(folder).as_posix() for path in _pictures(folder, row["id"])]
    images = "".join(f'<img src="{name}" alt="{name}" loading="lazy">' for name in names)
    subjects = escape(" and ".join(filter(None, (row["subject"], row["second"]))))
    lines = [f"<b>{row['id']}</b> {subjects} ({escape(row['mood'])})", escape(row["prompt"]), _scores(row)]
    caption = "<br>".join([*lines, f"<span class=dropped>{escape(row['dropped'])}</span>"])
    return f"<figure>{images}<figcaption>{caption}</figcaption></figure>"


def _scores(row: sqlite3.Row) -> str:
    """List the scores of a pair."""
    return ", ".join(f"{name} {row[name]:.2f}" for name in SCORES.values() if row[name] is not None)


def _sheet(folder: Path, rows: Sequence[sqlite3.Row]) -> Image.Image:
    """Put pairs on one picture, each with its number and scores above."""
    wide, high = 2 * SIDE + 8, SIDE + LABEL + 4
    sheet = Image.new("RGB", (COLUMNS * wide, max(1, math.ceil(len(rows) / COLUMNS)) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for place, row in enumerate(rows):
        left, top = place % COLUMNS * wide, place // COLUMNS * high
        scores = " ".join(f"{row[name]:.2f}" for name in SCORES.values() if row[name] is not None)
        pen.text((left + 2, top), f"{row['id']}: {scores}", fill="black")
        for number, path in enumerate(_pictures(folder, row["id"])[:2]):
            sheet.paste(fit(open_picture(path), SIDE, SIDE, "pad"), (left + number * SIDE, top + LABEL))
    return sheet
