"""Guards do what they say around any refiner, note it, and hide nothing that goes wrong inside."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from promptloop_pipeline import FunctionRefiner, NoOpRefiner, Refinement, Session, View
from promptloop_pipeline.refiners.guards import GuardedRefiner, change, has_term

CAT = "a red cat on a mat"


class Returns:
    """A refiner that returns just that."""

    def __init__(self, answers):
        self.answers = answers

    def refine(self, views):
        return self.answers


def turn(answer, request=CAT, **guards):
    """The turn of a session whose refiner gives that answer."""
    session = Session([request], GuardedRefiner(FunctionRefiner(lambda v: answer), **guards), "1")
    session.start(2)
    session.observe(1, None, None)
    return session.trajectories[0].turns[0]


def test_without_guards_nothing_is_done():
    answer = Refinement("A dog!", "because", "raw", (1, 2), (-0.1, -0.2), None, 2, True, ("noted",))
    assert GuardedRefiner(FunctionRefiner(lambda v: answer)).refine([View(CAT, CAT, 0, 1)]) == [answer]


@pytest.mark.parametrize(
    ("request_", "answer", "after", "noted"),
    [
        (CAT, "a dog", f"{CAT}, a dog", True),
        (CAT, f"{CAT}, 4k", f"{CAT}, 4k", False),
        (CAT, "A  Red cat on a\nmat at night", "A  Red cat on a\nmat at night", False),
        ("a cat", "a caterpillar in a hat", "a cat, a caterpillar in a hat", True),
        ("a cat.", "a cat, sitting", "a cat, sitting", False),
        ("a cat, ", ", 4k", "a cat, 4k", True),
        ("f/1.8 (wide)", "f/1.8 (wide) lens", "f/1.8 (wide) lens", False),
        ("\u4e00\u53ea\u732b", "\u4e00\u53ea\u732b\u5750\u7740", "\u4e00\u53ea\u732b\u5750\u7740", False),
        ("\u4e00\u53ea\u732b", "\u4e00\u53ea\u72d7", "\u4e00\u53ea\u732b, \u4e00\u53ea\u72d7", True),
        ("", "a dog", "a dog", False),
    ],
)
def test_prefix(request_, answer, after, noted):
    found = turn(answer, request_, prefix=True)
    assert found.after == after
    assert found.notes == (("the user's own words were put in front",) if noted else ())


@settings(max_examples=600, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30), st.lists(st.text(min_size=1, max_size=5).filter(str.strip), max_size=3))
def test_what_guards_promise_holds(request_, answer, terms):
    found = turn(answer, request_, prefix=True, must_keep=terms)
    if found.error is None:
        begin = " ".join(request_.rstrip(" ,;.\n").casefold().split())
        assert " ".join(found.after.casefold().split()).startswith(begin)
        assert all(has_term(found.after, t) for t in terms if has_term(request_, t))
        assert (found.after == answer) == (not found.notes)


@pytest.mark.parametrize(
    ("terms", "answer", "after"),
    [
        (["red cat"], "a dog", "a dog, red cat"),
        (["Red  CAT"], "a red\ncat sleeping", "a red\ncat sleeping"),
        (["cat"], "a caterpillar", "a caterpillar, cat"),
        (["cat"], "concatenation", "concatenation, cat"),
        (["cat", "mat"], "a dog.", "a dog. cat, mat"),
        (["No.", "on;", "red"], "a dog", "a dog, red"),
        ([".NET", "mat"], "a dog,", "a dog, mat"),
        (["blue"], "a dog", "a dog"),  # nobody asked for blue
        (["cat"], "a cat's tail", "a cat's tail"),
    ],
)
def test_must_keep(terms, answer, after):
    found = turn(answer, must_keep=terms)
    assert found.after == after
    assert found.notes == tuple(f"put back: {t!r}" for t in terms if after != answer and has_term(CAT, t))


def test_must_keep_looks_at_the_prompt_in_use_too():
    answers = iter(["a red cat, masterpiece", "a dog"])
    session = Session(
        ["a red cat"], GuardedRefiner(FunctionRefiner(lambda v: next(answers)), must_keep=["masterpiece"]), "1, 2"
    )
    session.start(3)
    session.observe(1, None, None)
    assert session.observe(2, None, None) == ["a dog, masterpiece"]


def test_terms():
    assert has_term("Film at f/1.8, ISO 100", "f/1.8")
    assert has_term("c++ code", "C++")
    assert not has_term("a blueish cat", "blue")
    assert has_term("une école", "École")
    assert has_term("\u4e00\u53ea\u7ea2\u732b\u5750\u7740", "\u7ea2\u732b")  # no spaces between words
    assert has_term("\u732bcat\u5728", "cat")
    assert not has_term("\u732bcats", "cat")
    assert has_term("\u0e41\u0e21\u0e27\u0e2a\u0e35\u0e41\u0e14\u0e07", "\u0e41\u0e21\u0e27")
    assert has_term("an ASP.NET logo", ".NET")
    assert turn("a dog", "house No. 5 by St. Ives", must_keep=["No.", "St.", "house"]).after == "a dog, No. St. house"


def test_max_change():
    assert turn("a red cat on a hat", max_change=0.2).after == "a red cat on a hat"
    found = turn("three dogs in the park", max_change=0.2)
    assert (found.after, found.error) == (CAT, None)
    assert found.notes == ("not taken: it changes 100% of the words, more than 20%: 'three dogs in the park'",)
    assert turn("A RED cat  on a mat", max_change=0).after == "A RED cat  on a mat"
    assert turn("three dogs", max_change=1).after == "three dogs"
    # what the guard itself puts in front or back counts with the rest
    found = turn("x y z", prefix=True, must_keep=["mat"], max_change=0)
    assert found.after == CAT
    assert len(found.notes) == 2


def test_change():
    assert change("", "") == 0
    assert change("a b c d", "A  b c\td") == 0
    assert change("a b", "c d") == 1
    assert change("a b c d", "a b c e") == pytest.approx(0.25)
    assert change("red cube left of blue ball", "blue cube left of red ball") > 0.2  # the order counts
    assert change("\u4e00\u53ea\u7ea2\u8272\u7684\u732b", "\u4e00\u53ea\u84dd\u8272\u7684\u732b") == pytest.approx(1 / 6)
    for n in (10, 300, 3000):  # as a language model does that goes round in circles
        clock = time.process_time()
        assert change("a " * n, "a b " * n) == pytest.approx(1 / 3)
        assert time.process_time() - clock < 2


def test_notes_of_the_refiner_come_first():
    found = turn(Refinement("a dog", notes=("mine",)), must_keep=["mat"])
    assert found.notes == ("mine", "put back: 'mat'")


@pytest.mark.parametrize("guards", [{}, {"prefix": True}, {"must_keep": ["cat"]}, {"max_change": 0.0}])
def test_answers_without_a_prompt_pass_through(guards):
    found = turn(Refinement(error="time is up", reasoning="why", raw="raw"), **guards)
    assert (found.error, found.boundary, found.after, found.notes, found.raw) == ("time is up", "refiner", CAT, (), "raw")
    assert turn(None, **guards).error is None
    assert "empty prompt" in turn(" ", **guards).error
    found = turn(Refinement("a dog", error="half an answer"), **guards)
    assert (found.error, found.after, found.notes) == ("half an answer", CAT, ())


def test_exceptions_of_the_refiner_are_recorded():
    def fail(view):
        raise TimeoutError("no answer")

    session = Session([CAT], GuardedRefiner(FunctionRefiner(fail), prefix=True), "1")
    session.start(2)
    assert session.observe(1, None, None) is None
    assert session.trajectories[0].turns[0].error == "TimeoutError: no answer"


@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        ([], ValueError, "returned 0 answers for 2 views"),
        ([Refinement()] * 3, ValueError, "returned 3 answers for 2 views"),
        (None, ValueError, "returned NoneType for 2 views"),
        ("ab", ValueError, "returned str for 2 views"),
        (["a dog", "a cat"], TypeError, "each answer must be a Refinement"),
        ([Refinement("a dog"), None], TypeError, "each answer must be a Refinement"),
        ([Refinement("a dog"), Refinement(3)], TypeError, "whose prompt is int"),
        ([Refinement("a dog"), Refinement(None, error=3)], TypeError, "whose error is int"),
    ],
)
def test_a_refiner_that_breaks_its_contract_is_still_reported(answers, error, message):
    session = Session([CAT, CAT], GuardedRefiner(Returns(answers), prefix=True, must_keep=["cat"], max_change=0.5), "1")
    session.start(2)
    with pytest.raises(error, match=message):
        session.observe(1, None, None)


def test_an_answer_of_a_class_of_ones_own():
    class Mine:
        prompt, reasoning, raw, token_ids, logprobs, error, tokens, format_ok, notes = (
            "a dog",
            "",
            "",
            None,
            None,
            None,
            None,
            None,
            (),
        )

    session = Session([CAT], GuardedRefiner(Returns([Mine()]), must_keep=["red cat"]), "1")
    session.start(2)
    assert session.observe(1, None, None) == ["a dog, red cat"]


def test_each_sample_has_its_own():
    session = Session([CAT, "a blue dog"], GuardedRefiner(FunctionRefiner(lambda v: "a bird"), prefix=True), "1")
    session.start(2)
    assert session.observe(1, None, None) == [f"{CAT}, a bird", "a blue dog, a bird"]


def test_looks_and_on_token_are_those_of_the_refiner():
    shown = []

    def preview():
        shown.append(1)
        return [Image.new("RGB", (4, 4))]

    for refiner in (NoOpRefiner(), FunctionRefiner(lambda v: None)):
        guarded = GuardedRefiner(refiner)
        session = Session([CAT], guarded, "1")
        session.start(2)
        session.observe(1, None, preview)
    assert len(shown) == 1  # the second one looks
    inner = FunctionRefiner(lambda v: None)
    GuardedRefiner(GuardedRefiner(inner)).on_token = shown.clear
    inner.on_token()
    assert shown == []


def test_guards_can_be_nested():
    inner = GuardedRefiner(FunctionRefiner(lambda v: "a dog"), must_keep=["mat"])
    session = Session([CAT], GuardedRefiner(inner, prefix=True), "1")
    session.start(2)
    assert session.observe(1, None, None) == [f"{CAT}, a dog, mat"]
    assert session.trajectories[0].turns[0].notes == ("put back: 'mat'", "the user's own words were put in front")


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"must_keep is a list of terms, not the text 'cat'; use \['cat'\]"):
        GuardedRefiner(NoOpRefiner(), must_keep="cat")
    with pytest.raises(ValueError, match="must_keep has the empty term ' '"):
        GuardedRefiner(NoOpRefiner(), must_keep=["cat", " "])
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="use a share from 0"):
            GuardedRefiner(NoOpRefiner(), max_change=share)


def test_a_term_that_the_encoders_would_cut_off_is_put_in_front():
    cut = View("a photo of three cats", "a cat", 0, 9, fit=lambda text: " ".join(text.split()[:6]))
    long = "a very long and winding description of cats, three of them"
    (a,) = GuardedRefiner(FunctionRefiner(lambda v: long), must_keep=["three"]).refine([cut])
    assert a.prompt == f"three, {long}" and any("put in front" in n for n in a.notes)
    (a,) = GuardedRefiner(FunctionRefiner(lambda v: "one two three four"), must_keep=["three"]).refine([cut])
    assert a.prompt == "one two three four" and not a.notes


def test_around_what_is_no_refiner():
    for what, name in (("repair", "str"), (FunctionRefiner, "the class FunctionRefiner"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"^{name} is no refiner: give an object with a method refine"):
            GuardedRefiner(what)
