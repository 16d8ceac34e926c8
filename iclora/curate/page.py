"""The summary page: what was kept and dropped, with scores, reasons and histograms. Static; needs no server, no script."""

import math
import sqlite3
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from model.checkpoint import write_atomic
from sampling.images import fit, open_picture, to_png

from .catalogue import SCORES, STAGES

SHOWN = 100  # pairs of each kind on the page and on a sheet
BINS, WIDE, HIGH = 30, 300, 80  # of a histogram
SIDE, COLUMNS, LABEL = 96, 4, 12  # of a picture on a sheet; pairs in a row; pixels above each
RANGES = {"seam": (0, 1), "dino": (-1, 1), "judge": (0, 4), "dino2": (-1, 1), "judge2": (0, 4)}
STYLE = """
body { font: 14px/1.4 sans-serif; margin: 2em; max-width: 75em; color: #222 } table { border-collapse: collapse }
td, th { padding: 2px 10px; text-align: left; border-bottom: 1px solid #ddd } .row { display: flex; flex-wrap: wrap; gap: 14px }
figure { margin: 0; width: 270px } figure img { width: 130px; height: 130px; object-fit: contain; background: #eee }
figcaption { font-size: 12px; overflow-wrap: anywhere } .kept { color: #17692b } .dropped { color: #a02020 }
"""


def write_page(folder: Path, db: sqlite3.Connection, bars: Mapping[str, float | None]) -> None:
    """Write index.html and the sheets kept.png and dropped.png.

    bars: by stage, the score from which it keeps an item
    """
    db.row_factory = sqlite3.Row
    parts = [_stages(db), "<h2>Scores</h2><div class=row>"]
    for stage, name in SCORES.items():
        scores = [row[0] for row in db.execute(f"SELECT {name} FROM pairs WHERE {name} IS NOT NULL")]
        if scores:
            parts.append(_histogram(name, scores, bars[stage]))
    parts.append("</div>")
    for kind, condition in (("kept", "exported OR exported2"), ("dropped", "dropped != '' AND NOT exported")):
        query = f"FROM pairs WHERE ({condition}) AND seam IS NOT NULL"
        (count,) = db.execute(f"SELECT count(*) {query}").fetchone()
        rows = db.execute(f"SELECT * {query} ORDER BY id LIMIT {SHOWN}").fetchall()
        reasons = {row["id"]: _reasons(db, row["id"]) for row in rows}
        parts.append(f"<h2>{kind.capitalize()}: {count}{f', the first {SHOWN}' * (count > SHOWN)}</h2><div class=row>")
        parts += [_figure(folder, row, kind, reasons[row["id"]]) for row in rows] + ["</div>"]
        sheet = folder / f"{kind}.png"
        if rows:
            write_atomic(sheet, to_png(_sheet(folder, rows)))
        else:
            sheet.unlink(missing_ok=True)
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{escape(folder.name)}</title><style>{STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body><h1>{escape(folder.name)}</h1>\n{body}\n</body></html>\n'
    write_atomic(folder / "index.html", page)


def _stages(db: sqlite3.Connection) -> str:
    """Count what came into each stage and what it kept, and list why things were dropped."""
    (items,) = db.execute("SELECT count(*) FROM items").fetchone()
    lines = [f"<p>{items} pairs were tried.</p><table><tr><th>stage<th>came in<th>kept<th>yield<th>dropped because"]
    for stage in STAGES:
        counts = db.execute("SELECT count(*), total(kept) FROM results WHERE stage = ?", [stage]).fetchone()
        if not counts[0]:
            continue
        query = (
            "SELECT reason, count(*) FROM results WHERE stage = ? AND NOT kept GROUP BY reason ORDER BY 2 DESC LIMIT 5"
        )
        reasons = "; ".join(f"{reason} ({count})" for reason, count in db.execute(query, [stage]))
        share = f"{counts[1] / counts[0]:.0%}" if not stage.startswith("export") else ""
        lines.append(f"<tr><td>{stage}<td>{counts[0]}<td>{counts[1]:.0f}<td>{share}<td>{escape(reasons)}")
    return "\n".join(lines) + "</table>"


def _histogram(name: str, scores: Sequence[float], bar: float | None) -> str:
    """Draw how scores are spread, and where the bar stands."""
    low, high = RANGES[name]
    counts = [0] * BINS
    for score in scores:
        counts[min(BINS - 1, max(0, int((score - low) / (high - low) * BINS)))] += 1
    step, most = WIDE / BINS, max(counts)
    bars = "".join(
        f'<rect x="{place * step:.1f}" y="{HIGH - HIGH * count / most:.1f}" width="{step - 1:.1f}" '
        f'height="{HIGH * count / most:.1f}" fill="#5b7fb5"/>'
        for place, count in enumerate(counts)
        if count
    )
    if bar is not None:
        x = (bar - low) / (high - low) * WIDE
        bars += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HIGH}" stroke="#a02020" stroke-width="2"/>'
    return (
        f'<figure style="width:{WIDE}px"><svg width="{WIDE}" height="{HIGH}" role="img">{bars}</svg><figcaption><b>'
        f"{name}</b>: {len(scores)} scores from {low} to {high}{'' if bar is None else f', kept from {bar:g}'}"
        "</figcaption></figure>"
    )


