"""Ask a vision-language model behind an OpenAI-compatible endpoint, through the openai client.

That client repeats what met a busy or a broken server, and waits as long as the server says, up to two minutes. What it
does not do stands here: no redirect takes the key elsewhere, no answer is read without end, and nothing is believed.
"""

import base64
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from PIL import Image

from sampling.images import to_png

try:
    import httpx2  # the HTTP client of openai
    import openai
except ImportError:
    openai = None

KEYS = "ICLORA_API_KEY", "OPENAI_API_KEY"  # environment variables, the first that is set
MAX_ANSWER = 4_000_000  # bytes of JSON
MAX_SIDE = 1024  # pixels of the longer side of a picture that is sent
Message = tuple[str, str, tuple[Image.Image, ...]]  # role, text, pictures
Item, Result = TypeVar("Item"), TypeVar("Result")


class EndpointError(ValueError):
    """An endpoint that will not answer the next question either: it is down, or refuses the key."""


@dataclass(frozen=True)
class Answer:
    """What was said, and its cost in tokens; 0 where the endpoint does not tell."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass
class Chat:
    """A model behind an endpoint; may be asked from several threads at once.

    endpoint: its address up to /v1
    timeout: seconds for one attempt
    attempts: how often a question is sent before it counts as failed
    Errors: ValueError for an address or a name that cannot work, a key that is none, or if openai is not installed
    """

    endpoint: str
    model: str
    timeout: float = 120
    attempts: int = 5
    _key: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        if openai is None:
            raise ValueError("chat endpoints need the openai client; install it with `pip install 'openai>=3'`")
        _check_address(self.endpoint)
        if not self.model.strip() or not self.model.isprintable():
            raise ValueError(f"{ascii(self.model[:40])} names no model; give a name from {self.endpoint}/models")
        self._key = next(filter(None, (os.environ.get(name, "").strip() for name in KEYS)), "")
        if not self._key.isascii() or not self._key.isprintable():
            raise ValueError(f"the key in ${KEYS[0]} or ${KEYS[1]} is none, as it holds odd characters; set it again")
        http = httpx2.Client(transport=Gate(self.timeout), timeout=self.timeout, trust_env=False)
        self._client = openai.OpenAI(
            base_url=self.endpoint,
            api_key=self._key or "none",  # servers of one's own ask for none, the client insists
            timeout=self.timeout,
            max_retries=self.attempts - 1,
            http_client=http,
        )

    def ask(self, messages: Sequence[Message]) -> Answer:
        """Send a conversation and wait for what is said next.

        Errors: EndpointError if every other question would fail as well; else ValueError, one line, without the key
        """
        conversation = [{"role": role, "content": _content(text, pictures)} for role, text, pictures in messages]
        try:
            raw = self._client.chat.completions.with_raw_response.create(model=self.model, messages=conversation)
        except openai.APITimeoutError:
            seconds = f"{self.timeout:g} s, {self.attempts} times"
            raise ValueError(f"{self.endpoint} did not answer within {seconds}; try again, or fewer at once") from None
        except openai.APIConnectionError as error:
            line = f"{self.endpoint} cannot be reached ({self._shown(error.__cause__)}); is it running?"
            raise (EndpointError if isinstance(error.__cause__, httpx2.ConnectError) else ValueError)(line) from None
        except openai.APIStatusError as error:
            raise self._refusal(error.status_code, error.body) from None
        return self._read(raw.http_response.content)

    def _read(self, content: bytes) -> Answer:
        """Take the text out of an answer. Errors: ValueError if it has none, or only the beginning of one"""
        try:
            data = json.loads(content)
            choice, usage = data["choices"][0], data.get("usage")
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            text = reason = usage = None
        if not isinstance(text, str) or not text.strip():
            shown = self._shown(content[:200].decode(errors="replace"))
            raise ValueError(f"{self.endpoint} gave no answer of a chat model ({shown}); does its address end in /v1?")
        if reason == "length":
            raise ValueError(f"{self.endpoint} cut its answer off; let {self.model} write more tokens")
        return Answer(self._without_key(text), _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))

    def _refusal(self, status: int, body: Any) -> ValueError:
        """Put an HTTP status into words."""
        fatal = {
            401: f"refuses the key; set ${KEYS[0]}",
            403: f"refuses the key; set ${KEYS[0]}",
            404: f"has no such address, or no model {self.model}; addresses mostly end in /v1",
        }
        if 300 <= status < 400:
            return EndpointError(f"{self.endpoint} redirects, which is not followed; give the address it leads to")
        if status in fatal:
            return EndpointError(f"{self.endpoint} {fatal[status]} (status {status})")
        said = body.get("message") if isinstance(body, dict) else body
        return ValueError(f"{self.endpoint} answered with status {status} ({self._shown(said)}); try again later")

    def _shown(self, said: Any) -> str:
        """Make one short line of what a server said."""
        line = " ".join(self._without_key(str(said)[:1000]).split())
        return ascii(line)[1:-1][:120] or "nothing"

    def _without_key(self, text: str) -> str:
        """Take out the key, which a server may repeat, and what is no UTF-8; shorter words than 8 are no secrets."""
        text = text.encode(errors="replace").decode()
        return text.replace(self._key, "[key]") if len(self._key) >= 8 else text


class Gate:
    """The transport of all requests: reads answers up to a size and a time, and none that are compressed."""

    def __init__(self, timeout: float):
        self.timeout, self.transport = timeout, httpx2.HTTPTransport(trust_env=False)

    def handle_request(self, request: "httpx2.Request") -> "httpx2.Response":
        """Send a request and read its answer whole.

        Errors: ValueError for an answer too large or compressed, which may be any size; as httpx2's transport else
        """
        end, body = time.monotonic() + self.timeout, bytearray()
        request.headers["Accept-Encoding"] = "identity"
        response = self.transport.handle_request(request)
        try:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise ValueError(
                    "the endpoint's answer is compressed, although it was not to be; is it another server?"
                )
            for chunk in response.stream:
                body += chunk
                if len(body) > MAX_ANSWER:
                    raise ValueError(
                        f"the endpoint's answer has more than {MAX_ANSWER // 10**6} MB; is it a chat model?"
                    )
                if time.monotonic() > end:  # a byte now and then would keep each single read in time
                    raise httpx2.ReadTimeout("the answer took too long", request=request)
        finally:
            response.close()
        return httpx2.Response(response.status_code, headers=response.headers, content=bytes(body))

    def close(self) -> None:
        """Close all connections."""
        self.transport.close()


def ask_all(chat: Chat, conversations: Iterable[Sequence[Message]], at_once: int) -> Iterator[tuple[int, Any]]:
    """Ask several questions at a time. Yields as in_parallel does, with an Answer each"""
    return in_parallel(chat.ask, conversations, at_once)


def in_parallel(
    work: Callable[[Item], Result], items: Iterable[Item], at_once: int
) -> Iterator[tuple[int, Result | ValueError | OSError]]:
    """Do a few things at a time, each in a thread; an item is taken when there is room for it.

    Yields the index of an item and its result, or why there is none, in the order in which they are done
    Errors: whatever else the work raises, which is a bug
    """
    done: queue.SimpleQueue = queue.SimpleQueue()
    numbered, running = enumerate(items), 0

    def run(index: int, item: Item) -> None:
        try:
            done.put((index, work(item)))
        except BaseException as error:
            done.put((index, error))

    while True:
        for index, item in islice(numbered, at_once - running):
            threading.Thread(target=run, args=(index, item), daemon=True).start()  # Ctrl-C waits for none of them
            running += 1
        if not running:
            return
        index, result = done.get()
        running -= 1
        if isinstance(result, BaseException) and not isinstance(result, ValueError | OSError):
            raise result
        yield index, result


def _check_address(endpoint: str) -> None:
    """Refuse an address that cannot work. Errors: ValueError, which does not repeat what may be a secret"""
    if "@" in endpoint or "?" in endpoint:
        raise ValueError(f"the endpoint's address holds @ or ?, perhaps a key; that belongs into ${KEYS[0]}")
    try:
        url = httpx2.URL(endpoint)
    except httpx2.InvalidURL:
        url = httpx2.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"endpoint {ascii(endpoint[:80])} is no address; write http://HOST:PORT/v1, or https://...")


def _content(text: str, pictures: Sequence[Image.Image]) -> str | list[dict[str, Any]]:
    """Write a message as the protocol has it: the text alone, or pictures as data URLs and the text behind them."""
    if not pictures:
        return text
    parts = []
    for picture in pictures:
        picture = picture.copy()
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        url = "data:image/png;base64," + base64.b64encode(to_png(picture)).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [*parts, {"type": "text", "text": text}]


def _count(usage: Any, name: str) -> int:
    """Read a number of tokens, 0 for whatever is none."""
    value = usage.get(name) if isinstance(usage, dict) else 0
    return value if type(value) is int and 0 <= value < 10**9 else 0
