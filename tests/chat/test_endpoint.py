"""The chat model behind a server, against real servers on this machine that behave well, slowly and badly. Nothing is mocked."""

import base64
import io
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from promptloop_pipeline import RefinerError, attach, tiny
from promptloop_pipeline.chat import Completion, Sampling
from promptloop_pipeline.chat.endpoint import EndpointChat
from promptloop_pipeline.refiners.mllm import MLLMRefiner
from promptloop_pipeline.trajectory import save

from .server import ANSWER, BEHAVIOURS, Server

KEY = "sk-Secret/4f2+9a=7c31"
WHICH = "is this the address of an OpenAI-style server?"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("PROMPTLOOP_API_KEY", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("PROMPTLOOP_API_KEY", KEY)


def chat(server, **options):
    return EndpointChat(getattr(server, "url", server), **{"retries": 0, "timeout": 5.0} | options)


def one(server, conversation="a cat", sampling=None, **options):
    [completion] = chat(server, **options).generate([conversation], sampling or Sampling())
    return completion


def picture(width=8, height=6):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def message(*parts, role="user"):
    return {"role": role, "content": list(parts)}


TEXT = {"type": "text", "text": "what is it?"}


# what is asked


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/chat/completions/"])
def test_one_server_by_all_its_addresses(end):
    with Server() as server:
        assert one(server.url + end) == Completion(ANSWER, tokens=7)
        assert one(server.url.removeprefix("http://") + end).text == ANSWER
        assert {(m, p) for m, p, _ in server.calls} == {("GET", "/v1/models"), ("POST", "/v1/chat/completions")}


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://api.groq.com/openai", "https://api.groq.com/openai/v1"),
        ("https://host/api/v3", "https://host/api/v3"),
        ("https://host/v1beta/openai/chat/completions", "https://host/v1beta/openai"),
        ("[::1]:8000", "http://[::1]:8000/v1"),
        (" HTTP://host:1 ", "http://host:1/v1"),
        ("http://host/a b", None),
        ("http://host/\u00e9", "http://host/%C3%A9/v1"),
        *((bad, None) for bad in ("", "localhost", "Qwen/Qwen3-VL-4B", "ftp://host:1", "http://", "http://h:99999", "h:x", "http://[::1")),
        *((bad, None) for bad in ("http://a\nb", "file:///etc/passwd", 5, None)),
    ],
)  # fmt: skip
def test_addresses(url, base):
    if base is not None:
        assert chat(url).url == base
        return
    with pytest.raises(ValueError, match=r"^url is .*; use http://host:port") as e:
        chat(url)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("url", [f"http://{KEY}@host", f"http://u:{KEY}@host:1", f"{KEY}@host:1", f"http://host/v1?key={KEY}"])
def test_a_key_in_the_address_is_refused_and_not_shown(url):
    with pytest.raises(ValueError, match="a key belongs into the environment variable PROMPTLOOP_API_KEY") as e:
        chat(url)
    assert hidden(str(e.value))


@pytest.mark.parametrize(
    ("option", "value"), [("timeout", 0), ("timeout", float("nan")), ("timeout", "1"), ("retries", -1), ("concurrency", 0)]
)
def test_numbers_that_make_no_sense(option, value):
    with pytest.raises(ValueError, match=f"^{option} is .*; use"):
        chat("host:1", **{option: value})


def test_messages_and_pictures():
    image = picture()
    conversation = [message(TEXT, role="system"), message(TEXT, {"type": "image", "image": image}, TEXT)]
    with Server() as server:
        one(server, conversation, Sampling(max_new_tokens=9, temperature=0.5, top_p=0.9, seed=3))
        [body] = server.requests
    assert body["messages"][0] == {"role": "system", "content": "what is it?"}
    first, shown, last = body["messages"][1]["content"]
    assert first == last == TEXT
    head, data = shown["image_url"]["url"].split(",")
    assert shown["type"] == "image_url" and head == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), np.asarray(image))
    del body["messages"]
    assert body == {"model": "tiny-vlm", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3 * 1_000_033}


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "I;16"])
def test_pictures_of_all_kinds(mode):
    image = Image.new(mode, (4, 4)) if mode == "I;16" else picture().convert(mode)
    with Server() as server:
        assert one(server, [message({"type": "image", "image": image})]).text == ANSWER


def test_large_pictures_go_as_jpeg():
    with Server() as server:
        one(server, [message({"type": "image", "image": picture(1024, 1024)})])
        url = server.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,") and len(url) < 2**21
    assert Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size == (1024, 1024)


