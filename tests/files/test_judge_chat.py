"""The judge behind an endpoint: three rounds in one conversation, scores read strictly, once more if they cannot be."""

import pytest
from PIL import Image

from chat_server import pictures, serve, texts
from iclora import chat
from iclora.chat import Answer, Chat
from iclora.judge import MAX_PARTS, ChatJudge, Verdict, read_scores

FIRST, SECOND = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
SAID = ("Both show a fox. Parts: head, scarf.", "The heads agree; the scarf has 3 stripes, then 4.")


class Scripted:
    """Says what it is told to, in turn, and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def ask(self, messages):
        self.asked.append(list(messages))
        return Answer(self.answers.pop(0))


def test_a_pair_is_judged_in_three_rounds_of_one_conversation_that_shows_both_pictures_once():
    model = Scripted(*SAID, "head: 4\nscarf: 1\n")
    verdict = ChatJudge(model)(FIRST, SECOND)
    assert verdict == Verdict({"head": 4, "scarf": 1}, 2.5, (*SAID, "head: 4\nscarf: 1\n"))
    assert [len(messages) for messages in model.asked] == [1, 3, 5]
    last = model.asked[-1]
    assert [role for role, _, _ in last] == ["user", "assistant"] * 2 + ["user"]
    assert [shown for _, _, shown in last] == [(FIRST, SECOND), (), (), (), ()]
    assert (last[1][1], last[3][1]) == SAID


def test_no_round_is_told_to_score_before_the_last_and_written_text_is_a_part():
    model = Scripted(*SAID, "head: 4")
    ChatJudge(model)(FIRST, SECOND)
    look, compare, score = (text for role, text, _ in model.asked[-1] if role == "user")
    assert "written" in look and "Do not judge" in look and "Do not give scores" in compare
    for aside in ("background", "position", "size", "pose", "expression", "viewpoint", "light", "accessories"):
        assert aside in compare
    assert "0 to 4" in score and "one line for each part" in " ".join(score.split())


def test_scores_that_cannot_be_read_are_asked_for_once_more_with_the_reason():
    model = Scripted(*SAID, "I would say 4", "head: 3")
    assert ChatJudge(model)(FIRST, SECOND) == Verdict({"head": 3}, 3.0, (*SAID, "head: 3"))
    assert "'I would say 4' is not a name, a colon and a score" in model.asked[-1][-1][1]
    assert model.asked[-1][-2] == ("assistant", "I would say 4", ())


def test_after_the_second_time_the_pair_has_failed_in_one_line():
    model = Scripted(*SAID, "head: 5", "**head**: four\nhm", "head: 4")
    with pytest.raises(ValueError, match=r"cannot be read, asked twice: '\*\*head\*\*: four' is not") as caught:
        ChatJudge(model)(FIRST, SECOND)
    assert len(model.asked) == 4 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("head: 4", {"head": 4}),
        ("  head: 4  \r\n\n left paw:0\n", {"head": 4, "left paw": 0}),
        ("Schrift \u201eOlé\u201c: 2", {"Schrift \u201eOlé\u201c": 2}),
        ("x" * 80 + ": 1", {"x" * 80: 1}),
        ("\n".join(f"part {n}: 2" for n in range(MAX_PARTS)), {f"part {n}": 2 for n in range(MAX_PARTS)}),
    ],
)
def test_lines_of_names_and_scores_are_read(text, parts):
    assert read_scores(text) == parts


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "\n \n",
            "4",
            "head",
            "head 4",
            "head: ",
            ": 4",
            "  : 4",
            "head: -1",
            "head: 5",
            "head: 3.5",
            "head: 4/4",
        ),
        *("head: 44", "head: four", "head: \u0664", "head: 4.", "a: b: 4", "Scores:\nhead: 4", "head: 4\nhead: 4"),
        *("head: 4\nThe mean is 4", "```\nhead: 4\n```", "x" * 81 + ": 1", "x" * 10**6, "head: 4\x00"),
        "\n".join(f"part {n}: 2" for n in range(MAX_PARTS + 1)),
    ],
    ids=lambda text: repr(text[:30]),
)
def test_anything_else_is_refused_in_a_short_line(text):
    with pytest.raises(ValueError) as caught:
        read_scores(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.skipif(chat.openai is None, reason="needs the extra `factory`: pip install 'openai>=3'")
def test_a_pair_is_judged_by_a_real_endpoint_and_one_that_breaks_is_a_failure_in_one_line():
    with serve(*SAID, "head: 4\nscarf: 3", (200, {}, "<html>")) as endpoint:
        judge = ChatJudge(Chat(endpoint.address, "seer", attempts=1))
        assert judge(FIRST, SECOND).score == 3.5
        with pytest.raises(ValueError, match="gave no whole answer"):
            judge(FIRST, SECOND)
    assert [picture.getpixel((0, 0)) for picture in pictures(endpoint.asked[2])] == [(255, 0, 0), (0, 0, 255)]
    assert len(texts(endpoint.asked[2])) == 5
