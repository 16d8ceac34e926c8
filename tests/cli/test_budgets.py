"""The two enforced budgets, counted without docstrings, comments and blank lines: what the first command enters, and
what there is to read. They go down, not up.
"""

import ast
import io
import json
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENTERED, READING = 1396, 4496  # asked for: 1,050 and 3,200; docs/log.md says what stands in the way
FORMS = ("model/lora_formats.py", "model/lora_kinds.py", "model/checkpoint_forms.py", "iclora/data_forms.py")
FACTORY = tuple(f"iclora/{name}.py" for name in "chat judge caption evaluate lists backbones intervals".split())
CARDS = (  # large models on small cards
    *(f"model/{name}.py" for name in "tables quantize compiled offload loading".split()),
    *(f"iclora/{name}.py" for name in "ahead fitted cards sizes flops shards".split()),
)
OURS = {str(ROOT), *(str(ROOT / folder) for folder in ("model", "sampling", "iclora", "examples", "lab"))}
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
TRACE = """
import json, sys
calls = set()
def profile(frame, event, argument):
    if event == "call":
        calls.add((frame.f_code.co_filename, frame.f_code.co_firstlineno, frame.f_code.co_name))
sys.setprofile(profile)
import sample
status = sample.main(sys.argv[1:])
sys.setprofile(None)
print(json.dumps([status, sorted(calls)]))
"""


def code_lines(source):
    """The numbers of the lines that hold code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def entered(path, calls):
    """The code lines of the functions of a file that were called, each once, from decorator to end."""
    lines = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if {(first, node.name), (node.lineno, node.name)} & calls:
                lines |= set(range(first, node.end_lineno + 1))
    return lines & code_lines(path.read_text())


@pytest.mark.slow
def test_the_first_command_enters_few_lines(tmp_path):
    command = [sys.executable, "-c", TRACE, "--grid", "2x2", "--mask", "3", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    status, calls = json.loads(done.stdout.splitlines()[-1])
    assert status == 0
    counts = {}
    for name in {file for file, _, _ in calls if str(Path(file).parent) in OURS}:
        called = {(line, function) for file, line, function in calls if file == name}
        counts[str(Path(name).relative_to(ROOT))] = len(entered(Path(name), called))
    shown = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]) if count)
    assert 500 < sum(counts.values()) <= ENTERED, shown
    assert not [name for name, n in counts.items() if n and (name.startswith("lab/") or name in CARDS)]


def count(names):
    """The code lines of files, in all, and each for a message."""
    counts = {name: len(code_lines((ROOT / name).read_text())) for name in names}
    return sum(counts.values()), ", ".join(
        f"{name} {n}" for name, n in sorted(counts.items(), key=lambda item: -item[1])
    )


def test_the_reading_matter_is_short_enough_to_read():
    paths = [path for folder in ("model", "sampling", "iclora") for path in (ROOT / folder).glob("*.py")]
    names = {str(path.relative_to(ROOT)) for path in [*paths, ROOT / "sample.py", ROOT / "train.py"]}
    total, shown = count(names - {*FORMS, *FACTORY, *CARDS})
    assert total <= READING, shown


def test_what_reads_other_peoples_files_has_a_budget_of_its_own():
    total, shown = count(FORMS)
    assert total <= 900, shown


def test_so_has_what_fits_large_models_on_small_cards():
    total, shown = count(CARDS)
    assert total <= 900, shown


def test_so_has_the_factory():
    total, shown = count([*FACTORY, *(str(p.relative_to(ROOT)) for p in ROOT.glob("iclora/curate/*.py"))])
    assert total <= 1400, shown


def test_docstrings_comments_and_blank_lines_do_not_count():
    source = '"""Doc."""\n\n# why\ndef f(x):\n    """Doc.\n\n    x: (B,)\n    """\n    return x  # trap\n'
    assert code_lines(source) == {4, 9}