def _reasons(db: sqlite3.Connection, item: int) -> list[tuple[str, str]]:
    """List what the stages said of an item, in their order."""
    rows = dict(db.execute("SELECT stage, reason FROM results WHERE item = ? AND reason != ''", [item]).fetchall())
    return [(stage, rows[stage]) for stage in STAGES if stage in rows]


def _pictures(folder: Path, item: int) -> list[Path]:
    """List the pictures of a pair: reference, target, and what was drawn again."""
    paths = [folder / "pairs" / f"{item:08d}-{number}.png" for number in (1, 2)]
    return [path for path in [*paths, *sorted((folder / "redrawn").glob(f"{item:08d}-*.png"))] if path.is_file()]


def _figure(folder: Path, row: sqlite3.Row, kind: str, reasons: Sequence[tuple[str, str]]) -> str:
    """Show one pair, its words, its scores and why it was kept or dropped."""
    images = "".join(
        f'<img src="{path.parent.name}/{path.name}" alt="{path.stem}" loading="lazy">'
        for path in _pictures(folder, row["id"])
    )
    scores = ", ".join(f"{name} {row[name]:.2f}" for name in SCORES.values() if row[name] is not None)
    why = row["dropped"] if kind == "dropped" else "; ".join(f"{stage}: {reason}" for stage, reason in reasons)
    words = f"<b>{row['id']}</b> {escape(row['subject'])}{escape(' + ' + row['second']) if row['second'] else ''}"
    return (
        f"<figure>{images}<figcaption>{words} ({escape(row['mood'])})<br>{escape(row['prompt'])}<br>{scores}<br>"
        f'<span class="{kind}">{escape(why)}</span></figcaption></figure>'
    )


def _sheet(folder: Path, rows: Sequence[Any]) -> Image.Image:
    """Put pairs on one picture, each with its number and scores above."""
    wide, high = 2 * SIDE + 8, SIDE + LABEL + 4
    sheet = Image.new("RGB", (min(COLUMNS, len(rows)) * wide, math.ceil(len(rows) / COLUMNS) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for place, row in enumerate(rows):
        left, top = place % COLUMNS * wide, place // COLUMNS * high
        scores = " ".join(f"{row[name]:.2f}" for name in SCORES.values() if row[name] is not None)
        pen.text((left + 2, top), f"{row['id']}: {scores}", fill="black")
        for number, path in enumerate(_pictures(folder, row["id"])[:2]):
            sheet.paste(fit(open_picture(path), SIDE, SIDE, "pad"), (left + number * SIDE, top + LABEL))
    return sheet
