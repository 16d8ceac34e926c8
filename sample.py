"""Makes a set of pictures that belong together; panels that you keep come back unchanged, the others follow them.

python sample.py --grid 2x2 --mask 3                        a bundled example, panel 3 made from the other three
python sample.py --grid 1x2 --mask all --prompt "..."       from text alone
python sample.py --mask 2,4 --panels a.png b.png --panel-prompt "..." "..." "..." "..."
python sample.py --ref cat.png --ref robot.png --prompt "a cat beside a robot"        with subjects of references
python sample.py --config out/0001.json                     the same picture again
"""

import hashlib
import json
import os
import platform
import re
import sys
from dataclasses import replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iclora.cli import NO_MEMORY, Bar, check_folder, complain, parse, plain, read_record, unusable
from iclora.config import SampleConfig
from iclora.knobs import saved

if TYPE_CHECKING:  # torch loads after the command line was found to be right
    from iclora.pipeline import Plan, Result

HASHED = 10**9  # bytes; larger files of weights are recorded by name and size only


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns the exit status: 0 done, 2 a mistake (one line on stderr), 130 interrupted."""
    try:
        run(parse(SampleConfig, argv, __doc__))
    except SystemExit:  # after --help
        return 0
    except KeyboardInterrupt:
        return complain("interrupted; pictures that were finished are saved", 130)
    except (ValueError, OSError) as error:
        return complain(str(error), 2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not NO_MEMORY.search(str(error)):
            raise
        return complain("memory ran out; try a smaller --panel-size, fewer panels or --ref, --tile or --device cpu", 2)
    return 0


def run(config: SampleConfig) -> None:
    """Makes the pictures that are asked for and saves each as soon as it is finished."""
    folder = Path(config.out)
    check_folder(folder)
    from iclora.pipeline import Pipeline, resolve

    notes: list[str] = []
    plan = resolve(config, notes.append)  # a mistake is one line, without notes before it
    for line in notes:
        note(line)
    record = describe(plan)
    if config.config:
        compare(record, read_record(config.config), config.config)
    pipeline = Pipeline(plan, note)
    for number in range(plan.config.num):
        seed = plan.config.seed + number
        with Bar(f"picture {number + 1} of {plan.config.num}") as bar:
            result = pipeline.sample(seed, bar)
        for path in save(result, plan, seed, record, folder):
            print(os.fsencode(path).decode(errors="backslashreplace"))


def describe(plan: "Plan") -> dict[str, Any]:
    """Lists what made the pictures besides the configuration, to be compared on replay."""
    import torch

    from model.lora_formats import lora_file

    files = [fingerprint(path, plan.files.root) for path in plan.weights]
    for path, strength in plan.loras:
        file = lora_file(path)
        files.append({**fingerprint(file, file.parent), "strength": strength})
    versions = {name: version(name) for name in ("torch", "transformers", "pillow")}
    versions |= {"python": platform.python_version(), "threads": torch.get_num_threads()}
    versions["gpu"] = torch.cuda.get_device_name() if plan.config.device == "cuda" else None
    used = [(panel, "draft" if source.drafted else "kept", source) for panel, source in plan.sources.items()]
    used += [(None, "reference", source) for source in plan.references]
    return {
        "model": {"name": plan.files.name, "defaults": plan.row.name, "files": files},
        "inputs": [
            {"panel": panel, "use": use, "file": str(source.path), "sha256": source.sha256}
            for panel, use, source in used
        ],
        "versions": versions,
    }


def fingerprint(path: Path, root: Path) -> dict[str, Any]:
    """Gives the name in the model's folder, the size and, up to 1 GB, the sha256 of a file."""
    name, size = path.relative_to(root).as_posix(), path.stat().st_size
    if size > HASHED:
        return {"file": name, "bytes": size, "sha256": None}
    with open(path, "rb") as file:
        return {"file": name, "bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def compare(record: dict[str, Any], old: dict[str, Any], name: str) -> None:
    """Notes where a replay starts from other pictures, weights or versions than the recorded run."""

    def hashes(record: dict[str, Any]) -> list[tuple]:
        return [(entry["panel"], entry["sha256"]) for entry in record["inputs"]]

    try:
        others = {
            "pictures": hashes(old) != hashes(record),
            "weights": old["model"]["files"] != record["model"]["files"],
            "versions or threads": old["versions"] != record["versions"],
        }
    except (KeyError, TypeError, AttributeError):
        others = {"things, as it is not a whole record": True}
    if changed := [what for what, differs in others.items() if differs]:
        note(f"the result may differ from {name}, which was made with other {' and other '.join(changed)}")


def save(result: "Result", plan: "Plan", seed: int, record: dict[str, Any], folder: Path) -> list[Path]:
    """Saves one set under the next free number: composite, generated panels, JSON; all of them or none.

    returns: the paths
    Errors: ValueError if the folder cannot be written
    """
    config = replace(plan.config, seed=seed, num=1)
    text = {"prompt": config.prompt, "config": json.dumps({"model": plan.files.name, **saved(config, paths=False)})}
    record = {"config": saved(config), **record, "seconds": dict(result.seconds)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = os.listdir(folder)
    except OSError as error:
        raise unusable(folder, error) from None
    taken = [int(found[1]) for name in names if (found := re.match(r"(\d{4,9})[.-]", name))]
    for number in count(max(taken, default=0) + 1):
        try:
            return save_as(f"{number:04d}", result, text, record, folder)
        except FileExistsError:  # another process was faster
            continue
    raise ValueError(f"{folder} has no free number")


def save_as(stem: str, result: "Result", text: dict[str, str], record: dict[str, Any], folder: Path) -> list[Path]:
    """Saves one set under a given number. The composite is first, so it reserves the number.

    Errors: FileExistsError if a name is taken, ValueError if the folder cannot be written; no file is left then
    """
    from sampling.images import save_png, write_new

    names = {panel: f"{stem}-panel-{panel}.png" for panel in result.panels}
    record = {**record, "outputs": {"composite": f"{stem}.png", "panels": names}}
    written: list[Path] = []
    try:
        for name, picture in ((f"{stem}.png", result.composite), *((names[p], result.panels[p]) for p in names)):
            save_png(picture, folder / name, text)
            written.append(folder / name)
        write_new(folder / f"{stem}.json", (json.dumps(record, indent=2) + "\n").encode())
        return [*written, folder / f"{stem}.json"]
    except BaseException:  # Ctrl-C included
        for path in written:
            path.unlink(missing_ok=True)
        raise


def note(line: str) -> None:
    """Tells the user something that is no mistake."""
    print(f"note: {plain(line)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
