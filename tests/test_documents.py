"""Documents are checked: commands parse, files that are named exist, presets build."""

import re
import shlex
from pathlib import Path

import pytest

import sample
from iclora.cli import parse
from iclora.config import SampleConfig
from iclora.prompts import TASKS, preset
from toybox import pretrain, report, train_truth

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "weights" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"python sample\.py[^\n#`]*")


def commands(path):
    return [match.strip() for match in COMMAND.findall(path.read_text()) if "--help" not in match]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_sampling_command_parses(path):
    for command in commands(path):
        argv = shlex.split(command)[2:]
        if "--config" not in argv:
            parse(SampleConfig, argv, "")


def test_the_readme_has_commands_to_check():
    assert len(commands(ROOT / "README.md")) >= 6
    assert commands(ROOT / "README.md")[0] == "python sample.py --grid 2x2 --mask 3"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_that_is_named_exists(path):
    text = path.read_text()
    named = re.findall(r"`((?:model|sampling|iclora|toybox|tests|docs|weights/tiny)/[\w./-]*\w)`", text)
    named += re.findall(r'(?:src="|\]\()([\w./-]+\.(?:png|md|py))', text)
    missing = [name for name in named if not (ROOT / name).exists() and not (path.parent / name).exists()]
    assert not missing


def test_functions_named_in_the_method_exist():
    rows = re.findall(r"`([\w/]+\.py)` `([\w.]+)`", (ROOT / "docs" / "method.md").read_text())
    assert len(rows) > 10
    for file, name in rows:
        assert re.search(rf"\b(def|class) {name.split('.')[-1]}\b", (ROOT / file).read_text()), f"{file} {name}"


def test_the_map_names_every_module():
    text = (ROOT / "README.md").read_text()
    modules = [p.name for folder in ("model", "sampling", "iclora") for p in (ROOT / folder).glob("[a-z]*.py")]
    assert not [name for name in modules if name not in text]


@pytest.mark.parametrize("name", TASKS)
def test_every_preset_builds(name):
    assert parse(SampleConfig, ["--preset", name], "").preset == name and preset(name) is TASKS[name]


@pytest.mark.parametrize("main", [sample.main, pretrain.main, report.main, train_truth.main])
def test_help_is_printed(main, capsys):
    try:
        status = main(["--help"])
    except SystemExit as stop:
        status = stop.code
    assert status == 0 and "--out" in capsys.readouterr().out


def test_requirements_pin_every_package_that_is_imported():
    pinned = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}
    assert {"torch", "safetensors", "einops", "sentencepiece", "transformers", "numpy", "pillow", "pytest"} <= pinned
