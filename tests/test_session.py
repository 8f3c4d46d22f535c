"""The loop without any host: a for-loop, pictures of one colour, scripted refiners."""

import subprocess
import sys
import threading
import time

import pytest
from PIL import Image

import promptloop_pipeline.look
from promptloop_pipeline import FunctionRefiner, NoOpRefiner, Refinement, RefinerError, ScheduleRefiner, Session


def images(n):
    return [Image.new("RGB", (2, 2), (k, k, k)) for k in range(n)]


def run(session, num_steps, asked=None):
    """Drives a session like a host; returns the prompts in force at each step."""
    session.start(num_steps)
    force, prompts = [], list(session.prompts)
    for step in range(num_steps):

        def preview(step=step):
            if asked is not None:
                asked.append(step)
            return images(len(prompts))

        prompts = session.observe(step, 1.0 - step / num_steps, preview if step else None) or prompts
        force.append(tuple(prompts))
    session.finish(images(len(prompts)))
    return force


def test_prompts_change_from_the_turn_on():
    session = Session(["a", "b"], ScheduleRefiner({2: "c"}), "2, 4")
    assert run(session, 6) == [("a", "b")] * 2 + [("c", "c")] * 4
    first = session.trajectories[0]
    assert [(t.step, t.before, t.after, t.changed) for t in first.turns] == [(2, "a", "c", True), (4, "c", "c", False)]
    assert first.request == "a"


def test_preview_is_asked_for_only_when_due():
    asked = []
    run(Session(["a"], FunctionRefiner(lambda v: None), "start, 2, 50%, end"), 8, asked)
    assert asked == [2, 4]
    run(Session(["a"], NoOpRefiner(), "start, 2, 50%, end"), 8, asked)
    assert asked == [2, 4]  # it does not look


def test_what_a_refiner_may_look_at():
    views = []
    session = Session(["a", "b"], FunctionRefiner(lambda v: views.append(v) or v.prompt + "!"), "start, 3, end")
    run(session, 5)
    assert [(v.request, v.prompt, v.step, v.num_steps) for v in views] == [
        ("a", "a", 0, 5), ("b", "b", 0, 5), ("a", "a!", 3, 5), ("b", "b!", 3, 5), ("a", "a!!", 5, 5), ("b", "b!!", 5, 5),
    ]  # fmt: skip
    assert [v.image is None for v in views] == [True, True, False, False, False, False]
    assert [v.sigma for v in views] == [1.0, 1.0, 0.4, 0.4, 0.0, 0.0]
    assert [len(v.turns) for v in views] == [0, 0, 1, 1, 2, 2]


def test_only_the_sample_that_changed_changes():
    session = Session(["a", "b"], FunctionRefiner(lambda v: "new" if v.request == "b" else None), "1")
    assert run(session, 3)[-1] == ("a", "new")


def test_nothing_to_do_returns_none():
    session = Session(["a"], FunctionRefiner(lambda v: v.prompt), "1")
    session.start(3)
    assert session.observe(1, 0.5, lambda: images(1)) is None


def test_exceptions_are_recorded_and_the_prompt_is_kept():
    def fail(view):
        raise TimeoutError("no answer in 5 s")

    session = Session(["a"], FunctionRefiner(fail), "1, 2")
    assert run(session, 3) == [("a",)] * 3
    assert [(t.error, t.boundary) for t in session.trajectories[0].turns] == [("TimeoutError: no answer in 5 s", "refiner")] * 2
    assert session.trajectories[0].image is not None
    assert all(t.seconds["refiner"] >= 0 for t in session.trajectories[0].turns)  # a time-out is a cost too


def test_a_failing_preview_is_its_own_boundary():
    def preview():
        raise MemoryError("VAE")

    session = Session(["a"], FunctionRefiner(lambda v: "new"), "1")
    session.start(2)
    assert session.observe(1, 0.5, preview) is None
    assert session.trajectories[0].turns[0].boundary == "preview"


@pytest.mark.parametrize("pictures", [images(1), images(3), Image.new("RGB", (2, 2)), None])
def test_a_preview_of_the_wrong_number(pictures):
    session = Session(["a", "b"], FunctionRefiner(lambda v: "new"), "1")
    session.start(2)
    assert session.observe(1, 0.5, lambda: pictures) is None
    for t in session.trajectories:
        assert t.turns[0].boundary == "preview"
        assert "for 2 samples; it must give a list with one PIL image for each" in t.turns[0].error