def test_a_bare_text_is_one_message():
    with Server() as server:
        one(server, "a cat, ")
        assert server.requests[0]["messages"] == [{"role": "user", "content": "a cat, "}]


def test_answers_in_order_and_requests_bounded():
    with Server("slowly", answer=lambda b: b["messages"][0]["content"] + "!", seconds=0.1) as server:
        said = chat(server, concurrency=3).generate([f"p{k}" for k in range(10)], Sampling(seed=5))
        assert [c.text for c in said] == [f"p{k}!" for k in range(10)]
        assert server.most == 3
        seeds = {b["messages"][0]["content"]: b["seed"] for b in server.requests}
        chat(server).generate(["again"] * 10, Sampling(seed=6))  # another turn's noise is other noise
        assert [seeds[f"p{k}"] - seeds["p0"] for k in range(10)] == list(range(10))
        assert not {b["seed"] for b in server.requests[10:]} & {*seeds.values()} and max(seeds.values()) < 2**31


def test_nothing_to_ask():
    assert chat("127.0.0.1:9").generate([], Sampling()) == []


def test_no_beam_search():
    with pytest.raises(ValueError, match="^num_beams is 8; a server has no beam search, use num_beams=1$"):
        chat("127.0.0.1:9").generate(["a"], Sampling(num_beams=8))


def test_several_threads_share_one():
    with Server("slowly", answer=lambda b: b["messages"][0]["content"], seconds=0.05) as server:
        model, said = chat(server), {}

        def work(name):
            said[name] = [c.text for c in model.generate([f"{name}{k}" for k in range(5)], Sampling())]

        threads = [threading.Thread(target=work, args=(n,)) for n in "abcd"]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert said == {n: [f"{n}{k}" for k in range(5)] for n in "abcd"}


# which model


def test_the_first_model_is_taken_once_and_said(caplog):
    with Server(models=("nomic-embed-text", "b", "c")) as server:
        model = chat(server)
        for _ in range(3):
            assert model.generate(["a"], Sampling())[0].text == ANSWER
        assert [b["model"] for b in server.requests] == ["b"] * 3
        assert [m for m, _, _ in server.calls].count("GET") == 1
    assert "has several models; 'b' is taken, name another one with model=" in caplog.text


@pytest.mark.parametrize("behaviour", ["well", "shape", "405"])
def test_without_a_list_of_models(behaviour):
    with Server(models=None if behaviour == "well" else ("default",), models_behaviour=behaviour) as server:
        assert one(server).text == ANSWER
        assert server.requests[0]["model"] == "default"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"models": ()}, "/v1/models: the server has no model; load one there first"),
        ({"models_behaviour": "503"}, "/v1/models: HTTP 503: status 503, as scripted; see the server's log"),
        ({"models_behaviour": "401"}, "set the environment variable PROMPTLOOP_API_KEY to the key"),
        ({"models_behaviour": "closes"}, "closed the connection"),
        ({"models_behaviour": "html"}, f"the answer is no JSON: an HTML page; {WHICH}"),
    ],
)
def test_no_model_to_be_had(options, error):
    with Server(**options) as server:
        said = chat(server).generate(["a", "b"], Sampling())
        assert len(said) == 2 and all(error in c.error and server.url in c.error for c in said)
        assert not server.requests


def test_a_model_that_the_server_does_not_have():
    with Server(models=("a", "b")) as server:
        error = one(server, model="q").error
        assert one(server, model="b").text == ANSWER
    assert "HTTP 404: The model `q` does not exist.; check the address and the model's name" in error
    assert error.endswith("(it was asked for model 'q', and has: a, b)")


def test_a_server_that_was_started_again_with_another_model():
    with Server(models=("old",)) as server:
        model = chat(server)
        model.generate(["a"], Sampling())
        server.models = ("new",)
        assert "has: new" in model.generate(["a"], Sampling())[0].error
        assert model.generate(["a"], Sampling())[0].text == ANSWER


# what comes back


@pytest.mark.parametrize(
    ("behaviour", "text", "tokens"),
    [
        ("parts", ANSWER, 7),
        ("reasoning", f"<think>it looks blue</think>{ANSWER}", 7),
        ("reasoning_content", f"<think>it looks blue</think>{ANSWER}", 7),
        ("only reasoning", "<think>it looks</think>", 7),
        ("odd usage", ANSWER, None),
        ("surrogate", "<answer>a ? cat</answer>", 7),
    ],
)
def test_good_answers_of_all_kinds(behaviour, text, tokens):
    with Server(behaviour) as server:
        assert one(server) == Completion(text, tokens=tokens)


