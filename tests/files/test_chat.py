"""Asking a chat endpoint: what goes out, what comes back, and that nothing an endpoint does costs more than a line.

The endpoint is a real server; the openai client, an optional extra, is the real one.
"""

import gzip
import json
import logging
import threading
import time
from itertools import count

import pytest
from PIL import Image

from chat_server import answer, pictures, serve, texts
from iclora import chat
from iclora.chat import MAX_ANSWER, Answer, Chat, EndpointError, in_parallel

KEY = "sk-very-secret-0123"
HELLO = [("user", "hello", ())]
needs_openai = pytest.mark.skipif(chat.openai is None, reason="needs the extra `factory`: pip install 'openai>=3'")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    for name in ("OPENAI_ORG_ID", "OPENAI_CUSTOM_HEADERS", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ICLORA_API_KEY", KEY)


def refused(endpoint, match, **options):
    """Ask once, and give the one line that it costs; it never holds the key."""
    with pytest.raises(ValueError, match=match) as caught:
        Chat(endpoint.address, "seer", **{"attempts": 1, **options}).ask(HELLO)
    line = str(caught.value)
    assert KEY not in line and "\n" not in line and len(line) < 400
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return caught.value


# what is said


@needs_openai
def test_a_conversation_goes_out_with_its_pictures_and_the_text_comes_back_with_its_cost():
    bar = Image.new("RGB", (30, 10), "red")
    with serve("a red bar") as endpoint:
        said = Chat(endpoint.address, "seer").ask(
            [("user", "what is it?", (bar, Image.new("RGB", (8, 8)))), ("assistant", "hm", ()), ("user", "well?", ())]
        )
    assert said == Answer("a red bar", 100, 7)
    assert endpoint.asked[0]["model"] == "seer" and texts(endpoint.asked[0]) == ["what is it?", "hm", "well?"]
    assert [message["role"] for message in endpoint.asked[0]["messages"]] == ["user", "assistant", "user"]
    assert [picture.size for picture in pictures(endpoint.asked[0])] == [(30, 10), (8, 8)]
    assert pictures(endpoint.asked[0])[0].getpixel((5, 5)) == (255, 0, 0)


@needs_openai
@pytest.mark.parametrize(
    ("variables", "sent"),
    [
        ({"ICLORA_API_KEY": KEY, "OPENAI_API_KEY": "other"}, KEY),
        ({"ICLORA_API_KEY": "", "OPENAI_API_KEY": "other"}, "other"),
        ({"ICLORA_API_KEY": f" {KEY}\n"}, KEY),
        ({"ICLORA_API_KEY": ""}, "none"),
    ],
)
def test_the_key_comes_from_the_environment(monkeypatch, variables, sent):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with serve("yes") as endpoint:
        Chat(endpoint.address, "seer").ask(HELLO)
    assert endpoint.headers[0]["authorization"] == f"Bearer {sent}"


@needs_openai
def test_the_key_is_in_no_line_no_log_and_no_answer(caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    said = answer(f"your key is {KEY}")
    error = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}})
    with serve((200, {}, said), (400, {}, error), (401, {}, error), (200, {}, KEY), (500, {}, KEY)) as endpoint:
        asked = Chat(endpoint.address, "seer", attempts=1)
        assert asked.ask(HELLO).text == "your key is [key]"
        assert r"provided: [key]" in str(refused(endpoint, "status 400"))
        refused(endpoint, "it refuses the key; set .ICLORA_API_KEY")
        refused(endpoint, "no whole answer of a chat model")
        refused(endpoint, "status 500")
    assert KEY not in caplog.text and KEY not in repr(asked)


@needs_openai
@pytest.mark.parametrize("bad", ["sk-\u00e4\u00f6", "sk-one\nsk-two"])
def test_a_key_that_is_none_is_refused_and_not_shown(monkeypatch, bad):
    monkeypatch.setenv("ICLORA_API_KEY", bad)
    with pytest.raises(ValueError, match="odd characters; set it again") as caught:
        Chat("http://127.0.0.1:1/v1", "seer")
    assert "sk-" not in str(caught.value)


# addresses


@needs_openai
@pytest.mark.parametrize(
    "address",
    [
        *(
            "",
            "localhost:8000",
            "ftp://host/v1",
            "file:///etc/passwd",
            "//host/v1",
            "http://",
            "http:///v1",
            "http://[::1",
        ),
        *("http://a:b/v1", "http://host:99999/v1", "http://me:sesame@host/v1", "https://host/v1?key=sesame"),
    ],
)
def test_only_http_and_https_are_asked_and_an_address_that_may_hold_a_key_is_not_shown(address):
    with pytest.raises(ValueError, match="is no address such as http://127.0.0.1:8000/v1; a key goes into") as caught:
        Chat(address, "seer")
    assert "sesame" not in str(caught.value)


@needs_openai
@pytest.mark.parametrize("name", ["", "  ", "a\nb", "\udcff"])
def test_a_model_must_be_named(name):
    with pytest.raises(ValueError, match="names no model"):
        Chat("http://127.0.0.1:1/v1", name)