def test_a_refiner_that_draws_on_the_finished_picture_draws_on_a_copy():
    finished = images(1)
    session = Session(["a"], FunctionRefiner(lambda v: v.image.paste((255, 0, 0), (0, 0, 2, 2))), "end")
    session.start(2)
    session.finish(finished)
    assert finished[0].getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("answer", [Refinement("x", error="cut off"), Refinement("  \n"), Refinement("")])
def test_a_failed_answer_keeps_the_prompt_of_its_sample_only(answer):
    session = Session(["a", "b"], FunctionRefiner(lambda v: answer if v.request == "a" else "fine"), "1")
    assert run(session, 2)[-1] == ("a", "fine")
    assert session.trajectories[0].turns[0].error
    assert session.trajectories[1].turns[0].error is None


def test_strict_raises():
    def fail(view):
        raise TimeoutError("no answer")

    for refiner in (FunctionRefiner(fail), FunctionRefiner(lambda v: Refinement(error="cut off"))):
        with pytest.raises(RefinerError, match="step 1: .*(no answer|cut off)"):
            run(Session(["a"], refiner, "1", strict=True), 2)


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("exception", [KeyboardInterrupt, Cancelled])
def test_cancel_gets_through(exception):
    def cancel(view):
        raise exception

    with pytest.raises(exception):
        run(Session(["a"], FunctionRefiner(cancel), "1", cancel=(Cancelled,)), 2)


class Raw:
    def __init__(self, answers):
        self.answers = answers

    def refine(self, views):
        return self.answers


@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        ([], ValueError, "Raw.refine returned 0 answers for 1 views; it must return a list with one Refinement"),
        ([Refinement(), Refinement()], ValueError, "returned 2 answers for 1 views"),
        (None, ValueError, "returned NoneType for 1 views"),
        ("a prompt", ValueError, "returned str for 1 views"),
        (["a prompt"], TypeError, "returned str 'a prompt' .*; each answer must be a Refinement"),
        ([Refinement(None, error=OSError())], TypeError, "whose error is OSError"),
        ([Refinement(7)], TypeError, "a Refinement whose prompt is int"),
        ([None], TypeError, "returned NoneType"),
    ],
)
def test_a_refiner_that_breaks_its_contract(answers, error, message):
    with pytest.raises(error, match=message):
        run(Session(["a"], Raw(answers), "1"), 2)


def test_a_function_that_returns_no_text():
    with pytest.raises(TypeError, match="prompt is int"):
        run(Session(["a"], FunctionRefiner(lambda v: 7), "1"), 2)


def test_bad_sessions():
    with pytest.raises(ValueError, match="the list of prompts is empty"):
        Session([], NoOpRefiner(), "1")
    with pytest.raises(TypeError, match="a prompt must be text, not int 7"):
        Session([7], NoOpRefiner(), "1")
    with pytest.raises(TypeError, match="str is no refiner: give an object with a method refine"):
        Session(["a"], "refiner", "1")
    with pytest.raises(TypeError, match="the class NoOpRefiner is no refiner"):
        Session(["a"], NoOpRefiner, "1")
    with pytest.raises(ValueError, match="cannot read 'often'"):
        Session(["a"], NoOpRefiner(), "often")
    with pytest.raises(ValueError, match="step 9 lies beyond this run of 4 steps"):
        Session(["a"], NoOpRefiner(), "9").start(4)


def test_rejected_prompts_are_taken_back():
    session = Session(["a", "b"], FunctionRefiner(lambda v: "new" if v.request == "b" else None), "1")
    session.start(2)
    assert session.observe(1, 0.5, lambda: images(2)) == ["a", "new"]
    session.rejected(RuntimeError("out of memory"))
    assert session.prompts == ["a", "b"]
    assert [t.turns[0].boundary for t in session.trajectories] == [None, "encode"]


# --- prompts written beforehand, answers that come later ------------------------------------------------------------------


