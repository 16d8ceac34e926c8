"""Write joint captions for sets that have none, with a vision-language model behind an endpoint:

python -m iclora.caption YOURS --captioner http://127.0.0.1:8000/v1 --captioner-model NAME

The key of the endpoint comes from $ICLORA_API_KEY or $OPENAI_API_KEY. What has a caption is passed over, so a second
run does the rest. Composites get a text of the same name, folders of panels a caption.txt.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
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
from .data import WRITE_GRID, Example, choose_layout, read_panels
from .layout import parse_grid
from .prompts import clean, lint, markers_for
from .records import PICTURES, Findings, Grid, Record, Settings, read_records, walk

TRIES = 3  # captions of a set before it counts as failed
RESOLUTION = 1024  # pixels squared of a panel that is shown, at most
Refused = Sequence[tuple[str, str]]  # captions, and what is wrong with them


class Teller(Protocol):
    """Whatever can tell what panels show."""

    def __call__(self, panels: Sequence[Image.Image], markers: Sequence[str], tag: str, refused: Refused) -> Answer:
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
    """

    chat: Chat
    words: int

    def __call__(self, panels: Sequence[Image.Image], markers: Sequence[str], tag: str, refused: Refused) -> Answer:
        """Ask for a caption, or for a better one in the same conversation."""
        messages: list[Message] = [("user", request(markers, tag, self.words), tuple(panels))]
        for caption, problem in refused:
            messages += [("assistant", caption, ()), ("user", f"{problem}. Write the whole caption again.", ())]
        return self.chat.ask(messages)


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


@dataclass(frozen=True)
class Told:
    """A caption, or None and the reason; and the tokens that it cost."""

    caption: str | None
    problem: str = ""
    tokens_in: int = 0
    tokens_out: int = 0


class Captioner:
    """Lets a teller write captions until the linter and the length agree.

    limit: T5 tokens that the model reads
    """

    def __init__(self, tell: Teller, count_tokens: Callable[[str], int], limit: int):
        self.tell, self.count_tokens, self.limit, self.lock = tell, count_tokens, limit, Lock()

    def __call__(self, record: Record) -> Told:
        """Write the caption of a set, asking again up to TRIES times in all.

        Errors: EndpointError
        """
        told, refused = Told(None), []
        try:
            grid, panels = cut(record)
            markers = markers_for(record.settings.markers, *grid) if len(panels) > 1 else ()
            for _ in range(TRIES):
                answer = self.tell(panels, markers, record.settings.tag, refused)
                tokens = told.tokens_in + answer.tokens_in, told.tokens_out + answer.tokens_out
                problem = self.problem(answer.text, grid, markers, record.settings)
                told = Told(None if problem else clean(answer.text), problem, *tokens)
                if not problem:
                    break
                refused.append((answer.text, problem))
        except EndpointError:
            raise
        except ValueError as error:
            return replace(told, problem=str(error))
        return told if told.caption else replace(told, problem=f"after {TRIES} tries: {told.problem}")

    def problem(self, text: str, grid: Grid, markers: Sequence[str], settings: Settings) -> str:
        """Say what is wrong with a caption, or nothing."""
        try:
            caption = clean(text)
        except ValueError as error:
            return str(error)
        findings = lint(caption, *grid, settings.markers)
        findings += [f"{marker} is missing" for marker in markers if marker not in caption][: not findings]
        if not caption.startswith(settings.tag):
            findings.append(f"it does not begin with {settings.tag}")
        if markers and not caption.partition(markers[0])[0].removeprefix(settings.tag).strip():
            findings.append(f"there is no sentence about the whole set before {markers[0]}")
        with self.lock:  # a tokenizer is not made for threads
            tokens = self.count_tokens(caption)
        if tokens > self.limit:
            findings.append(f"it is {tokens} T5 tokens long, of which {self.limit} are read; shorten it")
        return "; ".join(findings)


def cut(record: Record) -> tuple[Grid, list[Image.Image]]:
    """Open the panels of a set; a composite is cut. Returns (rows, cols) and the panels. Errors: ValueError"""
    if (grid := record.settings.grid) is None:
        raise ValueError(f"nothing tells its grid; {WRITE_GRID.replace('of --data', 'of the sets')}")
    sizes = tuple(open_picture(path).size for path in record.files)
    example = Example(record.name, grid, "", record.files, sizes, ())
    return grid, read_panels(example, choose_layout(example, RESOLUTION, (0, 0)))


