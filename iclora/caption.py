"""Write joint captions for sets that have none, with a vision-language model behind an endpoint:

python -m iclora.caption YOURS --captioner http://127.0.0.1:8000/v1 --captioner-model NAME

The key of the endpoint comes from $ICLORA_API_KEY or $OPENAI_API_KEY. What has a caption is passed over, so a second
run does the rest. Composites get a text of the same name, folders of panels a caption.txt.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from model.checkpoint import write_atomic
from model.text import load_tokenizer
from model.weights import find_model
from sampling.images import open_picture
from sampling.latents import TOKEN

from .chat import Answer, Chat, Message, in_parallel
from .cli import guard, parse, plain
from .config import check, model_defaults, option
from .data import Example, choose_layout, read_panels
from .layout import Layout, parse_grid
from .prompts import clean, lint, markers_for
from .records import Findings, Record, read_records

TRIES = 3  # captions of a set before it counts as failed
Refused = Sequence[tuple[str, str]]  # captions, and what is wrong with them

# Tells panels: them, their markers (none for one), how to begin, what was refused -> a joint caption.
# Raises EndpointError if other sets would fail as well, else ValueError
Teller = Callable[[Sequence[Image.Image], Sequence[str], str, Refused], str]


def request(markers: Sequence[str], tag: str, words: int) -> str:
    """Ask for a joint caption in words."""
    form = f"Write one paragraph of at most {words} words, and nothing else: no title, no list, no quotation marks."
    begin = f'Begin it with "{tag}". ' if tag else ""
    if not markers:
        return f"Write a caption that says what this picture shows. {begin}{form}"
    return (
        f"These {len(markers)} pictures are the panels of one set, in reading order. Write one caption for the set. "
        f"{begin}First sum up in a sentence what all panels have in common: who or what is in them and how it looks. "
        f"Then tell what each panel shows, behind its marker: {' '.join(markers)}, each once and in this order. "
        f"Call the same subject by the same name throughout. {form}"
    )


def write_caption(target: Path, record: Record, tell: Teller, tokenizer: T5Tokenizer, overwrite: bool) -> None:
    """Let a teller caption a set, up to TRIES times, until nothing is wrong with it, and write that.

    tokenizer: its model_max_length is the number of tokens that are read
    Errors: EndpointError as the teller's, else ValueError; OSError if the file cannot be written
    """
    grid, tag, refused = record.settings.grid, record.settings.tag, []
    if record.settings.root:  # a target with control pictures is one picture, unless something else is told
        grid = grid or (1, 1)
    if grid is None:
        raise ValueError("nothing tells its grid; give --grid, or write a set.json into the folder")
    Layout(*grid, TOKEN, TOKEN)  # refuses absurd grids
    example = Example(record.name, grid, "", record.files, tuple(open_picture(path).size for path in record.files), ())
    panels = read_panels(example, choose_layout(example, 1024, (0, 0)))  # pixels squared, at most
    markers = markers_for(record.settings.markers, *grid) if len(panels) > 1 else ()
    while len(refused) < TRIES:
        caption = clean(tell(panels, markers, tag, refused))
        faults = lint(caption, *grid, record.settings.markers, tag)
        told = caption.removeprefix(tag).partition((*markers, "\n")[0])[0].strip()  # before the first marker
        if not faults and not (told and all(marker in caption for marker in markers)):
            faults.append(f"it needs a sentence about all panels, and behind it the markers {' '.join(markers)}")
        if (tokens := len(tokenizer(caption, verbose=False).input_ids)) > tokenizer.model_max_length:
            faults.append(f"it is {tokens} T5 tokens long, of which {tokenizer.model_max_length} are read; shorten it")
        if not faults:
            return write_atomic(target, caption + "\n", overwrite)
        refused.append((caption, "; ".join(faults)))
    raise ValueError(f"no caption in {TRIES} tries; of the last one: {refused[-1][1]}")


def caption_file(record: Record) -> Path:
    """Say where a set of pictures has its caption, or would have it."""
    alone = record.composite or record.references
    return record.files[0].with_suffix(".txt") if alone else Path(record.name, "caption.txt")


@dataclass(frozen=True)
class CaptionConfig:
    """What is to be captioned, and by whom."""

    data: str = option("sets", "folder with sets", metavar="PATH")
    captioner: str = option("", "address of an OpenAI-compatible endpoint, http://HOST:PORT/v1", metavar="URL")
    captioner_model: str = option("", "the endpoint's model, one that takes pictures", metavar="NAME")
    timeout: int = option(120, "seconds to wait for an answer", valid=(1, 3600))
    at_once: int = option(4, "sets that are asked for at the same time", valid=(1, 256))
    grid: str | None = option(None, "of every set (default: what each set.json says)", metavar="ROWSxCOLS")
    overwrite: bool = option(False, "write new captions over those that are there")
    model: str = option("tiny", "the model that is to learn, for its text length", metavar="NAME|PATH")

    def __post_init__(self) -> None:
        check(self)


def chat_teller(config: CaptionConfig, limit: int, answers: list[Answer]) -> Teller:
    """Make a teller of the endpoint that the options name.

    limit: T5 tokens that are read
    answers: gets every answer, for its cost
    Errors: ValueError if they name none
    """
    chat = Chat(config.captioner, config.captioner_model, config.timeout)

    def tell(panels: Sequence[Image.Image], markers: Sequence[str], tag: str, refused: Refused) -> str:
        messages: list[Message] = [("user", request(markers, tag, limit * 3 // 5), tuple(panels))]
        for caption, problem in refused:
            messages += [("assistant", caption, ()), ("user", f"{problem}. Write the whole caption again.", ())]
        answers.append(answer := chat.ask(messages))
        return answer.text

    return tell


def main(argv: Sequence[str] | None = None, make_teller: Callable = chat_teller, name: str = "iclora.caption") -> int:
    """Caption sets. Returns the exit status: 0 done, 2 if any failed or for a mistake, 130 interrupted"""
    argv = sys.argv[1:] if argv is None else argv
    flags = ["--data", *argv] if argv and argv[0][:1] != "-" else argv
    return guard(lambda: run(parse(CaptionConfig, flags, __doc__, f"python -m {name} [PATH]"), make_teller))


def run(config: CaptionConfig, make_teller: Callable[..., Teller]) -> int:
    """Write the captions that are missing, each as soon as it is there. Returns 0, or 2 if any failed"""
    findings, answers, done = Findings(), [], 0
    nothing = f"{config.data} is no folder with sets; it takes pictures, and a set.json with their grid"
    if not os.path.isdir(config.data):
        raise ValueError(nothing)
    records = read_records(Path(config.data), config.grid and parse_grid(config.grid), findings)
    told = [record for record in records if Path(record.name).exists()]  # the others are rows, and have theirs there
    if not told and not findings.bare:
        raise ValueError(next(iter(findings.broken), nothing))
    again = [(caption_file(record), record) for record in told if config.overwrite and caption_file(record).exists()]
    todo = [*findings.bare.items(), *again]
    tokenizer = load_tokenizer(T5Tokenizer, (files := find_model(config.model)).t5_tokenizer)
    tokenizer.model_max_length = model_defaults(files.flux.config).text_length or tokenizer.model_max_length
    tell, failed = make_teller(config, tokenizer.model_max_length, answers), findings.broken
    results = in_parallel(lambda one: write_caption(*one, tell, tokenizer, config.overwrite), todo, config.at_once)
    try:
        for index, error in tqdm(results, "captions", len(todo), leave=False, disable=None):
            failed += [f"{todo[index][1].name}: {error}"] if error else []
            done += not error
    finally:
        sys.stderr.write("".join(f"failed: {plain(line)}\n" for line in failed))
        sys.stdout.write(f"captions: {done} written, {len(told) - len(again)} skipped, {len(failed)} failed; ")
        sys.stdout.write(f"tokens: {sum(a.tokens_in for a in answers)} in, {sum(a.tokens_out for a in answers)} out\n")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
