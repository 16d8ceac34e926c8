"""Measure a tiny model against the truth: python -m lab.report --model tiny --out lab/results

On held-out combinations of traits: the autoencoder, the reader that everything is read with, sets from text alone, one
panel from the three others, what guidance does, and borders between panels. Then it draws the contact sheets, and
writes all on a page, with the values of every set beside it.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from model.autoencoder import AutoEncoder
from model.checkpoint import write_atomic
from model.weights import find_model
from sampling.images import to_picture

from . import entry, eyes
from .captions import DOMAIN_WORDS, joint_caption
from .domains import in_domain
from .generate import Networks, Options, generate, load_networks, without
from .judge import Ruler
from .judge_kept import others
from .judge_text import TEXT_CASES, measure, measure_truth
from .measure import psnr, survival, tiling
from .pages import TRUE, base_mark, save_picture, save_values
from .scores import (
    HEAD,
    TEXT_SCORES,
    Figures,
    difference,
    hidden_agreement,
    interval,
    per_set,
    read_sets,
    row,
    to_tensors,
)
from .sets import GRIDS, PANEL
from .train_truth import draw_some, round_trip, tensors_after
from .truth import Reader, groups, load_reader
from .world import POSITIONS, random_set

SEED = 7_000_000  # far from the seeds of pretraining
BARS = {
    "colour and shape": 0.90, "scene": 0.95, "position": 0.85, "same subject": 0.85,
    "colours unmixed": 0.75, "masked panel: its own scene": 0.90, "masked panel: kept subject": 0.85,
}  # fmt: skip
SHEETS = {  # name -> what it shows
    "from-text": "From text alone (`--mask all`), above the true set of the same caption:",
    "panel-3": "Panel 3 from the other three (`--mask 3`, outlined), above the true set:",
}
COVER = (
    "{} sets or panels of held-out subjects, where a table does not have a half or a quarter of them. Intervals are "
    "95 %: Wilson's of what a set shows or does not, else bootstrapped over sets. They cover sampling, not training. A "
    "ceiling is what the reader says of true panels after the autoencoder. Hidden traits are never named by captions; "
    "their differences are of the sets in which both can be told."
)
OWN, OTHER = "own kept panels", "another set's"
KEPT_SCORES = {
    "masked panel: its own scene": TEXT_SCORES[1]["scene"],
    "masked panel: kept subject": TEXT_SCORES[1]["colour and shape"],
}
HIDDEN = ("face", "hue", "angle", "spacing", "face and hue")


# the experiments


def autoencoder_rows(networks: Networks, reader: Reader, count: int) -> list[str]:
    """PSNR, and the reader's accuracy on fresh panels and on their round trips, by number of subjects.

    Of one subject in the drawn domains, which the reader has never seen, PSNR alone.
    """
    lines = ["| subjects | PSNR | " + " | ".join(("scene", *READ)) + " |", "|---|---|" + "---|" * (1 + len(READ))]
    mean, mixed = 0.0, np.zeros(4)
    for (rows, cols), (often, chances) in GRIDS.items():
        mixed[: len(chances)] += often * rows * cols * np.array(chances)
    for subjects, share in zip((1, 2, 3, 4), mixed / mixed.sum(), strict=True):
        pictures, told = draw_some((SEED + subjects, count, subjects, None))
        pictures, told = torch.from_numpy(pictures), torch.from_numpy(told)
        decoded, quality = after_autoencoder(networks.autoencoder, pictures)
        mean += share * 10 ** (-quality / 10)
        fresh, after = (accuracy(reader, image, told) for image in (pictures, decoded))
        cells = [f"{fresh[name]:.1%} / {after[name]:.1%}" for name in ("scene", *READ)]
        lines.append(f"| {subjects} | {quality:.2f} dB | " + " | ".join(cells) + " |")
    plain, _ = draw_some((SEED + 1, count, 1, None))
    for domain in DOMAIN_WORDS:
        drawn = [in_domain(Image.fromarray(one.transpose(1, 2, 0)), domain, i) for i, one in enumerate(plain)]
        pictures = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
        _, quality = after_autoencoder(networks.autoencoder, pictures)
        lines.append(f"| 1, {domain} | {quality:.2f} dB |" + " |" * (1 + len(READ)))
    return [*lines, "", f"PSNR over panels as pretraining mixes them: {-10 * np.log10(mean):.2f} dB (bar 28)"]


READ = ("shape", "colour", "pattern", "accessory", "face", "hue", "angle", "spacing")


def after_autoencoder(autoencoder: AutoEncoder, pictures: Tensor) -> tuple[Tensor, float]:
    """What the autoencoder gives back of pictures (N, 3, 64, 64) uint8, and its PSNR in dB."""
    decoded = round_trip(autoencoder, pictures)
    return decoded, psnr(decoded.float() / 127.5 - 1, pictures.float() / 127.5 - 1)


@torch.no_grad()
def accuracy(reader: Reader, pictures: Tensor, told: Tensor) -> dict[str, float]:
    """How often each trait is read right where there is one; hue, angle and spacing within a neighbouring bin."""
    parts = groups(torch.cat([reader(part.float() / 127.5 - 1) for part in pictures.split(128)]))
    right = {"scene": (parts[0].argmax(1) == told[:, 0]).float().mean().item()}
    names = ("shape", "colour", "pattern", "accessory", "size", "face", "hue", "angle", "spacing")
    for k, name in enumerate(names):
        hits = []
        for place in range(len(POSITIONS)):
            i = 1 + place * len(names) + k
            there = told[:, 1 + place * len(names)] > 0
            there &= told[:, i] >= 0
            apart = (parts[i].argmax(1) - told[:, i]).abs()
            if name == "angle":
                apart = torch.minimum(apart, parts[i].shape[1] - apart)
            hits.append((apart <= (1 if name in ("hue", "angle", "spacing") else 0))[there])
        right[name] = torch.cat(hits).float().mean().item()
    return right


def text_figures(networks: Networks, ruler: Ruler, count: int) -> tuple[Figures, Figures]:
    """Figures of sets from captions alone, of all cases of judge_text.

    Returns a value of every set that was made, and of every true one after the autoencoder
    """
    made, true = {}, {}
    for case in TEXT_CASES:
        found = measure(case, networks, {}, ruler, count)[0], measure_truth(case, networks, ruler, count)[0]
        for all_figures, figures in zip((made, true), found, strict=True):
            all_figures |= {f"{case}: {name}": values for name, values in figures.items()}
    return made, true


def from_text(figures: Figures, ceilings: Figures) -> list[str]:
    """The table of text_figures."""
    rows = [
        row(name, values, BARS.get(name.split(": ")[1]), float(np.mean(ceilings[name])))
        for name, values in figures.items()
    ]
    return [*HEAD, *rows]


def kept_figures(networks: Networks, reader: Reader, count: int) -> dict[str, Figures]:
    """Figures of panel 3 from the other three, from three others that the caption fits as well, and of the true one.

    Returns a value of every set, NaN of traits that its subject has not
    """
    rng = np.random.default_rng(SEED + 20)
    sets = [random_set(rng, 2, 2, 1, held_out=True) for _ in range(count)]
    captions = [joint_caption(panels, 2, 2) for panels in sets]
    own, other = to_tensors(sets), to_tensors(others(sets, "all"))
    pages, figures = {}, {}
    for name, kept in ((OWN, own), (OTHER, other)):
        pages[name] = generate(networks, captions, (2, 2), list(range(count)), kept=without(kept, 3), masked=(3,))
    for name, page in (pages | {TRUE: tensors_after(networks.autoencoder, own)}).items():
        thirds = [(found[2], panels[2]) for found, panels in zip(read_sets(reader, page), sets, strict=True)]
        figures[name] = {label: [float(score(*third)) for third in thirds] for label, score in KEPT_SCORES.items()}
        agree = [hidden_agreement(reading, panel.placed[0].subject) for reading, panel in thirds]
        figures[name] |= {trait: [share(each, trait) for each in agree] for trait in HIDDEN}
    return figures


def from_kept(figures: dict[str, Figures]) -> list[str]:
    """The tables of kept_figures."""
    own, other, true = (figures[name] for name in (OWN, OTHER, TRUE))
    lines = list(HEAD)
    lines += [row(label, own[label], BARS[label], float(np.mean(true[label]))) for label in KEPT_SCORES]
    lines += ["", "| hidden trait | own kept panels | another set's | difference | 95 % interval | ceiling |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    for trait in HIDDEN:
        mean, low, high = difference(own[trait], other[trait])
        cells = [f"{np.nanmean(each[trait]):.1%}" for each in (own, other, true)]
        cells[2:2] = f"{mean:+.1%}", f"{low:+.1%} to {high:+.1%}"
        lines.append("| " + " | ".join((trait, *cells)) + " |")
    return lines


def share(agreement: dict[str, bool], trait: str) -> float:
    """One trait's agreement as a number, or the mean of two; NaN where it cannot be told."""
    if trait == "face and hue":
        return float(np.mean([agreement[one] for one in ("face", "hue")]))
    return float(agreement.get(trait, np.nan))


