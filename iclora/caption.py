"""Write joint captions for sets that have none, with a vision-language model behind an endpoint:

python -m iclora.caption YOURS --captioner http://127.0.0.1:8000/v1 --captioner-model NAME

The key of the endpoint comes from $ICLORA_API_KEY or $OPENAI_API_KEY. What has a caption is passed over, so a second
run does the rest. Composites get a text of the same name, folders of panels a caption.txt.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from PIL import Image
from tqdm import tqdm
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from model.checkpoint import write_atomic
from model.text import load_tokenizer
from model.weights import find_model
from sampling.images import open_picture

from .chat import Answer, Chat, EndpointError, Message, in_parallel
from .cli import guard, parse, plain
from .config import check, model_defaults, option
from .data import Example, choose_layout, read_panels
from .layout import parse_grid
from .prompts import clean, lint, markers_for
from .records import PICTURES, Findings, Grid, Record, Settings, collect, read_records, walk

TRIES = 3  # captions of a set before it counts as failed
RESOLUTION = 1024  # pixels squared of a panel that is shown, at most
Refused = Sequence[tuple[str, str]]  # captions, and what is wrong with them


class Teller(Protocol):
    """Whatever can tell what panels show."""

    def __call__(self, panels: Sequence[Image.Image], markers: Sequence[str], tag: str, refused: Refused) -> str:
        """Write a joint caption.

        markers: of the panels; none for a single one
        tag: how the caption is to begin, if at all
        refused: what was written of this set before
        Errors: EndpointError if other sets would fail as well, else ValueError
        """


@dataclass(frozen=True)
class ChatTeller:
    """Asks a model behind an endpoint.

    words: about how many a caption may have
    answers: gets every answer, for its cost
    """

    chat: Chat
    words: int
    answers: list[Answer]

    def __call__(self, panels: Sequence[Image.Image], markers: Sequence[str], tag: str, refused: Refused) -> str:
        """Ask for a caption, or for a better one in the same conversation."""
        messages: list[Message] = [("user", request(markers, tag, self.words), tuple(panels))]
        for caption, problem in refused:
            messages += [("assistant", caption, ()), ("user", f"{problem}. Write the whole caption again.", ())]
        self.answers.append(answer := self.chat.ask(messages))
        return answer.text


def request(markers: Sequence[str], tag: str, words: int) -> str:
    """Ask for a joint caption in words."""
    begin = f'Begin it with "{tag}". ' if tag else ""
    end = (
        f"At most {words} words, as one paragraph. Write the caption alone, without a title, lists or quotation marks."
    )
    if not markers:
        return f"Write a caption that says what this picture shows. {begin}{end}"
    return (
        f"These {len(markers)} pictures are the panels of one set, in reading order. Write one caption for the set. "
        f"{begin}First sum up in a sentence what all panels have in common: who or what is in them and how it looks. "
        f"Then tell what each panel shows, behind its marker: {' '.join(markers)}, each once and in this order. "
        f"Call the same subject by the same name throughout. {end}"
    )


def write_caption(record: Record, tell: Teller, count_tokens: Callable[[str], int], limit: int) -> str:
    """Let a teller write the caption of a set, up to TRIES times, until nothing is wrong with it.

    limit: T5 tokens that the model reads
    Errors: EndpointError as the teller's, else ValueError
    """
    grid, panels = cut(record)
    markers = markers_for(record.settings.markers, *grid) if len(panels) > 1 else ()
    refused: list[tuple[str, str]] = []
    for _ in range(TRIES):
        caption = " ".join(tell(panels, markers, record.settings.tag, refused).split())
        findings = find_faults(caption, grid, markers, record.settings)
        if (tokens := count_tokens(caption)) > limit:
            findings.append(f"it is {tokens} T5 tokens long, of which {limit} are read; shorten it")
        if not findings:
            return caption
        refused.append((caption, "; ".join(findings)))
    raise ValueError(f"no caption in {TRIES} tries, the last one was refused: {refused[-1][1]}")


def find_faults(caption: str, grid: Grid, markers: Sequence[str], settings: Settings) -> list[str]:
    """Say what is wrong with a caption but its length, one line a fault."""
    faults: list[str] = []
    with collect(faults):
        faults += lint(clean(caption), *grid, settings.markers)
    if not faults and not all(marker in caption for marker in markers):
        faults.append(f"the markers are to be {' '.join(markers)}")
    if not caption.startswith(settings.tag):
        faults.append(f"it does not begin with {settings.tag}")
    if markers and not caption.partition(markers[0])[0].removeprefix(settings.tag).strip():
        faults.append(f"there is no sentence about the whole set before {markers[0]}")
    return faults


def cut(record: Record) -> tuple[Grid, list[Image.Image]]:
    """Open the panels of a set; a composite is cut. Returns (rows, cols) and the panels. Errors: ValueError"""
    if (grid := record.settings.grid) is None:
        raise ValueError("nothing tells its grid; give --grid, or write a set.json into the folder")
    sizes = tuple(open_picture(path).size for path in record.files)
    example = Example(record.name, grid, "", record.files, sizes, ())
    return grid, read_panels(example, choose_layout(example, RESOLUTION, (0, 0)))


def find_sets(root: Path, grid: Grid | None, findings: Findings) -> dict[Path, Record]:
    """Find all sets, captioned or not: the file of the caption, and what is in the set.

    Pictures that a row of a .jsonl lists are left out, as their captions stand there.

    findings: told of folders that cannot be read
    Errors: ValueError if there is no such folder
    """
    if not os.path.isdir(root):
        raise ValueError(f"there is no folder {ascii(str(root)[-80:])}; name one with sets")
    rows = [record for record in read_records(root, grid, Findings()) if not os.path.exists(record.name)]
    listed, sets = {file.resolve() for record in rows for file in record.files}, {}
    for folder, files, settings in walk(root, Settings(grid, forced=grid is not None), findings, {root.resolve()}):
        pictures = [file for file in files if file.suffix.lower() in PICTURES and file.resolve() not in listed]
        stems = [str(number) for number in range(1, math.prod(settings.grid or ()) + 1)]
        if len(stems) > 1 and sorted(picture.stem for picture in pictures) == sorted(stems):
            panels = tuple(sorted(pictures, key=lambda picture: int(picture.stem)))
            sets[folder / "caption.txt"] = Record(str(folder), panels, False, settings, None)
        else:
            sets |= {
                one.with_name(f"{one.stem}.txt"): Record(str(one), (one,), True, settings, None) for one in pictures
            }
    return sets


def has_caption(target: Path, record: Record) -> bool:
    """Tell whether a set has its caption; for a folder of panels the texts of panels are one as well."""
    stems = [target.stem] if record.composite else ["caption", "summary", *(path.stem for path in record.files)]
    return any(target.with_name(f"{stem}.txt").exists() for stem in stems)


@dataclass(frozen=True)
class CaptionConfig:
    """What is to be captioned, and by whom."""

    data: str = option("sets", "folder with sets", metavar="PATH")
    captioner: str | None = option(None, "address of an OpenAI-compatible endpoint, http://HOST:PORT/v1", metavar="URL")
    captioner_model: str | None = option(None, "the endpoint's model, one that takes pictures", metavar="NAME")
    timeout: int = option(120, "seconds to wait for an answer", valid=(1, 3600))
    at_once: int = option(4, "sets that are asked for at the same time", valid=(1, 256))
    grid: str | None = option(None, "of every set (default: what each set.json says)", metavar="ROWSxCOLS")
    overwrite: bool = option(False, "write new captions over those that are there")
    model: str = option("tiny", "the model that is to learn, for its text length", metavar="NAME|PATH")

    def __post_init__(self) -> None:
        check(self)


Maker = Callable[[CaptionConfig, int, list[Answer]], Teller]  # takes the tokens that are read, and a list of costs


def chat_teller(config: CaptionConfig, limit: int, answers: list[Answer]) -> ChatTeller:
    """Make the teller that the options name. Errors: ValueError if they name none"""
    if not config.captioner or not config.captioner_model:
        raise ValueError(
            "--captioner and --captioner-model are missing; name an endpoint and a model that sees pictures"
        )
    return ChatTeller(Chat(config.captioner, config.captioner_model, config.timeout), limit * 3 // 5, answers)


def main(argv: Sequence[str] | None = None, make_teller: Maker = chat_teller, name: str = "iclora.caption") -> int:
    """Caption sets. Returns the exit status: 0 done, 2 if any failed or for a mistake, 130 interrupted"""
    argv = sys.argv[1:] if argv is None else argv
    flags = ["--data", *argv] if argv and argv[0][:1] != "-" else argv
    return guard(lambda: run(parse(CaptionConfig, flags, __doc__, f"python -m {name} [PATH]"), make_teller))


def run(config: CaptionConfig, make_teller: Maker) -> int:
    """Write the captions that are missing, each as soon as it is there. Returns 0, or 2 if any failed"""
    findings, answers, written = Findings(), [], 0
    sets = find_sets(Path(config.data), config.grid and parse_grid(config.grid), findings)
    if not sets:
        raise ValueError(f"{config.data} holds no sets; it takes pictures, and a set.json that tells their grid")
    files = find_model(config.model)
    tokenizer = load_tokenizer(T5Tokenizer, files.t5_tokenizer)
    limit = model_defaults(files.flux.config).text_length or tokenizer.model_max_length
    work = partial(
        write_caption,
        tell=make_teller(config, limit, answers),
        count_tokens=lambda text: len(tokenizer(text, verbose=False).input_ids),
        limit=limit,
    )
    todo = [(target, record) for target, record in sets.items() if config.overwrite or not has_caption(target, record)]
    failed = findings.broken
    try:
        with tqdm(total=len(todo), desc="captions", leave=False, disable=None) as bar:
            for index, told in in_parallel(work, (record for _, record in todo), config.at_once):
                bar.update()
                try:
                    if isinstance(told, Exception):
                        raise told
                    write_atomic(todo[index][0], told + "\n", config.overwrite)
                    written += 1
                except EndpointError:
                    raise
                except (ValueError, OSError) as error:
                    failed.append(f"{todo[index][1].name}: {error}")
                    bar.write(f"failed: {plain(failed[-1])}", sys.stderr)
    finally:
        costs = sum(answer.tokens_in for answer in answers), sum(answer.tokens_out for answer in answers)
        counts = f"{written} written, {len(sets) - len(todo)} skipped, {len(failed)} failed"
        sys.stdout.write("captions: {}; {} tokens read and {} written\n".format(counts, *costs))
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