@needs_openai
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_takes_the_key_elsewhere(status):
    with serve("got you") as thief, serve((status, {"Location": f"{thief.address}/chat/completions"}, "")) as endpoint:
        line = refused(endpoint, "it redirects, which is not followed")
    assert not thief.asked and isinstance(line, EndpointError)


def test_without_the_client_a_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(chat, "openai", None)
    with pytest.raises(ValueError, match="need the openai client; install it with `pip install 'openai>=3'`"):
        Chat("http://127.0.0.1:1/v1", "seer")


# endpoints that are busy, slow, down


@pytest.mark.slow
@needs_openai
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again_when_it_says_so(status):
    with serve((status, {"Retry-After": "1"}, "{}"), "yes") as endpoint:
        assert Chat(endpoint.address, "seer").ask(HELLO).text == "yes"
    first, second = endpoint.times
    assert 1 <= second - first < 1.5


@needs_openai
def test_each_wait_is_longer_and_their_number_is_bounded():
    with serve((503, {}, "{}")) as endpoint:
        refused(endpoint, "asked up to 3 times: status 503", attempts=3)
    first, second, third = endpoint.times
    assert 0.3 < second - first < 0.8 < third - second + 0.1 < 1.4


@needs_openai
def test_a_wait_of_hours_is_not_waited_for():
    with serve((429, {"Retry-After": "7200"}, '{"error": {"message": "come back tomorrow"}}')) as endpoint:
        refused(endpoint, "status 429, .*come back tomorrow", attempts=5)
    assert len(endpoint.times) == 1


@needs_openai
def test_a_mistake_is_not_repeated():
    with serve((400, {}, '{"error": {"message": "no\\u001b[2J pictures"}}')) as endpoint:
        assert "\\x1b[2J pictures" in str(refused(endpoint, "status 400", attempts=5))
    assert len(endpoint.times) == 1


@needs_openai
@pytest.mark.parametrize(
    ("status", "line"),
    [(401, "refuses the key"), (403, "refuses the key"), (404, "no such model, or the address does not end in /v1")],
)
def test_what_would_fail_for_every_question_is_told_apart(status, line):
    with serve((status, {}, "{}")) as endpoint:
        assert isinstance(refused(endpoint, line), EndpointError)


def sleepy(handler, body):
    time.sleep(2)
    return "late"