FAILURES = {
    "400": "HTTP 400: status 400, as scripted; the server refuses this request",
    "403": "HTTP 403: status 403, as scripted; set the environment variable PROMPTLOOP_API_KEY to the key",
    "404": "HTTP 404: status 404, as scripted; check the address and the model's name",
    "429": "HTTP 429: status 429, as scripted; lower concurrency, or wait",
    "500": "HTTP 500: status 500, as scripted; see the server's log",
    "502": "HTTP 502: status 502, as scripted; see the server's log",
    "418": "HTTP 418: status 418, as scripted; the server refuses",
    "204": "HTTP 204, but the answer is empty",
    "closes": "the server closed the connection",
    "half": "the answer broke off half-way",
    "broken chunks": "the answer broke off half-way",
    "truncated": f'HTTP 200, but the answer is no JSON: {{"id": "1", "object": "chat.completion",; {WHICH}',
    "html": f"HTTP 200, but the answer is no JSON: an HTML page; {WHICH}",
    "binary": "HTTP 200, but the answer is no JSON",
    "no http": "no answer that can be read (BadStatusLine",
    "empty": f"HTTP 200, but the answer is empty; {WHICH}",
    "shape": f"the answer is no chat completion (an object with result); {WHICH}",
    "list": f"the answer is no chat completion (list); {WHICH}",
    "null": f"the answer is no chat completion (NoneType); {WHICH}",
    "no choices": "the answer is no chat completion (an object with choices)",
    "types": "the answer has no text (content 7, finish_reason None)",
    "none": "the answer has no text (content None, finish_reason 'stop')",
    "deep": "HTTP 200, but the answer is no JSON",
    "huge": "HTTP 200, but the answer is longer than 4 MB",
    "error as 200": "HTTP 200, but an error for an answer: out of memory; see the server's log",
    "redirect": "HTTP 307, redirected to http://127.0.0.1:9/; redirects are not followed: give that address",
}


@pytest.mark.parametrize("behaviour", FAILURES)
def test_a_bad_answer_is_one_clear_line(behaviour):
    with Server(behaviour, where="http://127.0.0.1:9") as server:
        said = one(server)
        assert said.text == "" and said.error.startswith(f"{server.url}/v1/chat/completions: {FAILURES[behaviour]}")
    assert said.error.isprintable() and len(said.error) < 500


def test_every_behaviour_is_tested():
    good = {
        "well",
        "slowly",
        "parts",
        "reasoning",
        "reasoning_content",
        "only reasoning",
        "odd usage",
        "surrogate",
        "key in answer",
    }
    assert set(BEHAVIOURS) == good | {b for b in FAILURES if not b.isdecimal()} | set(LATE) | set(LEAKS)


def test_one_failure_leaves_the_others_alone():
    with Server("well", "500", "html", "well") as server:
        said = chat(server, concurrency=1).generate(
            ["a", "b", "c", [message({"type": "image", "image": None})], "e"], Sampling()
        )
    assert [bool(c.error) for c in said] == [False, True, True, True, False]
    assert "conversation 3 cannot be sent to" in said[3].error


# time

LATE = ("silent", "drip", "drip head")


@pytest.mark.parametrize("behaviour", LATE)
def test_the_whole_request_is_bounded(behaviour):
    with Server(behaviour) as server:
        clock = time.monotonic()
        error = one(server, timeout=0.25).error
        assert time.monotonic() - clock < 4
        assert error == (
            f"{server.url}/v1/chat/completions: no whole answer in time; it had 0.25 s: raise timeout, or ask for fewer tokens"
        )
        assert not busy_threads()


def busy_threads(patience=2.0):
    """Threads of requests that were given up and have still not noticed."""
    end = time.monotonic() + patience
    while left := [t for t in threading.enumerate() if t.name == "promptloop-endpoint"]:
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    return left


def test_a_slow_answer_in_time():
    with Server("slowly", seconds=0.5) as server:
        assert one(server, timeout=3).text == ANSWER


def test_a_caller_that_was_held_up_still_takes_what_came_in_time():
    with Server() as server:
        model = chat(server, timeout=0.5)
        model.generate(["a"], Sampling())
        model.on_token = lambda: time.sleep(0.6)
        assert [c.text for c in model.generate(["a", "b"], Sampling())] == [ANSWER] * 2


