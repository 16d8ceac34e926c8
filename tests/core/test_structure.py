"""The rules of the house, checked by machine: imports go one way, nothing is unpickled, files stay readable."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"model": set(), "sampling": set(), "iclora": {"model", "sampling"}}
OURS = {*PACKAGES, "lab", "sample", "train"}
READING = sorted(p for folder in PACKAGES for p in (ROOT / folder).rglob("*.py")) + [ROOT / "sample.py"]
SOURCES = READING + [ROOT / "train.py"] + sorted((ROOT / "lab").glob("*.py"))
LONG_FILES = {"lab/world.py"}  # mostly coordinates of drawings


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module if node.level == 0 else "." * (node.level - 1) or "within")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_one_way(path):
    modules = {module.split(".")[0] for module in imported(ast.parse(path.read_text()))}
    assert not modules & {"diffusers", "peft", "accelerate", ""}, "and a relative import stays in its package"
    package = path.relative_to(ROOT).parts[0]
    if package in PACKAGES:
        assert modules & OURS - {package} <= PACKAGES[package]
    if package not in ("lab", "sample.py") and path.name not in ("cli.py",):
        assert "argparse" not in modules, "only iclora/cli.py and the lab's entry points know argparse"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_asserts_bare_excepts_or_pickles(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert not [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert)], "users run python -O; raise ValueError"
    assert not [n.lineno for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.type is None]
    assert not re.search(r"torch\.load\(|pickle\.load|(?<!\.)\beval\(|(?<!\.)\bexec\(", text)


@pytest.mark.parametrize("path", READING, ids=name)
def test_libraries_do_not_print(path):
    if path.name in ("sample.py", "train.py"):
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert text.isascii()
    if name(path) not in LONG_FILES:
        assert text.count("\n") <= 340, "over the budget of 300 lines and some; split it or say why in LONG_FILES"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 75, f"{node.name} is over 75 lines"


def test_the_reading_matter_is_short_enough_to_read():
    # The plan's 3,500 lines held for sampling sets; LoRA dialects, data sets, training of two methods, references and
    # refusing more of what cannot be meant took the rest (docs/log.md).
    lines = sum(p.read_text().count("\n") for p in READING)
    assert lines <= 6960


def test_pixels_become_tensors_in_one_place_only():
    users = {name(p) for p in SOURCES if "127.5" in p.read_text() and not name(p).startswith("lab/")}
    assert users == {"sampling/images.py"}
