"""Documents are checked: commands parse, files and functions that are named exist, placeholders are marked."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from test_budgets import ENTERED, READING

import sample
import train
from iclora.cli import parse
from iclora.config import SampleConfig, TrainConfig
from lab import experiments, pretrain, report, summary, train_truth

ROOT = Path(__file__).parents[2]
README, METHOD = ROOT / "README.md", ROOT / "docs" / "method.md"
NAMES = ["README.md", "CONTRIBUTING.md", "weights/README.md", "lab/README.md"]
PAGES = [path for folder in ("docs", "lab/results") for path in sorted((ROOT / folder).glob("*.md"))]
DOCUMENTS = [*(ROOT / name for name in NAMES), *PAGES]
CONFIGS = {"sample.py": SampleConfig, "train.py": TrainConfig}
SET_UP = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
FILES = {"panels", "set", "ref", "lora", "init-lora", "data", "config", "jobs"}  # options that read what a user has
MADE = ("runs/", "out/", "jobs.jsonl")  # made by another command of the same document
FOLDERS = "model|sampling|iclora|lab|tests|docs|examples|sets|weights/tiny"


def commands(path, script):
    """What documents tell to type, from the script's name on; also behind torchrun."""
    lines = re.findall(rf"(?:python|torchrun [^\n`]*?) {re.escape(script)}([^\n#`]*)", path.read_text())
    return [(script + flags).strip() for flags in lines if "--help" not in flags]


def files_of(command):
    """What a command reads: the values of options that take files, with their names in the command."""
    option, files = "", []
    for word in shlex.split(command)[1:]:
        if word.startswith("--"):
            option = word[2:]
        elif option in FILES:
            files.append(word)
    return files


def is_there(name):
    return name.startswith("YOURS") or name.startswith(MADE) or (ROOT / name.split(":")[0]).exists()


@pytest.mark.parametrize("script", CONFIGS)
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_parses(path, script):
    for command in commands(path, script):
        argv = shlex.split(command)[1:]
        if "--config" not in argv:
            parse(CONFIGS[script], argv, "")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_command_reads_is_there_or_made_before_or_marked_as_the_readers_own(path):
    if path.name == "log.md":
        return  # tells of what was typed once
    text = path.read_text()
    for command in commands(path, "sample.py") + commands(path, "train.py"):
        missing = [name for name in files_of(command) if not is_there(name)]
        assert not missing, command
    assert "YOURS" not in text or re.search(r"`YOURS[\w.]*` (?:stands?|is)\b", text), "say what YOURS stands for"
    for run in re.findall(r"(?<=[ :])(runs/[\w-]+)/lora\.safetensors", text):
        assert f"--out {run}\n" in text or f"--out {run} " in text, f"no command makes {run}"


def test_a_placeholder_that_is_not_marked_would_be_noticed():
    assert files_of("sample.py --ref hat.png cat.png --mask 2 --lora a.safetensors:0.5") == [
        *("hat.png", "cat.png", "a.safetensors:0.5")
    ]
    assert not is_there("hat.png") and is_there("YOURS.png") and is_there("sets/walk")
    assert is_there("weights/tiny/loras/walk.safetensors:0.8")


def test_the_readme_begins_with_three_commands_that_make_the_picture_pass_the_tests_and_follow_a_reference():
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks[0] == f"{SET_UP}python sample.py --grid 2x2 --mask 3\n"
    assert blocks[1] == f"{SET_UP}python -m pytest\n"
    assert blocks[2].startswith("python sample.py --ref weights/tiny/")
    assert commands(README, "train.py")[0] == "train.py --data sets/walk --out runs/walk"


def test_the_readme_is_short_and_in_order():
    text = README.read_text()
    assert len(text.split()) <= 2000 and text.count("\n") <= 170
    order = ["Run it", "Read it", "Tweak it", "Train it", "Real FLUX.1", "How good", "How do we know", "Contributing"]
    headings = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert [next((n for n in order if h.startswith(n)), h) for h in headings] == order
    assert text.index("overview.png") < text.index("## Run it")