def test_what_can_heal_is_asked_again():
    broken = ["500", "502", "503", "504", "429", "closes", "half", "broken chunks"]
    with Server(*broken, "well") as server:
        said = chat(server, retries=1).generate(["a cat"] * len(broken), Sampling())
        assert [c.text for c in said] == [ANSWER] * len(broken)
        assert len(server.requests) == 2 * len(broken)


@pytest.mark.parametrize("behaviour", ["400", "401", "403", "404", "501", "html", "empty", "truncated", "redirect"])
def test_what_cannot_heal_is_asked_once(behaviour):
    with Server(behaviour) as server:
        assert one(server, retries=3).error
        assert len(server.requests) == 1


def test_a_time_out_heals_once():
    with Server("silent") as server:
        assert "no whole answer in time (2 attempts);" in one(server, retries=3, timeout=0.2).error
        assert len(server.requests) == 2
    with Server("silent", "well") as server:
        assert one(server, retries=1, timeout=0.6).text == ANSWER


def test_pauses_grow_and_end():
    with Server("500") as server:
        assert "HTTP 500: status 500, as scripted (3 attempts); see" in one(server, retries=2).error
        first, second = np.diff(server.times)
    assert 0.25 <= first < 2 and 0.5 <= second < 4


def test_a_server_says_when_to_ask_again():
    with Server("429", "well", headers={"Retry-After": "1"}) as server:
        assert one(server, retries=1).text == ANSWER
        assert 1.0 <= np.diff(server.times)[0] < 4


@pytest.mark.parametrize("value", ["3600", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_too_long_a_wait_is_given_up_at_once(value):
    with Server("429", headers={"Retry-After": value}) as server:
        assert re.search(r"to be asked again in \d+ s; that is too long to wait for$", one(server, retries=3).error)
        assert len(server.requests) == 1


def test_a_wait_that_says_nothing():
    def answer(value):
        with Server("429", "well", headers={"Retry-After": value}) as server:
            return one(server, retries=1).text

    values = ["soon", "-5", "", "1e999", "9" * 5000, "Fri, 99 Dec", "Wed, 21 Oct 2015 07:28:00 GMT"]
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(answer, values)) == [ANSWER] * len(values)


def test_nobody_there():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
    assert one(url).error == f"{url}/v1/models: connection refused; is the server running, and on this port?"
    assert "refused (2 attempts);" in one(url, retries=1).error


def test_a_name_that_nobody_has():
    assert "http://nowhere.invalid:8000/v1/models: " in one("http://nowhere.invalid:8000", timeout=2).error


def test_a_server_without_tls():
    with Server() as server:
        assert "no secure connection" in one(server.url.replace("http:", "https:")).error


def test_through_a_proxy(monkeypatch):
    with Server() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert one("http://nowhere.invalid:8000").text == ANSWER
        assert {p for _, p, _ in proxy.calls} == {f"http://nowhere.invalid:8000/v1/{r}" for r in ("models", "chat/completions")}
        with Server() as server:
            assert one(server).text == ANSWER  # this machine needs no proxy
            assert len(server.requests) == 1
        monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:9")
        assert "a socks5 proxy, only http works; name nowhere.invalid in no_proxy" in one("http://nowhere.invalid").error


# giving up


class Stop(Exception):
    pass


def stopping(polls):
    """An `on_token` that stops at its nth call."""
    calls = []

    def poll():
        calls.append(threading.current_thread())
        if len(calls) > polls:
            raise Stop

    poll.calls = calls
    return poll


@pytest.mark.parametrize(
    ("behaviour", "headers"), [("silent", {}), ("drip", {}), ("drip head", {}), ("429", {"Retry-After": "20"})]
)
def test_a_stop_gets_through_at_once(behaviour, headers):
    with Server(behaviour, headers=headers) as server:
        model = chat(server, timeout=60, retries=9, model="tiny-vlm")
        model.on_token = stopping(4)
        clock = time.monotonic()
        with pytest.raises(Stop):
            model.generate(["a"] * 3, Sampling())
        assert 0.1 < time.monotonic() - clock < 4
        assert set(model.on_token.calls) == {threading.current_thread()}
        assert not busy_threads()
        model.on_token = None
        server.behaviours, server.headers = ["well"], {}
        assert model.generate(["a"], Sampling())[0].text == ANSWER


@pytest.mark.parametrize(("behaviour", "headers"), [("silent", {}), ("429", {"Retry-After": "20"})])
def test_keyboard_interrupt_gets_through_at_once(behaviour, headers):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of a parallel test run ignore it
    try:
        interrupted(behaviour, headers)
    finally:
        signal.signal(signal.SIGINT, previous)


def interrupted(behaviour, headers):
    with Server(behaviour, headers=headers) as server:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        clock = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            one(server, timeout=60, retries=9)
        assert time.monotonic() - clock < 4
        timer.join()
        assert not busy_threads()


def test_the_interpreter_can_exit_while_a_request_is_out():
    code = (
        "import sys, threading, time; from promptloop_pipeline.chat.endpoint import EndpointChat\n"
        "from promptloop_pipeline.chat import Sampling\n"
        "c = EndpointChat(sys.argv[1], timeout=60)\n"
        "threading.Thread(target=c.generate, args=(['a'], Sampling()), daemon=True).start(); time.sleep(0.5)"
    )
    with Server("silent") as server:
        clock = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code, server.url], check=False, capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stderr) == (0, "") and len(server.requests) == 1
        assert time.monotonic() - clock < 10