def dripping(handler, body):
    """A byte now and then, each in time."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.mark.slow
@needs_openai
@pytest.mark.parametrize("slow", [sleepy, dripping])
def test_a_slow_endpoint_is_given_up(slow):
    begun = time.monotonic()
    with serve(slow) as endpoint:
        refused(endpoint, "asked up to 2 times: ReadTimeout", timeout=0.3, attempts=2)
    assert time.monotonic() - begun < 3 and len(endpoint.times) == 2


@needs_openai
def test_an_endpoint_that_is_down_costs_a_line():
    with serve("yes") as endpoint:
        pass
    assert isinstance(refused(endpoint, "failed, asked up to 1 times: ConnectError"), EndpointError)


@needs_openai
def test_a_connection_that_breaks_is_tried_again():
    def hang_up(handler, body):
        handler.close_connection = True

    with serve(hang_up, "yes") as endpoint:
        assert Chat(endpoint.address, "seer").ask(HELLO).text == "yes"


# endpoints that lie


def choices(*entries):
    return json.dumps({"choices": list(entries)})


@needs_openai
@pytest.mark.parametrize(
    "body",
    [
        *("", "hello", "{", "null", "[]", "[[[]]]", "7", '"text"', "{}", "[" * 100_000, "1" * 5000, b"\xff\xfe\x00"),
        *('{"choices": null}', '{"choices": {}}', choices(), choices(None), choices({}), choices({"message": []})),
        *(answer(None), answer(""), answer(" \n"), answer(7), answer(["text"]), answer({"text": "hello"})),
        *(answer("yes").replace("100", cost) for cost in ('"many"', "1e999", "[1]")),
    ],
    ids=lambda body: repr(body[:30]),
)
@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_an_answer_that_is_none_costs_a_line(body, kind):
    with serve((200, {"Content-Type": kind}, body)) as endpoint:
        refused(endpoint, "gave no whole answer of a chat model; is its address right")


@needs_openai
def test_the_kind_of_content_that_is_declared_does_not_matter():
    with serve((200, {"Content-Type": "text/plain"}, answer("yes"))) as endpoint:
        assert Chat(endpoint.address, "seer").ask(HELLO).text == "yes"


@needs_openai
@pytest.mark.parametrize("usage", [None, [], {}, {"prompt_tokens": None, "completion_tokens": -3}])
def test_a_cost_that_is_not_told_counts_as_none(usage):
    said = {**json.loads(answer("yes")), "usage": usage}
    with serve((200, {}, json.dumps(said))) as endpoint:
        assert Chat(endpoint.address, "seer").ask(HELLO) == Answer("yes", 0, 0)


@needs_openai
def test_an_answer_that_was_cut_off_is_none():
    said = json.loads(answer("[IMAGE1] a fox, [IMAGE2] the"))
    said["choices"][0]["finish_reason"] = "length"
    with serve((200, {}, json.dumps(said))) as endpoint:
        refused(endpoint, "gave no whole answer")


@needs_openai
def test_half_characters_become_question_marks():
    with serve((200, {}, answer("a \ud83d fox"))) as endpoint:
        assert Chat(endpoint.address, "seer").ask(HELLO).text == "a ? fox"


def endless(handler, status):
    """Send spaces until the client has enough, and count them."""
    handler.send_response(status)
    handler.end_headers()
    for sent in count(0, 65536):
        handler.server.sent = sent
        handler.wfile.write(b" " * 65536)


@needs_openai
@pytest.mark.parametrize("status", [200, 400])
def test_an_answer_without_end_is_not_read_to_its_end(status):
    sent = []

    def reply(handler, body):
        try:
            endless(handler, status)
        finally:
            sent.append(handler.server.sent)

    with serve(reply) as endpoint:
        refused(endpoint, "or has over 4000000 bytes", attempts=5)
        for _ in range(50):
            time.sleep(0.1 * (not sent))
    assert len(endpoint.times) == 1 and sent[0] < MAX_ANSWER + 30_000_000


@needs_openai
def test_a_compressed_answer_which_may_be_any_size_is_not_unpacked():
    bomb = gzip.compress(b" " * 50_000_000)
    with serve((200, {"Content-Encoding": "gzip"}, bomb)) as endpoint:
        refused(endpoint, "is compressed, or has")
    assert endpoint.headers[0]["accept-encoding"] == "identity"


@needs_openai
def test_a_server_that_speaks_another_protocol_costs_a_line():
    def noise(handler, body):
        handler.wfile.write(b"\x00\x01 no HTTP\r\n\r\n")

    with serve(noise) as endpoint:
        refused(endpoint, "failed, asked up to 1 times: RemoteProtocolError")


# several at once


@needs_openai
def test_questions_are_asked_a_few_at_a_time_and_answers_know_theirs():
    def echo(handler, body):
        time.sleep(0.05)
        return f"echo {texts(body)[0]}" if texts(body)[0] != "5" else (400, {}, "no fives")

    with serve(echo) as endpoint:
        answers = dict(in_parallel(Chat(endpoint.address, "seer").ask, ([("user", str(n), ())] for n in range(12)), 3))
    assert endpoint.busiest == 3 and sorted(answers) == list(range(12))
    assert isinstance(answers.pop(5), ValueError)
    assert {index: said.text for index, said in answers.items()} == {n: f"echo {n}" for n in range(12) if n != 5}


def test_items_are_taken_when_there_is_room_and_results_come_when_they_are_done():
    taken, gates = [], [threading.Event() for _ in range(4)]

    def items():
        for number in range(4):
            taken.append(number)
            yield number

    def work(number):
        gates[number].wait(10)
        return -number

    results = in_parallel(work, items(), 2)
    gates[1].set()
    assert next(results) == (1, -1) and taken == [0, 1]
    for gate in gates:
        gate.set()
    assert sorted(results) == [(0, 0), (2, -2), (3, -3)]


def test_one_at_a_time_keeps_the_order():
    assert list(in_parallel(lambda n: n * n, range(5), 1)) == [(n, n * n) for n in range(5)]


def test_a_failure_is_a_result_and_a_bug_is_raised():
    def work(error):
        raise error

    failed, full = ValueError("no"), OSError("full")
    assert dict(in_parallel(work, [failed, full], 2)) == {0: failed, 1: full}
    with pytest.raises(ZeroDivisionError):
        list(in_parallel(work, [ZeroDivisionError()], 1))


# the transport by itself, which needs no openai


@pytest.fixture
def http(monkeypatch):
    module = pytest.importorskip("httpx2")
    monkeypatch.setattr(chat, "httpx2", module, raising=False)
    return module.Client(transport=chat.Gate(0.5), trust_env=False)


def test_the_transport_gives_back_what_was_sent(http):
    with serve((418, {"X-Kind": "pot"}, "tea")) as endpoint:
        back = http.post(endpoint.address, json={})
    assert (back.status_code, back.headers["X-Kind"], back.content) == (418, "pot", b"tea")


def test_the_transport_reads_neither_without_end_nor_for_ever_and_unpacks_nothing(http):
    def reply(handler, body):
        endless(handler, 200)

    with serve(reply, dripping, (200, {"Content-Encoding": "br"}, "x")) as endpoint:
        with pytest.raises(ValueError, match="or has over 4000000 bytes"):
            http.post(endpoint.address, json={})
        with pytest.raises(chat.httpx2.ReadTimeout):
            http.post(endpoint.address, json={})
        with pytest.raises(ValueError, match="is compressed, or has"):
            http.post(endpoint.address, json={})
