"""A real HTTP server on this machine that speaks OpenAI's chat protocol, well or badly, for tests of whatever talks to one.

with Server("well", answer="<answer>a red cat</answer>") as server:
    EndpointChat(server.url)

Each chat request takes the next of the behaviours, the last of which goes on for ever: Server("429", "well"). See `BEHAVIOURS`; a
number is a status code. `server.requests` are the chat requests' bodies, `server.calls` all (method, path, headers).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER = "<answer>a red cat on a blue mat</answer>"


class Server:
    """answer: the text, or a function of the request's body. models: what /v1/models names; None: there is no such route. `seconds`:
    how long "slowly" takes. `headers`: sent with each chat answer. key: a request without it is 401. where: what redirects name."""

    def __init__(
        self,
        *behaviours: str,
        answer: str | Callable[[dict[str, Any]], str] = ANSWER,
        models: tuple[str, ...] | None = ("tiny-vlm",),
        models_behaviour: str = "well",
        seconds: float = 0.3,
        headers: dict[str, str] | None = None,
        key: str | None = None,
        where: str = "",
    ) -> None:
        self.behaviours, self.answer, self.models, self.seconds = list(behaviours) or ["well"], answer, models, seconds
        self.models_behaviour, self.headers, self.key, self.where = models_behaviour, headers or {}, key, where
        self.requests: list[dict[str, Any]] = []
        self.calls: list[tuple[str, str, dict[str, str]]] = []
        self.times: list[float] = []
        self.now = self.most = self.hung_up = 0  # requests at work, the most at a time, and how many the client left
        self.lock, self.stopped = threading.Lock(), threading.Event()

    def __enter__(self) -> Server:
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = _Quiet(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()


class _Quiet(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client went away, which is often the test."""


class _Handler(BaseHTTPRequestHandler):
    owner: Server

    at_work = False

    def do_GET(self) -> None:
        s = self.owner
        s.calls.append(("GET", self.path, dict(self.headers)))
        if not self.path.endswith("/models") or s.models is None:
            return self.status(404, {"detail": "Not Found"})
        if s.models_behaviour != "well":
            return self.behave(s.models_behaviour, {})
        self.status(200, {"object": "list", "data": [{"id": m, "object": "model"} for m in s.models]})

    def do_POST(self) -> None:
        s = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with s.lock:
            s.calls.append(("POST", self.path, dict(self.headers)))
            s.requests.append(body)
            s.times.append(time.monotonic())
            s.now, self.at_work = s.now + 1, True
            s.most = max(s.most, s.now)
            behaviour = s.behaviours.pop(0) if len(s.behaviours) > 1 else s.behaviours[0]
        try:
            if not self.path.endswith("/v1/chat/completions"):
                self.status(404, {"detail": "Not Found"})
            elif s.key is not None and self.headers.get("Authorization") != f"Bearer {s.key}":
                self.status(401, {"error": {"message": "no such key"}})
            elif s.models and body["model"] not in s.models:
                self.status(404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}})
            else:
                self.behave(behaviour, body)
        except OSError:
            s.hung_up += 1
        finally:
            self.leave()

    def leave(self) -> None:
        """Counts this request out: before its answer goes, since whoever has it may send the next one at once."""
        with self.owner.lock:
            self.owner.now -= self.at_work
            self.at_work = False

    def behave(self, behaviour: str, body: dict[str, Any]) -> None:
        if behaviour.isdecimal() and behaviour not in BEHAVIOURS:
            self.status(
                int(behaviour), b"" if behaviour == "204" else {"error": {"message": f"status {behaviour}, as scripted"}}
            )
        else:
            BEHAVIOURS[behaviour](self, body)

    # what the behaviours are made of

    def text(self, body: dict[str, Any]) -> str:
        return self.owner.answer(body) if callable(self.owner.answer) else self.owner.answer

    def chat(self, body: dict[str, Any], **message: Any) -> dict[str, Any]:
        said = {"role": "assistant", "content": self.text(body)} | message
        choice = {"index": 0, "message": said, "finish_reason": "stop"}
        return {"id": "1", "object": "chat.completion", "choices": [choice], "usage": {"completion_tokens": 7}}

    def status(self, code: int, body: Any, **headers: str) -> None:
        self.raw(body if isinstance(body, bytes) else json.dumps(body).encode(), code, headers)

    def raw(self, data: bytes, code: int = 200, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.leave()
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(data) if length is None else length)} | (headers or {})).items():
            self.send_header(name.replace("_", "-"), value)
        for name, value in self.owner.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def drip(self, data: bytes, pause: float = 0.05) -> None:
        """A byte at a time, with no end."""
        for k in range(10**6):
            if self.owner.stopped.wait(pause):
                return
            self.wfile.write(data[k % len(data) :][:1])
            self.wfile.flush()

    def slowly(self, body: dict[str, Any]) -> None:
        self.owner.stopped.wait(self.owner.seconds)
        self.status(200, self.chat(body))

    def drip_body(self, body: dict[str, Any]) -> None:
        self.raw(b"", length=10**6)
        self.drip(b" ")

    def drip_head(self, body: dict[str, Any]) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        self.drip(b"a")

    def huge(self, body: dict[str, Any]) -> None:
        self.status(200, self.chat(body, content="word " * 2_000_000))

    def broken_chunks(self, body: dict[str, Any]) -> None:
        self.wfile.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n" + json.dumps(self.chat(body)).encode()[:20]
        )

    def authorization(self) -> str:
        return self.headers.get("Authorization", "")

    def log_message(self, *_: Any) -> None:
        pass