def test_a_priori_all_turns_are_asked_before_the_first_step():
    asked, previews = [], []
    refiner = FunctionRefiner(lambda v: asked.append((v.step, v.prompt, v.image, len(v.turns))) or f"{v.prompt}{v.step}")
    session = Session(["a"], refiner, "start, 2, 4, end", apriori=True)
    session.start(6)
    assert asked == [(0, "a", None, 0), (2, "a0", None, 1), (4, "a02", None, 2)]
    assert session.prompts == ["a"] and session.trajectories[0].turns == [], "nothing has been applied yet"
    assert run(session, 6, previews)[-1] == ("a024",)
    assert previews == [], "nobody looks"
    assert asked[-1][0] == 6 and asked[-1][2] is not None, "the end is looked at as ever"


def test_a_priori_equals_asking_in_time():
    for steps in ("start", "2, 4", "start, 1, 2, 3, 4, 5", "every 2"):
        refiner = FunctionRefiner(lambda v: f"{v.prompt} {v.step}" if v.step != 3 else None)
        forces = [run(Session(["a", "b"], refiner, steps, apriori=planned), 6) for planned in (False, True)]
        assert forces[0] == forces[1]


def test_a_priori_a_prompt_that_was_taken_back_is_not_in_use_later():
    session = Session(["a", "b"], FunctionRefiner(lambda v: {1: "new", 4: "last"}.get(v.step)), "1, 3, 4", apriori=True)
    session.start(5)
    assert session.observe(1, None, None) == ["new", "new"]
    session.rejected(RuntimeError("out of memory"))
    assert session.observe(3, None, None) is None
    assert session.prompts == ["a", "b"]
    assert session.observe(4, None, None) == ["last", "last"]
    assert [(t.before, t.after, t.boundary) for t in session.trajectories[1].turns] == [
        ("b", "b", "encode"), ("b", "b", None), ("b", "last", None),
    ]  # fmt: skip


@pytest.mark.parametrize("latency", [1, 2, 3, 7])
def test_an_answer_acts_exactly_so_many_steps_later(latency):
    for step in range(10):
        session = Session(["a", "b"], FunctionRefiner(lambda v: v.prompt + "!"), step, asynchronous=latency)
        acts = step + latency
        assert run(session, 10) == [("a", "b") if k < acts else ("a!", "b!") for k in range(10)]
        for t in session.trajectories:
            (turn,) = t.turns
            late = acts >= 10
            assert (turn.step, turn.applied, turn.changed) == (step, None if late else acts, not late)
            assert turn.notes == (("the refiner's answer came too late to act",) if late else ())


def test_one_question_at_a_time():
    asked = []
    session = Session(
        ["a"], FunctionRefiner(lambda v: asked.append(v.step) or f"{v.prompt}{v.step}"), "every 1", asynchronous=3
    )
    force = run(session, 9)
    assert asked == [1, 4, 7]
    assert [f for (f,) in force] == ["a"] * 4 + ["a1"] * 3 + ["a14"] * 2
    turns = session.trajectories[0].turns
    assert [(t.step, t.notes[0]) for t in turns if t.notes][:2] == [
        (2, "left out: the refiner was still busy with step 1"), (3, "left out: the refiner was still busy with step 1"),
    ]  # fmt: skip
    assert len(turns) == 8, "each turn that was due is on record"


def test_a_failure_that_comes_late_is_not_lost():
    def fail(view):
        raise TimeoutError("no answer")

    def late(**options):
        session = Session(["a"], FunctionRefiner(fail), "3", asynchronous=3, **options)
        session.start(4)
        session.observe(3, None, lambda: images(1))
        session._waiting._thread.join(60)
        return session.finish(images(1))

    (turn,) = late()[0].turns
    assert (turn.step, turn.error, turn.changed) == (3, "TimeoutError: no answer", False)
    with pytest.raises(RefinerError, match="step 3: the refiner failed"):
        late(strict=True)
    with pytest.raises(TimeoutError):
        late(cancel=(TimeoutError,))


def test_a_late_answer_is_taken_back_though_another_turn_fell_on_the_same_step():
    def preview():
        raise MemoryError("VAE")

    session = Session(["a"], FunctionRefiner(lambda v: "new"), "1, 3", asynchronous=2)
    session.start(5)
    session.observe(1, 0.5, lambda: images(1))
    session.observe(2, 0.5, lambda: images(1))
    assert session.observe(3, 0.5, preview) == ["new"]
    session.rejected(RuntimeError("out of memory"))
    assert session.prompts == ["a"]
    assert [(t.step, t.before, t.after, t.boundary) for t in session.trajectories[0].turns] == [
        (1, "a", "a", "encode"), (3, "a", "a", "preview"),
    ]  # fmt: skip


