"""The loop without any host: a for-loop, pictures of one colour, scripted refiners."""

import pytest
from PIL import Image

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


def test_bad_modes():
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
