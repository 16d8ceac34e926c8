"""Documents are checked: commands parse, files that are named exist, presets build."""

import re
import shlex
from pathlib import Path

import pytest

import sample
import train
from iclora.cli import parse
from iclora.config import SampleConfig, TrainConfig
from iclora.prompts import TASKS, preset
from lab import experiments, pretrain, report, train_truth

ROOT = Path(__file__).parents[2]
MARKDOWN = [*(ROOT / "docs").glob("*.md"), *(ROOT / "lab").rglob("*.md")]
DOCUMENTS = [ROOT / "README.md", ROOT / "weights" / "README.md", *sorted(MARKDOWN)]
CONFIGS = {"sample.py": SampleConfig, "train.py": TrainConfig}


def commands(path, script):
    """What documents tell to type, from the script's name on; also behind torchrun."""
    found = re.findall(rf"(?:python|torchrun [^\n`]*?) {re.escape(script)}([^\n#`]*)", path.read_text())
    return [(script + flags).strip() for flags in found if "--help" not in flags]


@pytest.mark.parametrize("script", CONFIGS)
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_parses(path, script):
    for command in commands(path, script):
        argv = shlex.split(command)[1:]
        if "--config" not in argv:
            parse(CONFIGS[script], argv, "")


def test_the_readme_has_commands_to_check():
    sampling, training = (commands(ROOT / "README.md", script) for script in CONFIGS)
    assert len(sampling) >= 6 and sampling[0] == "sample.py --grid 2x2 --mask 3"
    assert len(training) >= 3 and training[0] == "train.py --data sets/ --rank 16"


@pytest.mark.parametrize("script", [sample, train], ids=lambda script: script.__name__)
def test_every_command_in_a_scripts_own_help_parses(script):
    found = re.findall(rf"{script.__name__}\.py (-[^\n]*?)(?:   |\n)", script.__doc__)
    assert len(found) >= 4
    for flags in found:
        argv = shlex.split(flags)
        if "--config" not in argv:
            parse(CONFIGS[f"{script.__name__}.py"], argv, "")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_that_is_named_exists(path):
    text = path.read_text()
    named = re.findall(r"`((?:model|sampling|iclora|lab|tests|docs|weights/tiny)/[\w./-]*\w)`", text)
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


@pytest.mark.parametrize("entry", [sample, train, pretrain, report, train_truth, experiments])
def test_help_is_printed(entry, capsys):
    try:
        status = entry.main(["--help"])
    except SystemExit as stop:
        status = stop.code
    assert status == 0 and "--out" in capsys.readouterr().out


def test_requirements_pin_every_package_that_is_imported():
    pinned = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}
    assert {"torch", "safetensors", "einops", "sentencepiece", "transformers", "numpy", "pillow", "pytest"} <= pinned
