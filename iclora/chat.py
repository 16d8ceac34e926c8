"""Ask a vision-language model behind an OpenAI-compatible endpoint, through the openai client.

That client repeats what met a busy or a broken server, and waits as long as the server says, up to two minutes. What it
does not do stands here: no redirect takes the key elsewhere, no answer is read without end, and nothing is believed.
"""

import base64
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from PIL import Image

from sampling.images import to_png

from .cli import plain

try:
    import httpx2  # the HTTP client of openai
    import openai
except ImportError:
    openai = None

KEYS = "ICLORA_API_KEY", "OPENAI_API_KEY"  # environment variables, the first that is set
MAX_ANSWER = 4_000_000  # bytes of JSON
FATAL = {  # what the next question would meet as well
    **dict.fromkeys(range(300, 400), "it redirects, which is not followed; give the address that it leads to"),
    **dict.fromkeys((401, 403), f"it refuses the key; set ${KEYS[0]}"),
    404: "no such model, or the address does not end in /v1",
}
Message = tuple[str, str, tuple[Image.Image, ...]]  # role, text, pictures


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

    def __post_init__(self) -> None:
        if openai is None:
            raise ValueError("chat endpoints need the openai client; install it with `pip install 'openai>=3'`")
        if not _is_address(self.endpoint):  # which is not shown, as it may hold a key
            raise ValueError(f"the endpoint is no address such as http://127.0.0.1:8000/v1; a key goes into ${KEYS[0]}")
        if not self.model.strip() or not self.model.isprintable():
            raise ValueError(f"{ascii(self.model[:40])} names no model; give a name from {self.endpoint}/models")
        self._key = next(filter(None, (os.environ.get(name, "").strip() for name in KEYS)), "")
        if not self._key.isascii() or not self._key.isprintable():
            raise ValueError(f"the key in ${KEYS[0]} or ${KEYS[1]} is none, as it holds odd characters; set it again")
        http = httpx2.Client(transport=Gate(self.timeout), timeout=self.timeout, trust_env=False)
        settings = {"timeout": self.timeout, "max_retries": self.attempts - 1, "http_client": http}
        # servers of one's own want no key, but the client does
        self._client = openai.OpenAI(base_url=self.endpoint, api_key=self._key or "none", **settings)

    def ask(self, messages: Sequence[Message]) -> Answer:
        """Send a conversation and wait for what is said next.

        Errors: EndpointError if every other question would fail as well; else ValueError, one line, without the key
        """
        conversation = [{"role": role, "content": _content(text, pictures)} for role, text, pictures in messages]
        try:
            raw = self._client.chat.completions.with_raw_response.create(model=self.model, messages=conversation)
        except openai.APIError as error:
            status, cause = getattr(error, "status_code", None), error.__cause__
            kind = EndpointError if status in FATAL or isinstance(cause, httpx2.ConnectError) else ValueError
            said = FATAL.get(status) or self._short(repr(cause) if cause else f"status {status}, {error.body}")
            raise kind(f"{self.endpoint} failed, asked up to {self.attempts} times: {said}") from None
        return self._read(raw.http_response.content)

    def _read(self, content: bytes) -> Answer:
        """Take the text out of an answer. Errors: ValueError if it has none, or only the beginning of one"""
        with suppress(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            data = json.loads(content)
            choice, usage = data["choices"][0], data.get("usage") or {}
            text = choice["message"]["content"].encode(errors="replace").decode()  # halves of characters become ?
            tokens = [max(0, int(usage.get(name) or 0)) for name in ("prompt_tokens", "completion_tokens")]
            if text.strip() and choice.get("finish_reason") != "length":
                return Answer(self._without_key(text), *tokens)
        said = self._short(content.decode(errors="replace"))
        raise ValueError(f"{self.endpoint} gave no whole answer of a chat model; is its address right? It said {said}")

    def _short(self, said: Any) -> str:
        """Make one short line of what a server said."""
        return plain(self._without_key(str(said)))[:120] or "nothing"

    def _without_key(self, text: str) -> str:
        """Take out the key, which a server may repeat; what is shorter than 8 characters is no secret."""
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
            compressed = response.headers.get("Content-Encoding", "identity") != "identity"
            for chunk in response.stream:
                body += chunk
                if compressed or len(body) > MAX_ANSWER:
                    raise ValueError(f"an answer of the endpoint is compressed, or has over {MAX_ANSWER} bytes")
                if time.monotonic() > end:  # a byte now and then would keep each single read in time
                    raise httpx2.ReadTimeout("the answer took too long", request=request)
        finally:
            response.close()
        return httpx2.Response(response.status_code, headers=response.headers, content=bytes(body))


def in_parallel(work: Callable[[Any], Any], items: Iterable, at_once: int) -> Iterator[tuple[int, Any]]:
    """Do a few things at a time, each in a thread; an item is taken when there is room for it.

    Yields the index of an item, and its result or the ValueError or OSError that stands for one, when it is done
    Errors: EndpointError, as the other items would meet it as well; whatever else the work raises, which is a bug
    """
    pool, numbered, running = ThreadPoolExecutor(at_once), enumerate(items), {}
    try:
        while True:
            running |= {pool.submit(work, item): index for index, item in islice(numbered, at_once - len(running))}
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                index, error = running.pop(done), done.exception()
                if isinstance(error, EndpointError) or error and not isinstance(error, ValueError | OSError):
                    raise error
                yield index, error or done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # what is under way ends by itself


def _is_address(endpoint: str) -> bool:
    """Tell whether this is an http or https address of nothing but a host and a path."""
    with suppress(httpx2.InvalidURL):
        url = httpx2.URL(endpoint)
        sound = url.scheme in ("http", "https") and url.host and (url.port or 1) < 65536
        return bool(sound) and not set("@?#") & set(endpoint)
    return False


def _content(text: str, pictures: Sequence[Image.Image]) -> str | list[dict[str, Any]]:
    """Write a message as the protocol has it: the text alone, or pictures as data URLs and the text behind them."""
    if not pictures:
        return text
    urls = ["data:image/png;base64," + base64.b64encode(to_png(picture)).decode() for picture in pictures]
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]
