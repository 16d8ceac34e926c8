"""What each stage makes of an item: pictures in the folder, and an outcome for the catalogue."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from model.checkpoint import fingerprint, write_atomic
from model.weights import find_model, weight_files
from sampling.images import fit, open_picture, to_png

from ..chat import Chat, EndpointError, in_parallel
from ..config import model_defaults
from ..judge import ChatJudge, Judge
from ..layout import parse_size
from ..pipeline import Pipeline
from ..plan import make_plan, parse_lora, pick_device
from ..records import Note
from .catalogue import Catalogue, Item, Outcome, crops_of, passed, reader, selected
from .eyes import Box, ClipJudge, Dino, Locator, Owl, mark
from .options import CurateConfig
from .seam import cut, find_seam
from .taxonomy import HERE, alone, judge_texts, make_item, read_words

EXPORTS = {"export": "pairs.json", "export2": "pairs-2.json"}  # one reference; one of every subject
FOLDERS = ("diptychs", "pairs", "crops", "redrawn")
READ_AT_ONCE = 64  # captions, before the transformer works on them
FAILURES = 5  # of a judge, one after the other, that end a run
NamedJudge, NamedLocator = tuple[str, Judge] | None, tuple[str, Locator] | None  # as the catalogue notes them
Works = Iterator[tuple[Item, Outcome]]
Crops = dict[int, list[dict[str, Any]]]  # by item; empty where a stage has no use for them


class Workshop:
    """What all stages share. note: is called with what a user should know, in one line

    Errors: ValueError if the model, the words or the device cannot be used
    """

    def __init__(self, config: CurateConfig, note: Note, judge: NamedJudge, locator: NamedLocator):
        self.config, self.out, self.files = config, Path(config.out), find_model(config.model)
        self.mark = f"{self.files.name} {fingerprint(weight_files(self.files))[:8]}"
        self.note = lru_cache(note)  # tells each line once, not for every picture
        tiny = model_defaults(self.files.flux.config).name == "tiny"
        self.words_path = Path(config.words) if config.words else HERE / f"words{'-tiny' * tiny}.json"
        self.words = read_words(self.words_path)
        self.device = pick_device(config.device, model_defaults(self.files.flux.config), self.note)
        self.dino_folder = Path(config.dino_model or self.files.root / "dinov2")
        self.judge_name, load_judge = (judge[0], lambda: judge[1]) if judge else self.choose_judge()
        self.locator_name, load_locator = (locator[0], lambda: locator[1]) if locator else self.choose_locator()
        self.load = {"dino": lambda: Dino(self.dino_folder, self.device), "judge": load_judge, "find": load_locator}
        self.load["redraw"] = lambda: Pipeline.load(config.model, (config.lora,), self.device, config.dtype)

    def settings(self, stage: str) -> dict[str, str]:
        """Say what makes a stage's results, besides what the stages before it have made."""
        config, digest = self.config, hashlib.sha256(json.dumps(self.words, sort_keys=True).encode()).hexdigest()
        words = {"seed": str(config.seed), "words": f"{self.words_path.name} {digest[:8]}"}
        drawn = words | {"model": self.mark, "steps": str(config.steps)}
        lora, strength = parse_lora(config.lora) if config.lora else (None, 1)
        return {
            "taxonomy": words | {"writer": config.writer_model if config.writer else "none"},
            "diptych": drawn,
            "dino": {"dino-model": mark(self.dino_folder)},
            "judge": {"judge": self.judge_name},
            "find": {"detector": self.locator_name},
            "redraw": drawn | {"lora": lora and f"{lora.name} {fingerprint([lora])[:8]}, {strength:g}"},
        }.get(stage.rstrip("2"), {})

    def work(self, stage: str, items: Sequence[Item], crops: Crops) -> Works:
        """Give what a stage makes of items, one by one. crops: what find has cut out"""
        return getattr(self, stage.rstrip("2"))(items, crops if stage in ("redraw", "dino2", "judge2") else {})

    def save(self, picture: Image.Image, name: str) -> None:
        write_atomic(self.out / name, to_png(picture))

    def open(self, name: str) -> Image.Image:
        return open_picture(self.out / name)

    # stage I

    def taxonomy(self, catalogue: Catalogue) -> None:
        """Decide what the items show that are not there yet."""
        chat = self.config.writer and Chat(self.config.writer, self.config.writer_model, self.config.timeout)

        def write(request: str) -> str:
            if (text := catalogue.noted("taxonomy", request)) is None:
                catalogue.note("taxonomy", request, text := chat.ask([("user", request, ())]).text)
            return text

        (last,) = catalogue.db.execute("SELECT coalesce(max(id), 0) FROM items").fetchone()
        new, seed = range(last + 1, self.config.count + 1), self.config.seed
        catalogue.add([make_item(number, seed, self.words, write if chat else None) for number in new])

    def draw(self, loras: Sequence[str], requests: Sequence[dict[str, Any]]) -> Iterator[Image.Image]:
        """Make pictures. requests: options of sample.py, references by their names in the folder"""
        pipeline = Pipeline.load(self.config.model, loras, self.device, self.config.dtype)
        pipeline.note = self.note
        for first in range(0, len(requests), READ_AT_ONCE):
            plans = []
            for request in requests[first : first + READ_AT_ONCE]:
                refs = tuple(self.open(name) for name in request.get("ref", ()))
                config = replace(pipeline.config, steps=self.config.steps, **{**request, "ref": refs})
                plans.append(make_plan(config, self.note))
            pipeline.read_captions(plans)
            for plan in plans:
                yield from (result.composite for result in pipeline.run(plan))
            pipeline.texts.clear()  # 4 MB a caption for FLUX.1-dev

    def diptych(self, items: Sequence[Item], _: Crops) -> Works:
        """Let the model draw both pictures of a pair as one."""
        seeds = [self.seed(item, "diptych") for item in items]
        words = [{"grid": item.grid, "panel_size": item.size, "prompt": item.caption} for item in items]
        options = [{**each, "seed": seed} for each, seed in zip(words, seeds, strict=True)]
        for item, picture in zip(items, self.draw((), options), strict=True):
            self.save(picture, f"diptychs/{item.id:08d}.png")
            yield item, Outcome()

    def split(self, items: Sequence[Item], _: Crops) -> Works:
        """Cut diptychs at their seams; weak ones too, so that another --seam may keep them."""
        for item in items:
            composite = self.open(f"diptychs/{item.id:08d}.png")
            seam, share = find_seam(composite, item.grid)
            for number, panel in enumerate(cut(composite, item.grid, seam, parse_size(item.size)), start=1):
                self.save(panel, name("pairs", item, number))
            yield item, Outcome(share, data={"at": seam})

    def dino(self, items: Sequence[Item], crops: Crops) -> Works:
        """Compare pictures by the features of DINOv2; of several comparisons the worst counts."""
        look = self.load["dino"]()
        for item in items:
            yield item, Outcome(min(look(*map(self.open, names)) for names in comparisons(item, crops)))

    def judge(self, items: Sequence[Item], crops: Crops) -> Works:
        """Let the judge compare pictures part by part; of several comparisons the worst counts.

        Errors: ValueError if the endpoint does not answer, or fails again and again; what it did not judge is left
        """
        compare, failed = self.load["judge"](), []

        def work(item: Item) -> Outcome:
            verdicts = [compare(*map(self.open, names)) for names in comparisons(item, crops)]
            data = {"parts": [verdict.parts for verdict in verdicts], "said": [verdict.said for verdict in verdicts]}
            return Outcome(min(verdict.score for verdict in verdicts), data=data)

        at_once = self.config.at_once if isinstance(compare, ChatJudge) else 1
        for index, outcome in in_parallel(work, items, at_once):
            if isinstance(outcome, Outcome):
                yield from [*failed, (items[index], outcome)]
                failed.clear()
            elif isinstance(outcome, EndpointError | OSError):
                raise outcome
            else:
                failed.append((items[index], Outcome(against=f"the judge failed: {outcome}")))
            if len(failed) == FAILURES:
                raise ValueError(f"{FAILURES} pairs after each other could not be judged; the last: {outcome}")
        yield from failed

    def choose_judge(self) -> tuple[str, Callable[[], Judge]]:
        """Name the judge that the options ask for, and give what loads it."""
        address, model = self.config.judge or "", self.config.judge_model
        if "://" in address:
            return model, lambda: ChatJudge(Chat(address, model, self.config.timeout))
        folder = Path(address or self.files.root / "clip")
        return mark(folder), lambda: ClipJudge(folder, judge_texts(self.words), self.device)

    # stage II

    def find(self, items: Sequence[Item], _: Crops) -> Works:
        """Cut the second subject out of the target, and the first one too where its own picture shows both."""
        locate = self.load["find"]()
        for item in items:
            if not item.second:
                yield item, Outcome(against="it shows one subject only")
                continue
            reference, target = (self.open(name("pairs", item, number)) for number in (1, 2))
            both = locate(reference, item.second) is not None
            wanted = [(item.subject, item.scene1)] * both + [(item.second, item.scene3)]
            boxes = [locate(target, subject) for subject, _ in wanted]
            if None in boxes:
                yield item, Outcome(against=f"no {wanted[boxes.index(None)][0]} is found in the target")
                continue
            for number, box in enumerate(boxes, start=1):
                self.save(crop(target, box), name("crops", item, number))
            yield item, Outcome(data={"crops": [{"subject": subject, "scene": scene} for subject, scene in wanted]})

    def choose_locator(self) -> tuple[str, Callable[[], Locator]]:
        """Name the detector that the options ask for, and give what loads it."""
        folder = Path(self.config.detector or self.files.root / "owlv2")
        return mark(folder), lambda: Owl(folder, self.device)

    def redraw(self, items: Sequence[Item], crops: Crops) -> Works:
        """Draw what was cut out again, in another scene, so that a reference is no piece of its target."""
        options, last = [], []
        for item in items:
            for number, row in enumerate(crops[item.id], start=1):
                prompt, seed = alone(row["subject"], row["scene"], self.words), self.seed(item, f"redraw {number}")
                ref = [name("crops", item, number)]
                options.append({"ref": ref, "prompt": prompt, "panel_size": item.size, "seed": seed})
                last.append((item, number, number == len(crops[item.id])))
        for (item, number, done), picture in zip(last, self.draw((self.config.lora,), options), strict=True):
            self.save(picture, name("redrawn", item, number))
            if done:
                yield item, Outcome()

    # the result

    def export(self, stage: str, catalogue: Catalogue) -> None:
        """Write the pairs that are kept, or that --where selects, as UNO's JSON, which train.py reads."""
        where, rows, path = self.config.where, [], self.out / EXPORTS[stage]
        with closing(reader(catalogue.path)) as db:
            items = passed(db, stage, anew=True) if where is None else selected(db, stage, where)
            crops = crops_of(db) if stage == "export2" else {}
        for item in items:
            redrawn = [name("redrawn", item, number) for number in range(1, 1 + len(crops.get(item.id, ())))]
            references = redrawn if len(redrawn) > 1 else [name("pairs", item, 1), *redrawn]
            rows.append({"prompt": item.prompt, "image_paths": references, "image_tgt_path": name("pairs", item, 2)})
        write_atomic(path, json.dumps(rows, indent=1) + "\n")
        catalogue.export(stage, items, "kept by all stages" if where is None else f"selected by {where}")
        self.note(f"{len(rows)} pairs: {path}")

    def seed(self, item: Item, purpose: str) -> int:
        """Draw the seed of a picture."""
        return int.from_bytes(hashlib.sha256(f"{self.config.seed} {item.id} {purpose}".encode()).digest()[:7])


def name(folder: str, item: Item, number: int) -> str:
    """Name a file as UNO's JSON has it; in pairs 1 is the reference and 2 the target."""
    return f"{folder}/{item.id:08d}-{number}.png"


def comparisons(item: Item, crops: Crops) -> list[tuple[str, str]]:
    """Name what is to show the same subject: both panels, or every crop and what was drawn from it."""
    if not crops:
        return [(name("pairs", item, 1), name("pairs", item, 2))]
    numbers = range(1, 1 + len(crops[item.id]))
    return [(name("crops", item, number), name("redrawn", item, number)) for number in numbers]


def crop(picture: Image.Image, box: Box) -> Image.Image:
    """Cut out a square round a box, as large as the picture's shorter side then."""
    left, top, right, bottom = box
    side = min(max(right - left, bottom - top, 1), *picture.size)
    left = min(max((left + right - side) / 2, 0), picture.width - side)
    top = min(max((top + bottom - side) / 2, 0), picture.height - side)
    edges = tuple(round(edge) for edge in (left, top, left + side, top + side))
    return fit(picture.crop(edges), min(picture.size), min(picture.size))