def test_answers_of_a_refiner_aside_are_checked_too():
    session = Session(["a"], Raw([]), "1", asynchronous=1)
    with pytest.raises(ValueError, match="Raw.refine returned 0 answers for 1 views"):
        run(session, 4)


def test_an_empty_request_may_stay_empty():
    session = Session(["", "b"], FunctionRefiner(lambda v: {1: "", 2: "x"}[v.step]), "1, 2", strict=False)
    assert run(session, 3)[1:] == [("", "b"), ("x", "x")]
    assert [t.turns[0].error for t in session.trajectories] == [None, "the refiner answered with an empty prompt"]
    run(Session([""], FunctionRefiner(lambda v: ""), "1", strict=True), 3)


# --- a refiner that is told to stop ---------------------------------------------------------------------------------------


class Thinking:
    """Thinks on and on, one token every 2 ms, until its `on_token` raises, or somebody lets it answer."""

    looks = False

    def __init__(self, prompt="new"):
        self.prompt, self.answers, self.on_token = prompt, threading.Event(), None
        self.now = self.most = self.asked = 0

    def refine(self, views):
        self.now, self.asked = self.now + 1, self.asked + 1
        self.most = max(self.most, self.now)
        try:
            for _ in range(5000):
                if self.on_token is not None:
                    self.on_token()
                if self.answers.wait(0.002):
                    return [Refinement(self.prompt, raw="raw", tokens=7) for _ in views]
            raise AssertionError("nobody stopped it")
        finally:
            self.now -= 1


class Deaf(Thinking):
    """Has no `on_token` to be stopped by."""

    on_token = property(lambda self: None)

    def __init__(self, prompt="new"):
        self.prompt, self.answers = prompt, threading.Event()
        self.now = self.most = self.asked = 0


def until(true):
    for _ in range(5000):
        if true():
            return
        time.sleep(0.002)
    raise AssertionError("waited in vain")


def test_a_late_question_is_stopped_before_the_next_one():
    refiner = Thinking()
    for _ in range(3):  # runs
        refiner.answers.clear()
        session = Session(["a"], refiner, "1, end", asynchronous=True)
        session.start(3)
        session.observe(1, 0.5, None)
        until(lambda: refiner.now)
        asked = refiner.asked
        threading.Thread(target=lambda asked=asked: (until(lambda: refiner.asked > asked), refiner.answers.set())).start()
        session.finish(images(1))
        late, end = session.trajectories[0].turns
        assert (late.step, late.changed, late.notes) == (1, False, ("the refiner's answer came too late to act",))
        assert (end.step, end.after, end.notes) == (3, "new", ())
    assert (refiner.asked, refiner.most, refiner.on_token) == (6, 1, None)


def test_a_refiner_that_cannot_be_stopped_is_not_asked_meanwhile(monkeypatch):
    monkeypatch.setattr(promptloop_pipeline.look, "PATIENCE", 0.01)
    refiner = Deaf()
    session = Session(["a"], refiner, "1, end", asynchronous=True)
    session.start(3)
    session.observe(1, 0.5, None)
    thread = session._waiting._thread
    session.finish(images(1))
    note = "left out: the refiner was still busy with an earlier question, that was given up"
    assert [(t.step, t.notes) for t in session.trajectories[0].turns] == [
        (1, ("the refiner's answer came too late to act",)), (3, (note,)),
    ]  # fmt: skip
    other = Session(["a"], refiner, "1")  # of a later run
    run(other, 2)
    assert other.trajectories[0].turns[0].notes == (note,)
    refiner.answers.set()
    thread.join(60)
    assert run(Session(["a"], refiner, "1"), 2)[-1] == ("new",)
    assert refiner.most == 1


def test_an_exception_that_ends_the_run_ends_the_question():
    refiner = Thinking()
    session = Session(["a"], refiner, "1", asynchronous=True)
    session.start(3)
    session.observe(1, 0.5, None)
    thread = session._waiting._thread
    session.give_up("the run ended")
    thread.join(60)
    assert not thread.is_alive() and refiner.on_token is None
    assert session.trajectories[0].turns[0].notes == ("the run ended",)


