"""Whether two pictures show the same subject: judged part by part, in three rounds of one conversation.

Source: arXiv:2504.02160, supplement F: the filter of UNO's data. The prompts are our own.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from .chat import Chat, Message

LOOK = (
    "You see two pictures, which are meant to show the same main subject. Describe the first, then the second, and "
    "what the main subject looks like in each. Then break the subject down into the parts by which it could be told "
    "from others of its kind, such as head, body, clothing, material, colours and pattern. Text that is written on it "
    "is a part of its own. List the parts. Do not judge yet how alike they are."
)
COMPARE = (
    "Now compare the subject of the first picture with that of the second, part by part and in detail. Count and "
    "measure where you can, and say the numbers. Leave aside what may differ between two pictures of one subject: "
    "background, position, size, pose, expression, viewpoint, light, and accessories that were added. Leave out parts "
    "that the viewpoint hides in one of the pictures. Do not give scores yet."
)
SCORE = (
    "Now score every part that you compared with a whole number from 0 to 4: 0 no resemblance, 1 little resemblance, 2 "
    "alike in kind but clearly another, 3 the same but for small differences, 4 virtually indistinguishable. Write one "
    "line for each part, its name, a colon and its score, such as `head: 3` without the quotes, and nothing else."
)
AGAIN = "That cannot be read: {problem}. Write only lines of the form name: score, with a whole number from 0 to 4."
ROUNDS = LOOK, COMPARE, SCORE
LINE = re.compile(r"([^:\n]{1,80}):[ \t]*([0-4])")
MAX_PARTS = 64


@dataclass(frozen=True)
class Verdict:
    """How alike the subjects of two pictures are.

    parts: a score for each part, 0 no resemblance to 4 virtually indistinguishable
    score: their mean
    said: the answers of the rounds, in full
    """

    parts: dict[str, int]
    score: float
    said: tuple[str, ...] = ()


Judge = Callable[[Image.Image, Image.Image], Verdict]  # ValueError for two pictures that cannot be judged


@dataclass(frozen=True)
class ChatJudge:
    """A judge behind an endpoint."""

    chat: Chat

    def __call__(self, first: Image.Image, second: Image.Image) -> Verdict:
        """Judge a pair in three rounds; scores that cannot be read are asked for once more.

        Errors: ValueError if they cannot be read then either, or the endpoint fails
        """
        conversation: list[Message] = []
        said: list[str] = []

        def ask(text: str, pictures: tuple[Image.Image, ...] = ()) -> str:
            conversation.append(("user", text, pictures))
            answer = self.chat.ask(conversation).text
            conversation.append(("assistant", answer, ()))
            return answer

        for text in ROUNDS:
            said.append(ask(text, () if said else (first, second)))
        try:
            parts = read_scores(said[-1])
        except ValueError as error:
            said[-1] = ask(AGAIN.format(problem=error))
            try:
                parts = read_scores(said[-1])
            except ValueError as again:
                raise ValueError(f"the judge's scores cannot be read, asked twice: {again}") from None
        return Verdict(parts, sum(parts.values()) / len(parts), tuple(said))


def read_scores(text: str) -> dict[str, int]:
    """Read lines of `name: score`, and nothing but these.

    Returns the score of every part
    Errors: ValueError for any other line, a part that stands twice, none, or more than MAX_PARTS
    """
    parts: dict[str, int] = {}
    for line in filter(None, map(str.strip, text.split("\n"))):
        if not (found := LINE.fullmatch(line)) or not (name := found[1].strip()):
            raise ValueError(f"{ascii(line[:60])} is not a name, a colon and a score of 0 to 4")
        if name in parts:
            raise ValueError(f"{ascii(name)} is scored twice")
        parts[name] = int(found[2])
    if not 0 < len(parts) <= MAX_PARTS:
        raise ValueError(f"it scores {len(parts)} parts, not 1 to {MAX_PARTS}")
    return parts