# the key

LEAKS = ("401", "key in text", "key in answer", "key in status", "key in garbage", "key in shape", "redirect")


def test_the_key_is_sent_and_kept_nowhere(key):
    with Server(key=KEY) as server:
        model = chat(server)
        assert model.generate(["a"], Sampling())[0].text == ANSWER
        assert {h["Authorization"] for _, _, h in server.calls} == {f"Bearer {KEY}"}
    assert KEY not in repr(model) + repr(vars(model)) and KEY.encode() not in pickle.dumps(model)


def test_another_variable(monkeypatch):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    with Server("401") as server:
        error = one(server, key_env="MY_KEY").error
        assert server.calls[0][2]["Authorization"] == f"Bearer {KEY}"
    assert "check the key in the environment variable MY_KEY" in error


def test_without_a_key_none_is_sent_and_least_of_all_the_hubs(monkeypatch, tmp_path):
    code = (
        "import sys, huggingface_hub; from promptloop_pipeline.chat.endpoint import EndpointChat\n"
        "from promptloop_pipeline.chat import Sampling\n"
        "assert huggingface_hub.get_token() == 'hf_stored'\n"
        "print(EndpointChat(sys.argv[1]).generate(['a'], Sampling())[0].text)"
    )
    (tmp_path / "token").write_text("hf_stored")
    with Server() as server:
        env = {**os.environ, "HF_HOME": str(tmp_path), "HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HUB_OFFLINE": "1"}
        env.pop("HF_TOKEN", None)
        done = subprocess.run(
            [sys.executable, "-c", code, server.url], check=False, capture_output=True, text=True, env=env, timeout=60
        )
        assert done.stdout.strip() == ANSWER, done.stderr
        assert not [h for _, _, h in server.calls if "authorization" in {n.lower() for n in h}]


@pytest.mark.parametrize("behaviour", LEAKS)
def test_a_key_that_comes_back_is_hidden(behaviour, key, caplog):
    caplog.set_level(logging.DEBUG)
    with Server() as elsewhere, Server(behaviour, where=elsewhere.url) as server:
        said = one(server)
        assert not elsewhere.calls
        assert [h for _, _, h in server.calls if KEY in h.get("Authorization", "")]
    assert hidden(repr(said) + caplog.text)
    assert "***" in (said.error or said.text)


def hidden(text):
    return not [k for k in (KEY, KEY.lower(), "Secret", "+9a=") if k in text]


@pytest.mark.parametrize("where", ["models", "chat"])
def test_a_key_in_the_list_of_models(key, where, caplog):
    with Server("well", models=(f"a-{KEY}", "b")) as server:
        error = one(server, model="q" if where == "chat" else None).error
    assert error and hidden(error + caplog.text)


@pytest.mark.parametrize("bad", ["sk-\u00e9t\u00e9-secret", "sk-two\nlines-secret", "sk-\x07secret"])
def test_a_key_that_cannot_be_sent(bad, monkeypatch):
    monkeypatch.setenv("PROMPTLOOP_API_KEY", bad)
    with Server() as server:
        error = one(server).error
        assert not server.calls
    assert error.endswith(
        "the key has characters that no request can hold; correct the environment variable PROMPTLOOP_API_KEY"
    )