def test_at_exit_the_refiner_is_stopped():
    """A thread that still computes when Python ends is killed in the midst of it: torch then aborts the process."""
    code = """
import time
from promptloop_pipeline import Session
class Thinking:
    looks, on_token = False, None
    def refine(self, views):
        try:
            while True:
                if self.on_token is not None:
                    self.on_token()
                time.sleep(0.01)
        finally:
            print("stopped", flush=True)
session = Session(["a"], Thinking(), "0", asynchronous=True)
session.start(2)
session.observe(0, None, None)
time.sleep(0.1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")


def test_the_users_own_on_token_is_called_and_put_back():
    class Mine(Exception):
        pass

    def cancel():
        raise Mine

    refiner = Thinking()
    calls = []
    refiner.on_token = own = lambda: calls.append(1) or len(calls) < 5 or refiner.answers.set()
    assert run(Session(["a"], refiner, "1"), 2)[-1] == ("new",)
    assert len(calls) == 5 and refiner.on_token is own
    for asynchronous in (False, 1):
        refiner.on_token = cancel
        with pytest.raises(Mine):
            run(Session(["a"], refiner, "1", cancel=(Mine,), asynchronous=asynchronous), 4)
        assert refiner.on_token is cancel


def test_runs_that_share_a_refiner_stop_only_their_own_question():
    refiner, over = Thinking(), threading.Event()
    refiner.on_token = own = lambda: None
    sessions = [Session(["a"], refiner, "1", interrupted=stop.is_set) for stop in (over, threading.Event())]
    threads = [threading.Thread(target=run, args=(session, 2)) for session in sessions]
    for n, thread in enumerate(threads, 1):
        thread.start()
        until(lambda n=n: refiner.asked == n)
    over.set()
    threads[0].join(60)
    refiner.answers.set()
    threads[1].join(60)
    assert [s.prompts for s in sessions] == [["a"], ["new"]]
    assert refiner.on_token is own


@pytest.mark.parametrize("mode", [{}, {"asynchronous": 2}, {"apriori": True}, {"strict": True}], ids=str)
def test_an_interrupt_stops_the_refiner(mode):
    refiner, over = Thinking(), threading.Event()
    session = Session(["a", "b"], refiner, "1, 2", interrupted=over.is_set, **mode)
    threading.Thread(target=lambda: (until(lambda: refiner.now), over.set())).start()
    assert run(session, 5) == [("a", "b")] * 5
    for t in session.trajectories:
        notes = {turn.step: turn.notes[0] for turn in t.turns}
        assert notes[1] == "not applied: the run was interrupted"
        assert notes[2].startswith("left out: ") and not any(turn.changed for turn in t.turns)
    assert (refiner.asked, refiner.on_token) == (1, None)


def test_an_interrupted_run_does_not_wait_for_a_refiner_that_cannot_be_stopped():
    refiner, over = Deaf(), threading.Event()
    session = Session(["a"], refiner, "1", interrupted=over.is_set, asynchronous=1)
    threading.Thread(target=lambda: (until(lambda: refiner.now), over.set())).start()
    clock = time.monotonic()
    assert run(session, 4)[-1] == ("a",)
    assert time.monotonic() - clock < 5
    assert session.trajectories[0].turns[0].notes == ("not applied: the run was interrupted",)
    refiner.answers.set()


def test_an_answer_that_comes_after_an_interrupt_is_recorded_and_not_applied():
    over = threading.Event()
    session = Session(
        ["a"], FunctionRefiner(lambda v: over.set() or Refinement("new", raw="raw")), "1", interrupted=over.is_set
    )
    assert run(session, 2)[-1] == ("a",)
    (turn,) = session.trajectories[0].turns
    assert (turn.raw, turn.after, turn.notes) == ("raw", "a", ("not applied: the run was interrupted",))


def test_planned_turns_that_the_run_does_not_reach_stay_on_record():
    session = Session(["a"], FunctionRefiner(lambda v: Refinement(f"new {v.step}", raw="raw")), "1, 3", apriori=True)
    session.start(5)
    session.observe(1, None, None)
    session.finish(None, look=False)
    assert [(t.step, t.after, t.raw, t.notes) for t in session.trajectories[0].turns] == [
        (1, "new 1", "raw", ()), (3, "new 1", "raw", ("the run ended before this step",)),
    ]  # fmt: skip


def test_a_plan_that_fails_leaves_no_turns_that_seem_applied():
    answers = {1: Refinement("new", raw="raw"), 3: Refinement(error="cut off")}
    session = Session(["a"], FunctionRefiner(lambda v: answers[v.step]), "1, 3", apriori=True, strict=True)
    with pytest.raises(RefinerError, match="step 3: cut off"):
        session.start(5)
    session.give_up("the run ended")
    assert [(t.step, t.after, t.raw) for t in session.trajectories[0].turns] == [(1, "a", "raw")]


def asked_late(refiner, **options):
    """A session that has its answer only when it is about to finish."""
    session = Session(["a"], refiner, "3", asynchronous=3, **options)
    session.start(4)
    session.observe(3, None, lambda: images(1))
    session._waiting._thread.join(60)
    return session


def test_what_a_late_answer_said_and_cost_is_on_record():
    session = asked_late(FunctionRefiner(lambda v: Refinement("new", "because", "raw", tokens=7, notes=("guarded",))))
    (turn,) = session.finish(images(1))[0].turns
    assert (turn.raw, turn.reasoning, turn.tokens, turn.after, turn.applied) == ("raw", "because", 7, "a", None)
    assert turn.notes == ("guarded", "the refiner's answer came too late to act")
    assert turn.image is not None and set(turn.seconds) == {"preview", "refiner"}


def test_a_late_breach_of_the_contract_is_reported():
    session = asked_late(Raw([]))
    with pytest.raises(ValueError, match="Raw.refine returned 0 answers for 1 views"):
        session.finish(images(1))
    assert session.trajectories[0].image is not None


@pytest.mark.parametrize("exception", [KeyboardInterrupt, Cancelled])
def test_a_cancel_from_aside_does_not_wait_for_its_step(exception):
    def cancel(view):
        raise exception

    session = Session(["a"], FunctionRefiner(cancel), "1", asynchronous=8, cancel=[Cancelled])
    session.start(10)
    session.observe(1, 0.5, lambda: images(1))
    session._waiting._thread.join(60)
    with pytest.raises(exception):
        session.observe(2, 0.4, None)


def test_cancel_is_types_of_exceptions():
    def fail(view):
        raise TimeoutError("no answer")

    for cancel in ([KeyError], KeyError, {KeyError}):
        session = Session(["a"], FunctionRefiner(fail), "1", cancel=cancel)
        assert session.cancel == (KeyError,)
        run(session, 2)
        assert session.trajectories[0].turns[0].error == "TimeoutError: no answer"
    for bad in ([KeyError()], "KeyError", (KeyError, 5), [str], None):
        with pytest.raises(TypeError, match="cancel names .*; give types of exceptions, as in"):
            Session(["a"], NoOpRefiner(), "1", cancel=bad)


def test_bad_modes():
    for name in ("apriori", "strict"):
        with pytest.raises(TypeError, match=f"{name} is 'no'; use True or False"):
            Session(["a"], NoOpRefiner(), "1", **{name: "no"})
    for bad in (-1, "2", 1.5, None):
        with pytest.raises(ValueError, match="asynchronous is .*; use False, True, or a number of steps from 1 on"):
            Session(["a"], NoOpRefiner(), "1", asynchronous=bad)
    with pytest.raises(ValueError, match="apriori and asynchronous exclude each other"):
        Session(["a"], NoOpRefiner(), "1", apriori=True, asynchronous=2)


def test_what_does_not_fit_is_cut_and_noted():
    session = Session(
        ["a long request"], FunctionRefiner(lambda v: v.prompt + ", and more"), "1, 2", fit=lambda text: text[:20]
    )
    assert run(session, 3) == [("a long request",), ("a long request, and ",), ("a long request, and ",)]
    first = session.trajectories[0].turns[0]
    assert first.notes == ("too long for the text encoder, cut after 'a long request, and '; left out: 'more'",)
    kept = Session(["a long request"], FunctionRefiner(lambda v: v.prompt), "1", fit=lambda text: text[:3])
    assert run(kept, 2)[-1] == ("a long request",), "what was not refined is not touched"