def find_sets(root: Path, grid: Grid | None, findings: Findings) -> dict[Path, Record]:
    """Find all sets, captioned or not: the files of their captions, and what is in the set.

    Pictures that a row of a .jsonl lists are left out, as their captions stand there.

    findings: told of folders that cannot be read
    Errors: ValueError if there is no such folder
    """
    if not root.is_dir():
        raise ValueError(f"there is no folder {ascii(str(root)[-80:])}; name one with sets")
    rows = [record for record in read_records(root, grid, Findings()) if not Path(record.name).exists()]
    listed, sets = {file.resolve() for record in rows for file in record.files}, {}
    for folder, files, settings in walk(root, Settings(grid, forced=grid is not None), findings, {root.resolve()}):
        pictures = [file for file in files if file.suffix.lower() in PICTURES and file.resolve() not in listed]
        rows, cols = settings.grid or (1, 1)
        panels = {str(number): number for number in range(1, rows * cols + 1)}
        if len(panels) > 1 and sorted(picture.stem for picture in pictures) == sorted(panels):
            pictures.sort(key=lambda picture: panels[picture.stem])
            sets[folder / "caption.txt"] = Record(str(folder), tuple(pictures), False, settings, None)
        else:
            for one in pictures:
                sets[one.with_name(f"{one.stem}.txt")] = Record(str(one), (one,), True, settings, None)
    return sets


def has_caption(target: Path, record: Record) -> bool:
    """Tell whether a set has its caption, or for folders of panels a text for each."""
    others = ["summary", *(path.stem for path in record.files)] if not record.composite else []
    return target.exists() or any(target.with_name(f"{stem}.txt").exists() for stem in others)


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


Maker = Callable[[CaptionConfig, int], Teller]  # takes the tokens that are read too


def chat_teller(config: CaptionConfig, limit: int) -> ChatTeller:
    """Make the teller that the options name. Errors: ValueError if they name none"""
    if not config.captioner or not config.captioner_model:
        raise ValueError(
            "--captioner and --captioner-model are missing; name an endpoint and a model that sees pictures"
        )
    return ChatTeller(Chat(config.captioner, config.captioner_model, config.timeout), limit * 3 // 5)


def main(
    argv: Sequence[str] | None = None,
    make_teller: Maker = chat_teller,
    program: str = "python -m iclora.caption [PATH]",
    description: str = __doc__,
) -> int:
    """Caption sets. Returns the exit status: 0 done, 2 if any failed or for a mistake, 130 interrupted"""
    argv = sys.argv[1:] if argv is None else argv
    flags = ["--data", *argv] if argv and argv[0][:1] != "-" else argv
    return guard(lambda: run(parse(CaptionConfig, flags, description, program), make_teller))


def run(config: CaptionConfig, make_teller: Maker) -> int:
    """Write the captions that are missing, each as soon as it is there. Returns 0, or 2 if any failed"""
    findings = Findings()
    sets = find_sets(Path(config.data), config.grid and parse_grid(config.grid), findings)
    if not sets:
        raise ValueError(f"{config.data} holds no sets; it takes pictures, and a set.json that tells their grid")
    files = find_model(config.model)
    tokenizer = load_tokenizer(T5Tokenizer, files.t5_tokenizer)
    limit = model_defaults(files.flux.config).text_length or tokenizer.model_max_length
    captioner = Captioner(make_teller(config, limit), lambda text: len(tokenizer(text, verbose=False).input_ids), limit)
    wanted = [
        (target, record) for target, record in sets.items() if config.overwrite or not has_caption(target, record)
    ]
    written, tokens_in, tokens_out, failed = 0, 0, 0, len(findings.broken)
    bar = tqdm(total=len(wanted), desc="captions", unit="set", leave=False, disable=None)
    tqdm.write("".join(f"failed: {plain(line)}\n" for line in findings.broken), sys.stderr, end="")
    try:
        for index, told in in_parallel(captioner, (record for _, record in wanted), config.at_once):
            target, record = wanted[index]
            if isinstance(told, EndpointError | OSError):
                raise told
            problem = told.problem or save(target, told.caption, config.overwrite)
            tokens_in, tokens_out = tokens_in + told.tokens_in, tokens_out + told.tokens_out
            written, failed = written + (not problem), failed + bool(problem)
            if problem:
                tqdm.write(f"failed: {plain(f'{record.name}: {problem}')}", sys.stderr)
            bar.update()
    finally:
        bar.close()
        counts = f"{written} written, {len(sets) - len(wanted)} skipped, {failed} failed"
        sys.stdout.write(f"captions: {counts}; {tokens_in} tokens read and {tokens_out} written by the captioner\n")
    return 2 if failed else 0


def save(target: Path, caption: str, overwrite: bool) -> str:
    """Write a caption. Returns why it could not be, or nothing"""
    try:
        write_atomic(target, caption + "\n", overwrite)
    except FileExistsError:
        return f"{target.name} was written meanwhile; it is left as it is"
    except OSError as error:
        return f"cannot write {target.name}: {error.strerror or error}; free space, or correct its permissions"
    return ""


if __name__ == "__main__":
    sys.exit(main())
