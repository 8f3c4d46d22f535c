"""A chat model behind an OpenAI-style server: vLLM, Ollama, LM Studio, llama.cpp, or a service on the net.

The HTTP is the standard library's. `huggingface_hub.InferenceClient` will not do here: without a key it sends the user's stored
Hub token to whatever server it is, it refuses even a server on this machine under HF_HUB_OFFLINE=1, it takes prompts and pictures
along through redirects, and it can neither bound an answer in time and size nor give one up.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import queue
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPSConnection, IncompleteRead
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from . import Completion, Conversation, Message, Sampling

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("promptloop")
TICK = 0.1  # seconds between two polls of `on_token`
MOST = 4 * 2**20  # bytes of one answer; a long text with its reasoning has some 100 kB
PATIENCE = 30.0  # seconds: the longest Retry-After that is waited out, since the picture waits too
LOSSLESS = 768 * 768  # pixels up to which a picture goes as PNG; above, a preview's noise makes JPEG a tenth of it
_jitter = random.Random()  # of its own: the global generator is the user's


@dataclass(frozen=True)
class _Reply:
    """What became of one request. data: the JSON of a good answer. what: what happened instead, in words; todo: what to do about
    it; heals: how often asking again may help; wait: the seconds after which the server wants to be asked again."""

    data: Any = None
    status: int = 0
    what: str = ""
    todo: str = ""
    heals: int = 0
    wait: float = 0.0


class EndpointChat:
    """The model `model` of the server at `url`, which may end with /v1 or /v1/chat/completions, or with neither.

    model: None takes the first that the server names. key_env: the environment variable with the key, read at each request and
    kept nowhere; without it none is sent. timeout: seconds for one request as a whole. retries: of what can heal (too many
    requests, a busy or restarting server; a time-out heals once). concurrency: requests at a time. sees: whether it takes pictures.
    on_token: called in the caller's thread about every 0.1 s while it waits; what it raises gets through at once.

    Raises ValueError for a url or a number that makes no sense.
    """

    def __init__(
        self, url: str, model: str | None = None, *, key_env: str = "PROMPTLOOP_API_KEY", timeout: float = 60.0,
        retries: int = 3, concurrency: int = 8, sees: bool = True,
    ) -> None:  # fmt: skip
        for name, value, least in (("retries", retries, 0), ("concurrency", concurrency, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; use a whole number, {least} or more")
        if not isinstance(timeout, (int, float)) or not 0 < timeout <= threading.TIMEOUT_MAX:
            raise ValueError(f"timeout is {timeout!r}; use a number of seconds above 0")
        self.url, self.model, self.key_env, self.timeout = _base(url, key_env), model, key_env, float(timeout)
        self.retries, self.concurrency, self.sees = retries, concurrency, sees
        self.on_token: Callable[[], None] | None = None
        self._found: str | None = None  # the model that the server named

    def __repr__(self) -> str:
        return f"EndpointChat({self.url!r}, model={self.model!r})"

    def generate(self, conversations: Sequence[Conversation], sampling: Sampling) -> list[Completion]:
        if sampling.num_beams > 1:
            raise ValueError(f"num_beams is {sampling.num_beams}; a server has no beam search, use num_beams=1")
        if not conversations:
            return []
        model = self.model or self._found or self._choose()
        if isinstance(model, _Reply):
            return [Completion(error=self._words(model, "models"))] * len(conversations)
        bodies, answers = dict[int, bytes | None](), dict[int, Completion]()
        for row, conversation in enumerate(conversations):
            try:
                bodies[row] = _payload(conversation, model, sampling, row)
            except Exception as e:
                answers[row] = Completion(error=_line(f"conversation {row} cannot be sent to {self.url}: {e!r}", ""))
        replies = self._ask("chat/completions", bodies, self.retries)
        has = ""
        if any(r.status in (400, 404) and "model" in r.what.lower() for r in replies.values()):
            self._found = None  # the server may have been started again with another one
            if names := _names(self._ask("models", {0: None}, 0)[0].data):
                has = f" (it was asked for model {model!r:.80}, and has: {_line(', '.join(names), '')})"
        for row, reply in replies.items():
            got = reply if reply.what else _completion(reply.data)
            more = has * (reply.status in (400, 404))
            answers[row] = Completion(error=self._words(got, "chat/completions") + more) if isinstance(got, _Reply) else got
        return [answers[row] for row in range(len(conversations))]

    def trouble(self) -> str | None:
        """Why the server cannot be asked, in one line; None where it can."""
        return self._words(reply, "models") if isinstance(reply := self._choose(), _Reply) else None

    def _choose(self) -> str | _Reply:
        names = _names((reply := self._ask("models", {0: None}, self.retries)[0]).data)
        if names == []:
            return _Reply(what="the server has no model", todo="load one there first")
        if not names:  # without such a route there is one model, and nobody asks for its name (llama.cpp and its like)
            return reply if reply.what and reply.status not in (404, 405, 501) else "default"
        self._found, *others = [n for n in names if "embed" not in n.lower()] or names  # some list what cannot chat
        if others:
            logger.warning("%s has several models; %.200r is taken, name another one with model=", self.url, self._found)
        return self._found

    def _words(self, reply: _Reply, route: str) -> str:
        return f"{self.url}/{route}: {reply.what}; {reply.todo.format(env=self.key_env, timeout=f'{self.timeout:g}')}"

    def _ask(self, route: str, bodies: Mapping[int, bytes | None], retries: int) -> dict[int, _Reply]:
        """One request for each body (None: a GET), asked again where that may help. All waiting is done here, in the caller's
        thread, in ticks; a request runs in a thread of its own that nobody waits for."""
        replies: dict[int, _Reply] = {}
        due = [(0.0, row) for row in bodies]
        tries = dict.fromkeys(bodies, 0)
        running: dict[_Call, int] = {}
        done: queue.SimpleQueue[tuple[_Call, _Reply]] = queue.SimpleQueue()
        try:
            while len(replies) < len(bodies):
                if self.on_token is not None:
                    self.on_token()
                for item in [d for d in due if d[0] <= time.monotonic()][: self.concurrency - len(running)]:
                    due.remove(item)
                    running[_Call(f"{self.url}/{route}", bodies[item[1]], self.key_env, self.timeout, done)] = item[1]
                try:
                    ended = [done.get(timeout=TICK)]
                except queue.Empty:
                    ended = [(c, _LATE) for c in running if time.monotonic() > c.deadline]
                for call, reply in ended:
                    call.close()
                    if (row := running.pop(call, None)) is None:
                        continue  # given up before
                    tries[row] += 1
                    if tries[row] > min(retries, reply.heals):
                        again = f" ({tries[row]} attempts)" if tries[row] > 1 else ""
                        replies[row] = _Reply(reply.data, reply.status, reply.what and reply.what + again, reply.todo)
                    else:
                        pause = reply.wait or min(8.0, 0.5 * 2 ** (tries[row] - 1)) * _jitter.uniform(0.5, 1.0)
                        due.append((time.monotonic() + pause, row))
        finally:
            for call in running:
                call.close()
        return replies


_WHICH = "is this the address of an OpenAI-style server?"
_LATE = _Reply(what="no whole answer in time", todo="it had {timeout} s: raise timeout, or ask for fewer tokens", heals=1)


class _Call:
    """One request. The key is nowhere but in the thread that sends it, and its replies are rid of it."""

    def __init__(self, url: str, body: bytes | None, key_env: str, timeout: float, done: queue.SimpleQueue) -> None:
        self.url, self.body, self.key_env, self.timeout, self.done = url, body, key_env, timeout, done
        self.deadline = time.monotonic() + timeout
        self.socket: socket.socket | None = None
        self.closed = False
        threading.Thread(target=self._run, name="promptloop-endpoint", daemon=True).start()

    def close(self) -> None:
        """Ends the exchange, wherever it is; a server that notices stops generating."""
        self.closed = True
        if self.socket is not None:
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        key = os.environ.get(self.key_env, "").strip()
        try:
            reply = self._exchange(key)
        except Exception as e:
            reply = _trouble(e, key)
        self.done.put((self, reply))

    def _exchange(self, key: str) -> _Reply:
        if not key.isascii() or not key.isprintable():  # http.client would name it in its error
            return _Reply(what="the key has characters that no request can hold", todo="correct the environment variable {env}")
        connection, target, headers = _connection(self.url, self.timeout)
        headers |= {"Accept": "application/json", "Connection": "close", "User-Agent": "promptloop"}
        headers |= {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            connection.connect()
            self.socket = connection.sock
            if self.closed:
                return _LATE
            connection.request("GET" if self.body is None else "POST", target, self.body, headers)
            with connection.getresponse() as response:
                data = bytearray()
                while len(data) <= MOST and (chunk := response.read(65536)):
                    data += chunk
                whole = response.getheader("Content-Length", "")
                if len(data) <= MOST and whole.isdecimal() and len(data) < int(whole):
                    raise IncompleteRead(bytes(data), int(whole) - len(data))
                return _judge(response.status, response.headers, bytes(data), key)
        finally:
            connection.close()


def _base(url: str, key_env: str) -> str:
    """The address to which a route is added: http(s)://host[:port][/path]/v1."""
    given = str(url).strip()
    given = f"http://{given}" if re.fullmatch(r"([\w.-]+|\[[\da-fA-F:.]+\]):\d+(/\S*)?", given) else given
    try:
        parts = urlsplit(given)
        ok = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        ok = False
    if not ok or re.search(r"[\s\x00-\x1f\x7f@?#]", given):
        shown = re.sub(r"^(\w+://)?.*@", r"\1***@", re.sub(r"[?#].*", "?***", given), flags=re.DOTALL)  # it may be a secret
        allowed = f"use http://host:port, https://host/path or host:port; a key belongs into the environment variable {key_env}"
        raise ValueError(f"url is {shown!r}; {allowed}")
    path, exact = re.subn(r"/chat/completions$", "", quote(parts.path.rstrip("/"), safe="/%:~+,;=!$&'()*"))
    version = "" if exact or re.search(r"/v\d+\w*$", path) else "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}{version}"