def by_guidance(networks: Networks, reader: Reader, count: int) -> list[str]:
    """Accuracy of sets from text at several guidance values, the same captions and noise."""
    rng = np.random.default_rng(SEED + 30)
    sets = [random_set(rng, 2, 2, 1, held_out=True) for _ in range(count)]
    captions = [joint_caption(panels, 2, 2) for panels in sets]
    names = list(TEXT_SCORES[1])
    lines = ["| guidance | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for guidance in (1.0, 2.0, 3.5, 5.0):
        made = read_sets(reader, generate(networks, captions, (2, 2), list(range(count)), Options(guidance=guidance)))
        cells = ["{:.1%} ({:.1%} to {:.1%})".format(*interval(per_set(made, sets, TEXT_SCORES[1][n]))) for n in names]
        lines.append(f"| {guidance:g} | " + " | ".join(cells) + " |")
    return lines


def borders(networks: Networks, count: int) -> list[str]:
    """Steps between neighbouring columns just inside panel borders, beside those elsewhere, of 255."""
    rng = np.random.default_rng(SEED + 40)
    sets = [random_set(rng, 2, 2, 1, held_out=True) for _ in range(count)]
    made = generate(networks, [joint_caption(panels, 2, 2) for panels in sets], (2, 2), list(range(count)))
    lines = []
    for name, image in (("made", made), ("drawn", to_tensors(sets))):
        step = 127.5 * image.diff(dim=-1).abs().mean(dim=(0, 1, 2))  # (127,)
        inside = torch.cat((step[61:63], step[64:66])).mean()
        elsewhere = torch.cat((step[8:56], step[72:120])).mean()
        lines.append(f"{name}: {inside:.2f} beside the border, {elsewhere:.2f} elsewhere, {step[63]:.2f} across it")
    return lines


# contact sheets


def sheet(networks: Networks, columns: int, masked: bool) -> Image.Image:
    """Generated sets in a row, each above the set that its caption was written for; a generated panel is outlined."""
    rng = np.random.default_rng(SEED + 100)
    sets = [random_set(rng, 2, 2, 2 if column % 3 == 2 else 1, held_out=True) for column in range(columns)]
    true, captions = to_tensors(sets), [joint_caption(panels, 2, 2) for panels in sets]
    kept = dict(kept=without(true, 3), masked=(3,)) if masked else {}
    made = generate(networks, captions, (2, 2), list(range(columns)), **kept)
    side, gap = 4 * PANEL, 8  # two panels, twice as large
    page = Image.new("RGB", (columns * (side + gap) - gap, 2 * side + gap), "white")
    pen = ImageDraw.Draw(page)
    for column in range(columns):
        for line, image in enumerate((made, true)):
            picture = to_picture(image[column : column + 1]).resize((side, side), Image.Resampling.NEAREST)
            page.paste(picture, (column * (side + gap), line * (side + gap)))
        if masked:
            x, y = column * (side + gap), side // 2
            pen.rectangle((x, y, x + side // 2 - 1, y + side // 2 - 1), outline="white", width=2)
    return page


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.report", description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("lab/results"), help="folder for page, values and sheets")
    parser.add_argument("--sets", type=entry.positive, default=200, help="sets of each experiment")
    parser.add_argument("--columns", type=entry.positive, default=6, help="sets on a contact sheet")
    return entry.run(parser, write, argv)


def write(args: argparse.Namespace) -> None:
    """Measure everything, print each table as it comes, and write base.md, its sheets and the values of every set."""
    networks, model = load_networks(args.model), Path(args.model).name
    reader = load_reader(args.model)
    few = max(2, args.sets // 4)
    text, kept = text_figures(networks, Ruler(reader), args.sets), kept_figures(networks, reader, args.sets)
    experiments = {
        "Autoencoder, and reader: fresh panels / after the autoencoder": lambda: autoencoder_rows(
            networks, reader, args.sets
        ),
        "Hidden traits after the autoencoder, compared by pixels": lambda: bullets(survival(networks.autoencoder, few)),
        "Tiled decoding": lambda: bullets(tiling(networks.autoencoder, max(2, few // 4))),
        "Sets from text alone": lambda: from_text(*text),
        "Panel 3 from the other three": lambda: from_kept(kept),
        "Guidance": lambda: by_guidance(networks, reader, 2 * few),
        "Borders between panels, in steps of 255": lambda: bullets(borders(networks, few)),
    }
    if (find_model(args.model).root / "clip").is_dir():
        experiments["The eyes: CLIP and DINOv2"] = lambda: eyes.tables(
            eyes.load_eyes(args.model), networks.autoencoder, args.sets
        )
    lines = [f"# The base {model}", "", COVER.format(args.sets), ""]
    for title, run in experiments.items():
        table = [f"## {title}", "", *run(), ""]
        print("\n".join(table), flush=True)
        lines += table
    args.out.mkdir(parents=True, exist_ok=True)
    for name, about in SHEETS.items():
        drawn = sheet(networks, args.columns, masked=name == "panel-3")
        lines += [about, "", f"![{name}]({save_picture(drawn, args.out / f'base-{name}').name})", ""]
    cases = {("text", "base"): text[0], ("text", TRUE): text[1], **{("kept", name): kept[name] for name in kept}}
    rows = [{"task": task, "name": name, "figures": [figures]} for (task, name), figures in cases.items()]
    base = {"model": model, "base": base_mark(args.model)}
    save_values({**base, "count": args.sets, "rows": rows}, args.out / "base.json")
    lines.append(f"Made by `python -m lab.report --model {model} --sets {args.sets} --columns {args.columns}`.")
    write_atomic(args.out / "base.md", "\n".join(lines) + "\n")


def bullets(lines: list[str]) -> list[str]:
    return [f"- {line}" for line in lines]


if __name__ == "__main__":
    sys.exit(main())