def test_a_key_that_is_none(monkeypatch):
    """Servers without keys get words such as EMPTY; answers with these words stay as they are."""
    monkeypatch.setenv("PROMPTLOOP_API_KEY", "EMPTY")
    with Server(answer="an EMPTY room, emptyhanded") as server:
        assert one(server).text == "an EMPTY room, emptyhanded"
        server.behaviours = ["401"]
        assert "bad key in 'Bearer ***'" in one(server).error


def test_the_key_is_in_no_frame_of_a_stop(key):
    with Server("silent") as server:
        model = chat(server, model="tiny-vlm")
        model.on_token = stopping(3)
        with pytest.raises(Stop) as e:
            model.generate(["a"], Sampling())
    frames = []
    at = e.value.__traceback__
    while at:
        frames.append(repr({**at.tb_frame.f_locals}) if "promptloop_pipeline" in at.tb_frame.f_code.co_filename else "")
        at = at.tb_next
    assert any(frames) and hidden("".join(frames))
    assert e.value.__context__ is None and e.value.__cause__ is None


def test_prompts_are_not_logged(caplog):
    caplog.set_level(logging.DEBUG)
    with Server("well", "500") as server:
        chat(server, concurrency=1).generate(["a very private cat", "a very private dog"], Sampling())
    assert "private" not in caplog.text


# in the pipeline


@pytest.fixture(scope="module")
def loop():
    return attach(tiny.load_pipeline("sd"), num_inference_steps=2, refine_at="1")


@pytest.fixture(scope="module")
def stock(loop):
    """What the pipeline makes without a refiner."""
    return loop("a red circle", refiner=None, generator=torch.Generator().manual_seed(0)).images[0]


def test_end_to_end(loop):
    with Server("reasoning", answer="<answer>a red square</answer>") as server:
        out = loop(["a red circle", "a blue circle"], refiner=MLLMRefiner.from_endpoint(server.url, max_new_tokens=40))
        assert len(server.requests) == 2
        body = server.requests[0]
    assert (body["max_tokens"], body["temperature"]) == (40, 0.0)
    assert [p["type"] for p in body["messages"][-1]["content"]].count("image_url") == 1
    for t, request in zip(out.trajectories, ["a red circle", "a blue circle"], strict=True):
        [turn] = t.turns
        assert (turn.before, turn.after, turn.error, turn.tokens) == (request, "a red square", None, 7)
        assert turn.reasoning == "it looks blue"


@pytest.mark.parametrize("behaviour", sorted({*FAILURES, *LATE, *LEAKS, "only reasoning"}))
def test_a_failing_server_never_loses_the_picture(behaviour, loop, stock, key, caplog, tmp_path):
    caplog.set_level(logging.DEBUG, "promptloop")
    with Server() as elsewhere, Server(behaviour, where=elsewhere.url) as server:
        refiner = MLLMRefiner(EndpointChat(server.url, retries=0, timeout=0.25 if behaviour in LATE else 5.0))
        out = loop("a red circle", refiner=refiner, generator=torch.Generator().manual_seed(0))
        assert out.images[0].size == stock.size
        [turn] = out.trajectories[0].turns
        if behaviour == "key in answer":
            assert turn.after == "Bearer ***"
        elif behaviour == "only reasoning":
            assert turn.after == turn.before and turn.error == "there is no prompt in what the model said"
            assert out.images[0].tobytes() == stock.tobytes()
        else:
            assert out.images[0].tobytes() == stock.tobytes()
            assert turn.after == turn.before and turn.boundary == "refiner" and server.url in turn.error
        save(out.trajectories, tmp_path)
        assert not elsewhere.calls
    written = b"".join(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
    assert written and hidden(written.decode("latin-1"))
    assert hidden(caplog.text + repr(refiner))


@pytest.mark.parametrize("behaviour", ["401", "silent"])
def test_a_strict_run_stops_with_one_clear_line(behaviour, loop, key):
    with Server(behaviour) as server, pytest.raises(RefinerError, match="^step 1: http://127.0.0.1:") as e:
        loop("a red circle", refiner=MLLMRefiner.from_endpoint(server.url, retries=0, timeout=0.25), strict=True)
    assert str(e.value).isprintable() and hidden(str(e.getrepr(showlocals=True, chain=True)))


def test_a_stop_ends_the_run(loop):
    with Server("silent") as server:
        refiner = MLLMRefiner.from_endpoint(server.url)
        refiner.on_token = stopping(4)
        with pytest.raises(Stop):
            loop("a red circle", refiner=refiner, cancel=(Stop,))
