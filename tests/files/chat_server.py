"""A chat endpoint of our own on 127.0.0.1, in a thread: speaks the protocol, and whatever else a test wants of it."""

import base64
import io
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def answer(text, tokens=(100, 7), **message):
    """What an endpoint says, as JSON."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage})


class Endpoint:
    """What is said, request by request, and what was asked.

    replies: functions of (handler, request body), strings (answers of the model) or (status, headers, body); the last
        one is given again and again
    """

    def __init__(self, replies):
        self.replies, self.asked, self.headers, self.times = list(replies), [], [], []
        self.busy, self.busiest, self.lock, self.address = 0, 0, threading.Lock(), ""

    def reply(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
            self.asked.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.times.append(time.monotonic())
            self.busy += 1
            self.busiest = max(self.busy, self.busiest)
        try:
            reply = reply(handler, body) if callable(reply) else reply
        finally:
            with self.lock:
                self.busy -= 1
        if reply is not None:
            send(handler, *((200, {}, answer(reply)) if isinstance(reply, str) else reply))


def send(handler, status, headers, body):
    body = body.encode() if isinstance(body, str) else body
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def serve(*replies):
    """Serve on a free port. Yields the Endpoint; its address ends in /v1"""
    endpoint = Endpoint(replies)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                endpoint.reply(self)
            except OSError:  # the client has enough
                pass

        do_GET = do_POST

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, endpoint.address = True, f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()


def texts(body):
    """The texts of a conversation, in order."""
    contents = [message["content"] for message in body["messages"]]
    return [content if isinstance(content, str) else content[-1]["text"] for content in contents]


def pictures(body):
    """The pictures of a conversation, in order."""
    parts = [
        part for message in body["messages"] if isinstance(message["content"], list) for part in message["content"]
    ]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) for url in urls]