def _connection(url: str, timeout: float) -> tuple[HTTPConnection, str, dict[str, str]]:
    """A connection for `url`, through the environment's proxy where there is one; with it what to ask for, and headers for that."""
    parts = urlsplit(url)
    kind, port = (HTTPSConnection, parts.port or 443) if parts.scheme == "https" else (HTTPConnection, parts.port or 80)
    host = parts.hostname or ""
    local = host in ("localhost", "::1") or host.startswith("127.")
    via = "" if local or proxy_bypass(host) else getproxies().get(parts.scheme, "")
    if not via:
        return kind(host, port, timeout=timeout), parts.path, {}
    proxy = urlsplit(via if "://" in via else f"http://{via}")
    if proxy.scheme != "http":
        raise HTTPException(f"the environment's proxy is a {proxy.scheme} proxy, only http works; name {host} in no_proxy")
    login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}" if proxy.username else ""
    headers = {"Proxy-Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}
    connection = kind(proxy.hostname or "", proxy.port or 80, timeout=timeout)
    if kind is HTTPConnection:
        return connection, url, headers
    connection.set_tunnel(host, port, headers)
    return connection, parts.path, {}


def _payload(conversation: Conversation, model: str, sampling: Sampling, row: int) -> bytes:
    messages = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
    numbers = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed_of(row) % 2**31}
    body = {"model": model, "messages": [_open(m) for m in messages], "max_tokens": sampling.max_new_tokens, **numbers}
    return json.dumps(body).encode()


