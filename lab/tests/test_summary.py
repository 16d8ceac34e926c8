"""The page of results: what it says is read from values, and what was not run is not claimed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lab import judge, judge_text, judge_uno, pages, summary
from lab.arms import EXPERIMENTS
from lab.scores import above_chance, difference, interval, percent
from lab.summary import Headline, Row

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "lab" / "results", ROOT / "docs" / "results.md"
RIGHT, HALF = [1, 1, 1, 0] * 5, [1, 0, 0, 0] * 5


def write(folder, base="this", **more):
    """Values of two arms, one of them trained twice, on two tasks."""
    figures = {"look": RIGHT, "look, no references": HALF}
    other = {"look": [None, *HALF[1:]], "look, no references": HALF}
    rows = [
        {"task": "one", "name": pages.TRUE, "figures": [{"look": [1] * 20}]},
        {"task": "one", "name": "new", "figures": [figures, {**figures, **more}]},
        {"task": "one", "name": "old", "figures": [other]},
        {"task": "two", "name": "new", "figures": [figures]},
    ]
    (folder / "made-up.json").write_text(json.dumps({"base": base, "rows": rows}))
    return folder / "made-up.json"


def test_the_committed_page_is_what_is_written_from_the_values():
    text = PAGE.read_text()
    assert text == summary.page(RESULTS, pages.base_mark("tiny")), "run python -m lab.summary"
    assert text.count("\n") <= 120
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links and not [link for link in links if not (PAGE.parent / link).exists()]


def test_every_experiment_has_a_line():
    assert sorted([*summary.ROWS, *summary.OLD]) == sorted([*EXPERIMENTS, "base"])


def test_an_answer_has_eight_words_at_most():
    answers = [row.answer for row in summary.ROWS.values()] + [cells[3] for cells in summary.OLD.values()]
    assert not [answer for answer in answers if len(answer.split()) > 8]


TRAITS = {f"{trait}, {given}" for trait in judge.FIGURES for given in judge.GIVEN}
FIGURES = {  # that judges tell, as far as there are headlines of them
    "in-context": {*judge.SUCCESS}, "silent": TRAITS, "kept": TRAITS, "text": {*judge_text.NAMES},
    "uno": {"right", *judge_uno.CONTROLLED, *(f"{f}, no references" for f in ("right", *judge_uno.CONTROLLED))},
}  # fmt: skip


def test_headlines_name_arms_tasks_and_figures_that_there_are():
    for name, row in summary.ROWS.items():
        for told in (row.headline, *row.more) if name != "base" else ():
            arms = {(arm.task, arm.name) for arm in EXPERIMENTS[name].arms}
            assert {(told.task, arm) for arm in (told.arm, told.against or told.arm)} <= arms, name
            assert {told.figure, told.none or told.figure} <= FIGURES[EXPERIMENTS[name].judge.name], name


def test_the_claims_of_the_readme_are_headlines():
    claims = re.findall(r"\| ([\d.]+) \| ([\d.]+ to [\d.]+) \| \[([\w-]+)\]", (ROOT / "README.md").read_text())
    lines = {line.split("]")[0].strip("| ["): line for line in PAGE.read_text().splitlines()}
    assert len(claims) == 6
    for share, bounds, name in claims:
        assert f" {share} ({bounds})" in lines[name], name


def test_headlines_are_read_from_the_values_of_all_trainings(tmp_path):
    path, both = write(tmp_path, look=HALF), [RIGHT, HALF]
    assert summary.headline(path, Headline("two", "new", "look")) == f"new, two: look {percent(interval(RIGHT))}"
    assert summary.headline(path, Headline("one", "new", "look")) == f"new, one: look {percent(interval(both))}"
    other = [np.nan, *HALF[1:]]
    assert summary.headline(path, Headline("one", "new", "look", against="old")) == (
        f"new, one: look {percent(interval(both))}; minus old {percent(difference(both, [other]), '+')}"
    )
    share = percent(above_chance(both, [HALF, HALF], [1] * 20))
    found = summary.headline(path, Headline("one", "new", "look", none="look, no references"))
    assert found == f"new, one: look, above chance {share}" and share.startswith("33.3 (")


@pytest.mark.parametrize("told", [Headline("one", "new", "face"), Headline("one", "gone", "look")])
def test_a_headline_that_values_lack_is_refused_by_name(told, tmp_path):
    with pytest.raises(ValueError, match=f"made-up.json has no figure '{told.figure}' of '{told.arm}' in 'one'"):
        summary.headline(write(tmp_path), told)


def test_what_was_run_on_another_base_or_never_is_not_claimed(tmp_path, monkeypatch):
    row = Row("Is new better?", Headline("two", "new", "look"), "Yes.", "75.0; agrees")
    monkeypatch.setattr(summary, "ROWS", {"made-up": row, "later": Row("What then?", Headline("", "", ""))})
    write(tmp_path)
    text = summary.page(tmp_path, "this")
    line = next(line for line in text.splitlines() if "Is new better?" in line)
    figure = percent(interval(RIGHT))
    assert line == (
        "| [made-up](../lab/results/made-up.md) | Is new better? | new, old | "
        f"new, two: look {figure} | Yes. | 75.0; agrees |"
    )
    assert "- later: What then?" in text and text.count("| rank |") == 1
    assert "- made-up: Is new better?" in summary.page(tmp_path, "another") and "75.0" in text
    assert figure not in summary.page(tmp_path, "another")
    monkeypatch.setattr(summary, "OTHER", "made-up")  # what is to run on another base
    assert "- made-up: Is new better?" in summary.page(tmp_path, "this")
    assert "## On this base" not in (text := summary.page(tmp_path, "another")) and figure in text


def test_the_page_is_written_where_it_is_asked_for(tmp_path):
    assert summary.main(["--results", str(tmp_path), "--out", str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text()
    assert all(f"- {name}: " in text for name in summary.ROWS) and "## On this base" not in text
