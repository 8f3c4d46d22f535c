"""Ask Me, without ComfyUI: an artist in a thread of the test answers what a session asks."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from comfy_nodes import answers
from comfy_nodes.answers import Asked, AskMe, answer, asked, open_questions
from promptloop_pipeline import FunctionRefiner, Refinement, Session, View
from promptloop_pipeline.trajectory import load, save

CAT = "a red cat on a mat"


class Cancel(Exception):
    """As a host raises it when the user cancels."""


class Artist:
    """A host whose browser answers at once. say(question) -> what it posts; None: it does not answer."""

    def __init__(self, say=lambda question: None):
        self.say, self.client, self.connection, self.stop = say, "browser", object(), False
        self.sent, self.replies = [], []

    def present(self):
        return None if self.client is None else (self.client, self.connection)

    def send(self, event, data):
        self.sent.append((event, data))
        if event == "ask" and (body := self.say(data)) is not None:
            self.replies.append(answer({"id": data["id"], **body}))

    def where(self):
        return {"prompt_id": "1", "node": "7"}

    def interrupted(self):
        return self.stop

    def is_cancel(self, error):
        return isinstance(error, Cancel)

    def picture(self, image):
        return f"data:{image.size}"

    def asked(self):
        return [data for event, data in self.sent if event == "ask"]

    def closed(self):
        return [data["outcome"] for event, data in self.sent if event == "asked"]


def turn(host, refiner=None, seconds=20, accept=True, **options):
    """One turn of a real session."""
    session = Session([CAT], AskMe(refiner, host, seconds, accept), "3", **options)
    session.start(10)
    session.observe(3, 0.5, lambda: [Image.new("RGB", (8, 8))])
    return session.finish(None)[0].turns[0]


def suggests(prompt="a red cat, sitting"):
    return FunctionRefiner(lambda view: Refinement(prompt, "it stands", "<answer>", (1, 2), (-0.1, -0.2)))


def test_a_question_shows_what_the_artist_needs():
    host = Artist(lambda q: {"action": "accept"})
    turn(host, suggests())
    (question,) = host.asked()
    assert question.pop("id") and 18 <= question.pop("seconds") <= 20
    assert question == {
        "prompt_id": "1", "node": "7", "sample": 0, "request": CAT, "before": CAT, "suggestion": "a red cat, sitting",
        "reasoning": "it stands", "step": 3, "num_steps": 10, "image": "data:(8, 8)",
    }  # fmt: skip
    assert host.closed() == ["accept"] and host.replies == [(200, "thank you")]


@pytest.mark.parametrize(
    "say, refiner, after, what, kept",
    [
        ({"action": "accept"}, suggests(), "a red cat, sitting", Asked("artist", "accept", "a red cat, sitting"), True),
        ({"action": "edit", "prompt": "x"}, suggests(), "x", Asked("artist", "edit", "a red cat, sitting"), False),
        ({"action": "edit", "prompt": "a red cat, sitting"}, suggests(), "a red cat, sitting",
         Asked("artist", "accept", "a red cat, sitting"), True),
        ({"action": "skip"}, suggests(), CAT, Asked("artist", "skip", "a red cat, sitting"), False),
        ({"action": "accept"}, suggests(None), CAT, Asked("artist", "accept", CAT), True),  # it suggests to keep the prompt
        ({"action": "edit", "prompt": "x"}, None, "x", Asked("artist", "edit", None), False),
        ({"action": "skip"}, None, CAT, Asked("artist", "skip", None), False),
    ],
)  # fmt: skip
def test_what_the_artist_says_is_done_and_recorded(say, refiner, after, what, kept):
    found = turn(Artist(lambda q: say), refiner)
    assert found.after == after and asked(found) == what and found.error is None
    if refiner is not None:
        assert found.raw == "<answer>" and found.reasoning == "it stands"
        assert (found.token_ids is not None) == kept  # else they are not what was used


@given(suggestion=st.text(min_size=1).filter(str.strip), edited=st.text(min_size=1).filter(str.strip))
@settings(max_examples=40, deadline=None)
def test_suggestion_and_answer_are_read_back_from_a_saved_record(tmp_path_factory, suggestion, edited):
    host = Artist(lambda q: {"action": "edit", "prompt": edited})
    session = Session([CAT], AskMe(suggests(suggestion), host, 20, True), "start")
    session.start(4)
    session.observe(0, None, None)
    folder = tmp_path_factory.mktemp("record")
    save(session.trajectories, folder)
    (found,) = load(folder)[0].turns
    action = "accept" if edited == suggestion else "edit"
    assert (asked(found), found.after) == (Asked("artist", action, suggestion), edited)


@pytest.mark.parametrize("accept, after", [(True, "a red cat, sitting"), (False, CAT)])
@pytest.mark.parametrize("gone", [True, False])
def test_without_an_answer_the_default_decides(accept, after, gone):
    host = Artist()
    host.client = None if gone else "browser"
    clock = time.monotonic()
    found = turn(host, suggests(), 0.5, accept)
    assert time.monotonic() - clock < (0.3 if gone else 2)
    assert found.after == after
    assert asked(found) == Asked("nobody", "accept" if accept else "skip", "a red cat, sitting")
    assert host.closed() == ([] if gone else ["timeout"])


def test_a_batch_is_asked_one_by_one_and_not_for_longer_than_somebody_is_there():
    said = iter([{"action": "edit", "prompt": "first"}, None])
    host = Artist(lambda q: next(said))
    refiner = AskMe(suggests(), host, 0.4, True)
    found = refiner.refine([View(CAT, CAT, 0, 4)] * 4)
    assert [a.prompt for a in found] == ["first", *["a red cat, sitting"] * 3]
    assert [q["sample"] for q in host.asked()] == [0, 1]  # nobody answered the second, so the others were not asked


def test_a_failing_suggestion_is_told_and_the_artist_asked_all_the_same():
    def fails(view):
        raise OSError("no server at localhost")

    host = Artist(lambda q: {"action": "edit", "prompt": "mine"})
    found = turn(host, FunctionRefiner(fails))
    assert found.after == "mine" and found.error is None and "no server" in found.notes[0]
    assert host.asked()[0]["suggestion"] is None and "no server" in host.asked()[0]["reasoning"]
    alone = Artist()
    alone.client = None
    found = turn(alone, FunctionRefiner(fails))
    assert found.after == CAT and "no server" in found.error  # a failure stays one, where no artist made up for it


def test_a_cancel_within_the_suggestion_gets_through():
    def cancels(view):
        raise Cancel

    with pytest.raises(Cancel):
        turn(Artist(), FunctionRefiner(cancels), cancel=Cancel)


def test_an_interrupted_run_closes_the_question_at_once():
    host = Artist()
    threading.Timer(0.3, lambda: setattr(host, "stop", True)).start()
    clock = time.monotonic()
    found = turn(host, suggests(), interrupted=lambda: host.stop)
    assert time.monotonic() - clock < 1.5 and found.after == CAT
    assert host.closed() == ["interrupted"] and not open_questions("browser")
    assert answer({"id": host.asked()[0]["id"], "action": "skip"})[0] == 404


def test_a_run_that_ends_meanwhile_closes_the_question():
    host = Artist()
    session = Session([CAT], AskMe(None, host, 60, True), "2", asynchronous=True)
    session.start(10)
    session.observe(2, 0.5, lambda: [Image.new("RGB", (8, 8))])
    until = time.monotonic() + 5
    while not host.asked() and time.monotonic() < until:
        time.sleep(0.01)
    session.finish(None)
    while not host.closed() and time.monotonic() < until:
        time.sleep(0.01)
    assert host.closed() == ["interrupted"] and "too late" in session.trajectories[0].turns[0].notes[0]


def test_a_browser_that_loads_its_page_again_is_asked_again():
    host = Artist()

    def again():
        host.connection = object()
        host.say = lambda q: {"action": "edit", "prompt": "second page"}

    threading.Timer(0.3, again).start()
    found = turn(host, suggests())
    first, second = host.asked()
    assert first["id"] == second["id"] and found.after == "second page"


def test_a_browser_that_is_gone_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(answers, "GRACE", 0.3)
    host = Artist()
    threading.Timer(0.2, lambda: setattr(host, "client", None)).start()
    found = turn(host, suggests(), 60)
    assert asked(found).by == "nobody" and host.closed() == ["gone"]


def test_answers_reach_their_own_question():
    hosts = [Artist() for _ in range(8)]
    found = {}

    def run(k):
        found[k] = turn(hosts[k], suggests(f"suggestion {k}"))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    until = time.monotonic() + 10
    while not all(h.asked() for h in hosts) and time.monotonic() < until:
        time.sleep(0.01)
    assert len(open_questions("browser")) == 8
    for k in reversed(range(8)):
        assert answer({"id": hosts[k].asked()[0]["id"], "action": "edit", "prompt": f"answer {k}"}) == (200, "thank you")
    for t in threads:
        t.join(10)
    assert [found[k].after for k in range(8)] == [f"answer {k}" for k in range(8)]
    assert not open_questions("browser")


@pytest.mark.parametrize(
    "body, status",
    [
        (None, 400), ([], 400), ({}, 400), ({"id": 5, "action": "skip"}, 400), ({"action": "skip"}, 400), ({"id": "ID"}, 400),
        ({"id": "ID", "action": "stop"}, 400), ({"id": "ID", "action": "edit"}, 400),
        ({"id": "ID", "action": "edit", "prompt": " "}, 400),
        ({"id": "ID", "action": "edit", "prompt": 5}, 400), ({"id": "ID", "action": "edit", "prompt": "x" * 10_001}, 400),
        ({"id": "ID", "action": "accept"}, 400), ({"id": "other", "action": "skip"}, 404),
    ],
)  # fmt: skip
def test_a_bad_answer_gets_one_line_and_leaves_the_question_open(body, status):
    said = []

    def say(question):
        sent = {**body, "id": question["id"]} if isinstance(body, dict) and body.get("id") == "ID" else body
        said.append(answer(sent))
        assert [q["id"] for q in open_questions("browser")] == [question["id"]] and not open_questions("another")
        return {"action": "edit", "prompt": "good"}

    found = turn(Artist(say))
    ((got, line),) = said
    assert got == status and line and "\n" not in line and found.after == "good"
    assert answer({"id": "gone", "action": "skip"})[0] == 404


def test_several_questions_of_a_run_know_the_earlier_turns():
    said = iter(["one", "two", "three"])
    host = Artist(lambda q: {"action": "edit", "prompt": next(said)})
    session = Session([CAT], AskMe(None, host, 20, True), "start, 3, 6")
    session.start(10)
    for step in range(10):
        session.observe(step, 0.5, (lambda: [Image.new("RGB", (8, 8))]) if step else None)
    assert [t.after for t in session.trajectories[0].turns] == ["one", "two", "three"]
    assert [q["before"] for q in host.asked()] == [CAT, "one", "two"]


def test_a_turn_that_asked_nobody_is_not_taken_for_one():
    (plain,) = [turn(Artist(), None, 0.1)]
    assert asked(plain).by == "nobody"
    session = Session([CAT], suggests(), "start")
    session.start(3)
    session.observe(0, None, None)
    assert asked(session.trajectories[0].turns[0]) is None