def _open(message: Message) -> dict[str, Any]:
    """A message as OpenAI has it. One without pictures is plain text, since some servers' templates take nothing else."""
    content = message["content"]
    if not isinstance(content, str) and all(p["type"] == "text" for p in content):
        content = "\n".join(p["text"] for p in content)
    elif not isinstance(content, str):
        content = [p if p["type"] == "text" else {"type": "image_url", "image_url": {"url": _uri(p["image"])}} for p in content]
    return {"role": message["role"], "content": content}


def _uri(image: Image) -> str:
    file, kind = io.BytesIO(), "PNG" if image.width * image.height <= LOSSLESS else "JPEG"
    image.convert("RGB").save(file, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _completion(data: Any) -> Completion | _Reply:
    """The answer of a chat, with the reasoning in front that a server set apart."""
    try:
        choice = data["choices"][0]
        message = choice["message"]
        text, reasoning = message.get("content"), message.get("reasoning") or message.get("reasoning_content")
    except (TypeError, KeyError, IndexError, AttributeError):
        kind = f"an object with {', '.join(list(data)[:5]) or 'nothing'}" if isinstance(data, dict) else type(data).__name__
        return _Reply(what=f"the answer is no chat completion ({_line(kind, '')})", todo=_WHICH)
    if isinstance(text, list) and text:
        text = "".join(t for p in text if isinstance(t := p.get("text") if isinstance(p, dict) else p, str))
    thought = reasoning if isinstance(reasoning, str) and reasoning.strip() else ""
    if not isinstance(text, str) and not thought:
        why = f"content {text!r:.40}, finish_reason {choice.get('finish_reason')!r:.40}"
        return _Reply(what=f"the answer has no text ({why})", todo="see the server's log")
    text = text if isinstance(text, str) else ""
    text = f"<think>{thought}</think>{text}" if thought and "<think>" not in text else text
    usage = data.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Completion(text, tokens=tokens if type(tokens) is int and 0 <= tokens < 2**31 else None)


def _names(data: Any) -> list[str] | None:
    """The models of an answer to /models; None where it is no such answer."""
    if not isinstance(data, dict) or "data" not in data or not isinstance(data["data"], list | None):
        return None
    return [m["id"] for m in data["data"] or [] if isinstance(m, dict) and isinstance(m.get("id"), str)]


def _judge(status: int, headers: HTTPMessage, body: bytes, key: str) -> _Reply:
    """What an answer is worth."""
    name = f"HTTP {status}"
    if len(body) > MOST:
        return _Reply(None, status, f"{name}, but the answer is longer than {MOST // 2**20} MB", _WHICH)
    try:
        data, valid = _rid(json.loads(body), key), True
    except (ValueError, RecursionError):
        data, valid = None, False
    said = _said(data, body, key)
    if 300 <= status < 400:
        to = _line(headers.get("Location", "").split("?")[0], key)
        return _Reply(None, status, f"{name}, redirected to {to or 'nowhere'}", "redirects are not followed: give that address")
    if not 200 <= status < 300:
        what, wait = f"{name}: {said or 'without a word'}", _retry_after(headers) if status in (429, 503) else 0.0
        if wait > PATIENCE:
            return _Reply(None, status, f"{what}, to be asked again in {wait:.0f} s", "that is too long to wait for")
        advice = 401 * bool(key) if status in (401, 403) else status if status in _ADVICE else 500 if status > 500 else 400
        return _Reply(None, status, what, _ADVICE[advice], 99 if status in (429, 500, 502, 503, 504) else 0, wait)
    if not valid:
        return _Reply(None, status, f"{name}, but the answer is {f'no JSON: {said}' if body.strip() else 'empty'}", _WHICH)
    if isinstance(data, dict) and "choices" not in data and (data.get("error") or data.get("object") == "error"):
        return _Reply(None, status, f"{name}, but an error for an answer: {said}", _ADVICE[500])
    return _Reply(data, status)


_ADVICE = {
    0: "set the environment variable {env} to the key",
    400: "the server refuses this request: see what it says (for a model that takes no pictures: sees=False)",
    401: "check the key in the environment variable {env}",
    404: "check the address and the model's name",
    429: "lower concurrency, or wait",
    500: "see the server's log",
}
_TROUBLE: tuple[tuple[Any, str, str, int], ...] = (  # the first that fits
    (ConnectionRefusedError, "connection refused", "is the server running, and on this port?", 99),
    ((ConnectionError, ssl.SSLEOFError), "the server closed the connection ({})", _ADVICE[500], 99),
    (IncompleteRead, "the answer broke off half-way", _ADVICE[500], 99),
    (socket.gaierror, "the host is not found ({})", "check the address", 0),
    (ssl.SSLCertVerificationError, "its certificate is not trusted ({})", "name your authority's file in SSL_CERT_FILE", 0),
    (ssl.SSLError, "no secure connection ({})", "does the server speak https? try http://", 0),
    (Exception, "no answer that can be read ({})", _WHICH, 0),
)


def _trouble(e: Exception, key: str) -> _Reply:
    """An exchange that broke off."""
    what, todo, heals = next(t[1:] for t in _TROUBLE if isinstance(e, t[0]))
    what = what.replace("{}", _line(f"{type(e).__name__}: {e}", key))
    return _LATE if isinstance(e, TimeoutError) else _Reply(None, 0, what, todo, heals)


def _retry_after(headers: HTTPMessage) -> float:
    """Seconds; 0 where the server does not say."""
    value = headers.get("Retry-After", "").strip()
    with suppress(ValueError, TypeError, OverflowError):
        if re.fullmatch(r"\d{1,9}(\.\d*)?", value, re.ASCII):
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _said(data: Any, body: bytes, key: str) -> str:
    """A server's own words, in one short line."""
    for name in ("error", "message", "detail"):
        if isinstance(data, dict) and data.get(name):
            return _said(data[name], b"", key)
    if data is None:
        data = body[:65536].decode("utf-8", "replace")
    text = data if isinstance(data, str) else json.dumps(data)
    return "an HTML page" if re.match(r"\s*<(!doctype|html)", text, re.IGNORECASE) else _line(text, key)


def _hide(text: str, key: str) -> str:
    forms = {key, quote(key, safe=""), json.dumps(key)[1:-1]} if key else set()
    for form in map(re.escape, forms):  # a short "key" is a word that some servers want, like EMPTY: hidden as a word only
        text = re.sub(form if len(key) >= 8 else rf"(?<!\w){form}(?!\w)", "***", text, flags=re.IGNORECASE)
    return text


def _line(text: str, key: str) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in _hide(text, key)[:4096]).split())
    return text if len(text) <= 240 else text[:240] + "..."


def _rid(value: Any, key: str) -> Any:
    """JSON without the key, and without the halves of characters that no file can hold."""
    if isinstance(value, str):
        return (_hide(value, key) if len(key) >= 8 else value).encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_rid(v, key) for v in value]
    return {_rid(k, key): _rid(v, key) for k, v in value.items()} if isinstance(value, dict) else value