BEHAVIOURS: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "well": lambda h, b: h.status(200, h.chat(b)),
    "slowly": _Handler.slowly,
    "silent": lambda h, b: h.owner.stopped.wait(60),  # takes the request, and never answers
    "drip": _Handler.drip_body,
    "drip head": _Handler.drip_head,
    "closes": lambda h, b: None,
    "half": lambda h, b: h.raw(json.dumps(h.chat(b)).encode()[:40], length=4000),
    "broken chunks": _Handler.broken_chunks,
    "truncated": lambda h, b: h.status(200, json.dumps(h.chat(b)).encode()[:40]),
    "html": lambda h, b: h.status(200, b"<!DOCTYPE html><html><h1>It works!</h1></html>"),
    "binary": lambda h, b: h.status(200, bytes(range(256)) * 20),
    "no http": lambda h, b: h.wfile.write(b"\x00\x01SSH-2.0 what?\r\n\r\n"),
    "empty": lambda h, b: h.status(200, b""),
    "shape": lambda h, b: h.status(200, {"result": "a cat\nand more"}),
    "list": lambda h, b: h.status(200, [1, 2]),
    "null": lambda h, b: h.status(200, None),
    "no choices": lambda h, b: h.status(200, {"choices": []}),
    "types": lambda h, b: h.status(200, {"choices": [{"message": {"content": 7}}], "usage": "many"}),
    "odd usage": lambda h, b: h.status(200, h.chat(b) | {"usage": {"completion_tokens": "7"}}),
    "deep": lambda h, b: h.status(200, b"[" * 100_000),
    "surrogate": lambda h, b: h.status(200, h.chat(b, content="<answer>a \ud83d cat</answer>")),
    "huge": _Handler.huge,
    "none": lambda h, b: h.status(200, h.chat(b, content=None)),
    "parts": lambda h, b: h.status(200, h.chat(b, content=[{"type": "text", "text": h.text(b)}, {"type": "other"}])),
    "reasoning": lambda h, b: h.status(200, h.chat(b, reasoning="it looks blue")),
    "reasoning_content": lambda h, b: h.status(200, h.chat(b, reasoning_content="it looks blue")),
    "only reasoning": lambda h, b: h.status(200, h.chat(b, content=None, reasoning="it looks")),
    "error as 200": lambda h, b: h.status(200, {"error": {"message": "out of memory"}}),
    # the key comes back in whatever way
    "401": lambda h, b: h.status(401, {"error": {"message": f"bad key in {h.authorization()!r}"}}, X_Key=h.authorization()),
    "key in text": lambda h, b: h.status(500, h.authorization().encode()),
    "key in answer": lambda h, b: h.status(200, h.chat(b, content=f"<answer>{h.authorization()}</answer>")),
    "key in status": lambda h, b: h.wfile.write(f"HTTP/1.1 {h.authorization()}\r\n\r\n".encode()),
    "key in garbage": lambda h, b: h.wfile.write(f"{h.authorization()}\r\n\r\n".encode()),
    "key in shape": lambda h, b: h.status(200, {h.authorization(): 1}),
    "redirect": lambda h, b: h.status(307, b"", Location=h.owner.where + "/" + h.authorization() + "?key=" + h.authorization()),
}