def test_the_readme_tells_how_long_its_nine_files_are():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README.read_text(), re.MULTILINE)
    assert len(rows) == 9
    for name, lines in rows:
        assert int(lines) == pytest.approx((ROOT / name).read_text().count("\n"), rel=0.1), name


def test_every_tweak_ends_in_a_test_and_names_what_is_there():
    table = README.read_text().split("## Tweak it")[1].split("## ")[0]
    rows = [row.split("|")[1:-1] for row in table.splitlines() if row.startswith("| ") and "to change" not in row]
    assert len(rows) >= 8
    for _, edit, tests in rows:
        assert "tests/" in tests
        path, *names = re.findall(r"`([^`]+)`", edit)
        assert names
        for name in names:
            assert re.search(rf"(?:def |class |^){name}\b", (ROOT / path).read_text(), re.MULTILINE), f"{path} {name}"


@pytest.mark.parametrize("script", [sample, train], ids=lambda script: script.__name__)
def test_every_command_in_a_scripts_own_help_parses(script):
    lines = re.findall(rf"{script.__name__}\.py (-[^\n]*?)(?:   |\n)", script.__doc__)
    assert len(lines) >= 4
    for flags in lines:
        argv = shlex.split(flags)
        if "--config" not in argv:
            parse(CONFIGS[f"{script.__name__}.py"], argv, "")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_that_is_named_exists(path):
    text = path.read_text()
    names = [name for name in re.findall(r"`([^`\n]+)`", text) for name in name.split()]
    names = [name for name in names if re.fullmatch(rf"(?:{FOLDERS})/[\w./-]*\w", name)]
    names += re.findall(r'(?:src="|\]\()([\w./, -]+\.(?:png|jpg|md|py))', text)
    missing = [name for name in names if not (ROOT / name).exists() and not (path.parent / name).exists()]
    assert path.name == "log.md" or not missing  # the log tells of files as they were called then


def test_functions_named_in_the_method_exist():
    rows = re.findall(r"`([\w/]+\.py)`\s+`([\w.]+)`", METHOD.read_text())
    assert len(rows) > 30
    for file, name in rows:
        text, parts = (ROOT / file).read_text(), name.split(".")
        for part in parts:
            assert re.search(rf"\b(def|class) {part}\b", text), f"{file} {name}"


def test_the_map_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    modules = [p.name for folder in ("model", "sampling", "iclora") for p in (ROOT / folder).glob("[a-z]*.py")]
    assert not [name for name in modules if not re.search(rf"\b{name}", text)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_that_are_run_exist(path):
    for name in re.findall(r"python -m ((?:lab|iclora|examples)[\w.]*)", path.read_text()):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_contributing_tells_the_budgets_that_are_enforced():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for lines in (ENTERED, READING):
        assert f"at most {lines:,}" in text


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"test", "test-core", "lint", "lab"} <= targets
    for path in ("CONTRIBUTING.md", ".ci/run", ".github/workflows/test.yml"):
        named = re.findall(r"(?<=[`: ])make ([\w-]+)|^make ([\w-]+)", (ROOT / path).read_text(), re.MULTILINE)
        assert named and {first or second for first, second in named} <= targets, path


@pytest.mark.parametrize("entry", [sample, train, pretrain, report, train_truth, experiments, summary])
def test_help_is_printed(entry, capsys):
    try:
        status = entry.main(["--help"])
    except SystemExit as stop:
        status = stop.code
    assert status == 0 and "--out" in capsys.readouterr().out


def test_what_is_needed_at_run_time_is_pinned_too():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w-]+", line).group() for line in project["dependencies"]}
    pins = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}
    expected = {
        "torch",
        "safetensors",
        "einops",
        "numpy",
        "pillow",
        "sentencepiece",
        "protobuf",
        "transformers",
        "tqdm",
    }
    assert needed == expected and needed | {"hypothesis", "openai", "pytest", "pytest-xdist", "ruff"} == pins
    assert not [line for line in project["dependencies"] if "==" in line]
