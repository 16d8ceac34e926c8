"""What each stage makes of an item: pictures in the folder, and an outcome for the catalogue."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from model.checkpoint import fingerprint, write_atomic
from model.weights import find_model, weight_files
from sampling.images import fit, open_picture, to_png

from ..chat import Chat, EndpointError, in_parallel
from ..config import model_defaults
from ..judge import ChatJudge, Judge, Verdict
from ..layout import parse_size
from ..pipeline import Pipeline
from ..plan import Note, make_plan, parse_lora
from .catalogue import Catalogue, Item, Outcome, data_of, passed, reader, selected
from .eyes import Box, ClipJudge, Dino, Locator, Owl, mark
from .options import CurateConfig, Tools
from .seam import cut, find_seam
from .taxonomy import HERE, alone, judge_texts, make_item, read_words

EXPORTS = {"export": "pairs.json", "export2": "pairs-2.json"}  # one reference; one of every subject
FOLDERS = ("diptychs", "pairs", "crops", "redrawn")
READ_AT_ONCE = 64  # captions, before the transformer works on them
FAILURES = 5  # of a judge, one after the other, that end a run
Works = Iterator[tuple[Item, Outcome]]
Names = list[tuple[str, str]]  # pictures to compare, each two by the names of their files


class Workshop:
    """What all stages share. note: is called with what a user should know, in one line

    Errors: ValueError if the model or the words cannot be used
    """

    def __init__(self, config: CurateConfig, tools: Tools, note: Note):
        self.config, self.tools, self.out = config, tools, Path(config.out)
        self.files, said = find_model(config.model), set()
        tiny = model_defaults(self.files.flux.config).name == "tiny"
        self.words_path = Path(config.words) if config.words else HERE / f"words{'-tiny' * tiny}.json"
        self.words = read_words(self.words_path)
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = auto if config.device == "auto" else config.device
        self.note = lambda line: line in said or (said.add(line), note(line))  # each line once, not for every picture
        self.steps: dict[str, Callable[[Sequence[Item], dict[int, Any]], Works]] = {
            "diptych": self.diptych,
            "split": self.split,
            "dino": self.dino,
            "judge": self.judge,
            "find": self.find,
            "redraw": self.redraw,
        }

    def settings(self, stage: str) -> dict[str, str]:
        """Say what makes a stage's results, besides what the stages before it have made."""
        config = self.config
        drawn = {"model": f"{self.files.name} {fingerprint(weight_files(self.files))[:8]}", "steps": str(config.steps)}
        match stage.rstrip("2"):
            case "taxonomy":
                words = hashlib.sha256(json.dumps(self.words, sort_keys=True).encode()).hexdigest()[:8]
                writer = config.writer_model if config.writer else "none"
                return {"seed": str(config.seed), "words": f"{self.words_path.name} {words}", "writer": writer}
            case "diptych":
                return drawn
            case "dino":
                return {"dino-model": mark(self.dino_folder)}
            case "judge":
                return {"judge": self.make_judge()[0]}
            case "find":
                return {"detector": self.make_locator()[0]}
            case "redraw":
                lora, strength = parse_lora(config.lora)
                return drawn | {"lora": f"{lora.name} {fingerprint([lora])[:8]}, {strength:g}"}
        return {}

    def work(self, stage: str, items: Sequence[Item], boxes: dict[int, Any]) -> Works:
        """Give what a stage makes of items, one by one. boxes: what find noted, by item"""
        return self.steps[stage.rstrip("2")](items, boxes if stage.endswith("2") or stage == "redraw" else {})

    # files of items, by names that UNO's JSON has

    def save(self, picture: Image.Image, name: str) -> None:
        write_atomic(self.out / name, to_png(picture))

    def open(self, name: str) -> Image.Image:
        return open_picture(self.out / name)

    # words

    def taxonomy(self, catalogue: Catalogue) -> None:
        """Decide what the items show that are not there yet."""
        write, chat = None, self.config.writer and Chat(self.config.writer, self.config.writer_model)
        if chat:

            def write(request: str) -> str:
                if (text := catalogue.written(request)) is None:
                    catalogue.keep_writing(request, text := chat.ask([("user", request, ())]).text)
                return text

        (last,) = catalogue.db.execute("SELECT coalesce(max(id), 0) FROM items").fetchone()
        catalogue.add(
            make_item(id_, self.config.seed, self.words, write) for id_ in range(last + 1, self.config.count + 1)
        )

    # pictures

    def draw(self, loras: Sequence[str], requests: Sequence[dict[str, Any]]) -> Iterator[Image.Image]:
        """Make pictures. requests: options of sample.py; pictures of references by their names in the folder"""
        pipeline = Pipeline.load(self.config.model, loras, self.device, self.config.dtype)
        pipeline.note = self.note
        for first in range(0, len(requests), READ_AT_ONCE):
            plans = []
            for request in requests[first : first + READ_AT_ONCE]:
                refs = tuple(self.open(name) for name in request.get("ref", ()))
                options = {"steps": self.config.steps, **request, "ref": refs}
                plans.append(make_plan(replace(pipeline.config, **options), self.note))
            pipeline.read_captions(plans)
            for plan in plans:
                (result,) = pipeline.run(plan)
                yield result.composite
            pipeline.texts.clear()  # 4 MB a caption for FLUX.1-dev

    def diptych(self, items: Sequence[Item], _: dict[int, Any]) -> Works:
        """Let the model draw both pictures of a pair as one."""
        requests = [
            {"grid": item.grid, "panel_size": item.size, "prompt": item.caption, "seed": self.seed(item, "diptych")}
            for item in items
        ]
        for item, picture in zip(items, self.draw((), requests), strict=True):
            self.save(picture, f"diptychs/{item.id:08d}.png")
            yield item, Outcome()

    def split(self, items: Sequence[Item], _: dict[int, Any]) -> Works:
        """Cut diptychs at their seams; weak ones too, so that another --seam may keep them."""
        for item in items:
            composite = self.open(f"diptychs/{item.id:08d}.png")
            seam, share = find_seam(composite, item.grid)
            for number, panel in enumerate(cut(composite, item.grid, seam, parse_size(item.size)), start=1):
                self.save(panel, panel_name(item, number))
            yield item, Outcome(share, data={"at": seam})

    # comparisons

    @property
    def dino_folder(self) -> Path:
        return Path(self.config.dino_model or self.files.root / "dinov2")

    def dino(self, items: Sequence[Item], boxes: dict[int, Any]) -> Works:
        """Compare pictures by the features of DINOv2; of several comparisons the worst counts."""
        look = Dino(self.dino_folder, self.device)
        for item in items:
            cosines = [look(self.open(first), self.open(second)) for first, second in comparisons(item, boxes)]
            yield item, Outcome(min(cosines))

    def judge(self, items: Sequence[Item], boxes: dict[int, Any]) -> Works:
        """Let the judge compare pictures part by part; of several comparisons the worst counts.

        Errors: ValueError if the endpoint does not answer, or fails again and again; what it did not judge is left
        """
        compare = self.make_judge()[1]()

        def work(item: Item) -> list[Verdict]:
            return [compare(self.open(first), self.open(second)) for first, second in comparisons(item, boxes)]

        failed: list[tuple[Item, Outcome]] = []
        at_once = self.config.at_once if isinstance(compare, ChatJudge) else 1
        for index, verdicts in in_parallel(work, items, at_once):
            if isinstance(verdicts, EndpointError | OSError):
                raise verdicts
            if isinstance(verdicts, ValueError):
                failed.append((items[index], Outcome(None, f"the judge failed: {verdicts}")))
                if len(failed) == FAILURES:
                    raise ValueError(f"{FAILURES} pairs after each other could not be judged; the last: {verdicts}")
                continue
            yield from failed
            failed.clear()
            data = {"parts": [verdict.parts for verdict in verdicts], "said": [verdict.said for verdict in verdicts]}
            yield items[index], Outcome(min(verdict.score for verdict in verdicts), data=data)
        yield from failed

    def make_judge(self) -> tuple[str, Callable[[], Judge]]:
        """Name the judge, and give what loads it. Errors: ValueError if there is none"""
        config, tokenizer = self.config, self.files.clip_tokenizer
        if self.tools.judge:
            return self.tools.judge[0], lambda: self.tools.judge[1]
        if config.judge and "://" in config.judge:
            return config.judge_model, lambda: ChatJudge(Chat(config.judge, config.judge_model))
        folder = Path(config.judge or self.files.root / "clip")
        if not folder.is_dir():
            raise ValueError(f"there is no judge in {folder}; give --judge, an endpoint or the folder of a CLIP")
        return mark(folder), lambda: ClipJudge(folder, tokenizer, judge_texts(self.words), self.device)

    # stage II

    def find(self, items: Sequence[Item], _: dict[int, Any]) -> Works:
        """Cut the second subject out of the target, and the first one too where its own picture shows both."""
        locate = self.make_locator()[1]()
        for item in items:
            if not item.second:
                yield item, Outcome(None, "it shows one subject only")
                continue
            reference, target = (self.open(panel_name(item, number)) for number in (1, 2))
            both = locate(reference, item.second) is not None
            wanted = [(item.subject, item.scene1)] * both + [(item.second, item.scene3)]
            boxes = [locate(target, subject) for subject, _ in wanted]
            if missing := [subject for (subject, _), box in zip(wanted, boxes, strict=True) if box is None]:
                yield item, Outcome(None, f"no {missing[0]} is found in the target")
                continue
            for number, box in enumerate(boxes, start=1):
                self.save(crop(target, box), f"crops/{item.id:08d}-{number}.png")
            rows = [
                {"subject": subject, "scene": scene, "box": [round(edge, 1) for edge in box]}
                for (subject, scene), box in zip(wanted, boxes, strict=True)
            ]
            yield item, Outcome(data={"crops": rows})

    def make_locator(self) -> tuple[str, Callable[[], Locator]]:
        """Name the detector, and give what loads it. Errors: ValueError if there is none"""
        if self.tools.locate:
            return self.tools.locate[0], lambda: self.tools.locate[1]
        if not self.config.detector:
            raise ValueError("find needs something that finds subjects; give --detector, the folder of an OWLv2")
        folder = Path(self.config.detector)
        return mark(folder), lambda: Owl(folder, self.device)

    def redraw(self, items: Sequence[Item], boxes: dict[int, Any]) -> Works:
        """Draw what was cut out again, in another scene, so that a reference is no piece of its target."""
        crops = [(item, number, row) for item in items for number, row in enumerate(boxes[item.id]["crops"], start=1)]
        requests = [
            {
                "ref": [f"crops/{item.id:08d}-{number}.png"],
                "prompt": alone(row["subject"], row["scene"], self.words),
                "panel_size": item.size,
                "seed": self.seed(item, f"redraw {number}"),
            }
            for item, number, row in crops
        ]
        for (item, number, _), picture in zip(crops, self.draw((self.config.lora,), requests), strict=True):
            self.save(picture, f"redrawn/{item.id:08d}-{number}.png")
            if number == len(boxes[item.id]["crops"]):
                yield item, Outcome()

    # the result

    def export(self, stage: str, catalogue: Catalogue) -> None:
        """Write the pairs that are kept, or that --where selects, as UNO's JSON, which train.py reads."""
        where = self.config.where
        with closing(reader(catalogue.path)) as db:
            items = passed(db, stage, anew=True) if where is None else selected(db, stage, where)
            boxes = data_of(db, "find")
        rows = []
        for item in items:
            references = [panel_name(item, 1)]
            if stage == "export2":
                redrawn = [f"redrawn/{item.id:08d}-{n}.png" for n in range(1, 1 + len(boxes[item.id]["crops"]))]
                references = redrawn if len(redrawn) > 1 else [*references, *redrawn]
            rows.append({"prompt": item.prompt, "image_paths": references, "image_tgt_path": panel_name(item, 2)})
        write_atomic(self.out / EXPORTS[stage], json.dumps(rows, indent=1) + "\n")
        catalogue.note_export(stage, items, "kept by all stages" if where is None else f"selected by {where}")
        self.note(f"{len(rows)} pairs: {self.out / EXPORTS[stage]}")

    def seed(self, item: Item, purpose: str) -> int:
        """Draw the seed of a picture."""
        text = f"{self.config.seed} {item.id} {purpose}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def panel_name(item: Item, number: int) -> str:
    """Name the file of a panel: 1 is the reference, 2 the target."""
    return f"pairs/{item.id:08d}-{number}.png"


def comparisons(item: Item, boxes: dict[int, Any]) -> Names:
    """Name what is to show the same subject: both panels, or every crop and what was drawn from it."""
    if not boxes:
        return [(panel_name(item, 1), panel_name(item, 2))]
    numbers = range(1, 1 + len(boxes[item.id]["crops"]))
    return [(f"crops/{item.id:08d}-{n}.png", f"redrawn/{item.id:08d}-{n}.png") for n in numbers]


def crop(picture: Image.Image, box: Box) -> Image.Image:
    """Cut out a square round a box, as large as the picture's shorter side then."""
    left, top, right, bottom = box
    side = min(max(right - left, bottom - top, 1), *picture.size)
    left = min(max((left + right - side) / 2, 0), picture.width - side)
    top = min(max((top + bottom - side) / 2, 0), picture.height - side)
    edges = tuple(round(edge) for edge in (left, top, left + side, top + side))
    return fit(picture.crop(edges), min(picture.size), min(picture.size))
