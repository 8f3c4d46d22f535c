import pytest

from promptloop_pipeline import RefinementSchedule


@pytest.mark.parametrize(
    ("text", "num_steps", "steps"),
    [
        ("start", 20, (0,)),
        ("20%, 50%, 80%", 30, (6, 15, 24)),
        ("every 4", 10, (4, 8)),
        ("every 4 steps", 13, (4, 8, 12)),
        ("end", 7, (7,)),
        ("100%", 7, (7,)),
        ("0%", 7, (0,)),
        ("none", 7, ()),
        ("3", 7, (3,)),
        (3, 7, (3,)),
        ([3, "50%"], 8, (3, 4)),
        ("5, 2, 5", 8, (2, 5)),
        (" START ,  33.3 % ", 10, (0, 3)),
        ("20%", 2, (1,)),  # a few-step model is refined too: neither the start nor the end
        ("80%", 2, (1,)),
        ("start, 50%, end", 1, (0, 1)),
        ("every 9", 4, ()),
    ],
)
def test_steps(text, num_steps, steps):
    assert RefinementSchedule.parse(text).steps(num_steps) == steps


def test_text_round_trip():
    for text in ("start", "20%, 50%, 80%", "every 4", "6, end", "none"):
        assert str(RefinementSchedule.parse(text)) == text
        assert RefinementSchedule.parse(str(RefinementSchedule.parse(text))) == RefinementSchedule.parse(text)


@pytest.mark.parametrize("text", ["sometimes", "", "%", "-3", "every 0", "every", "1.5", "20%;50%", "none, start"])
def test_unknown_text(text):
    with pytest.raises(ValueError, match="use|none"):
        RefinementSchedule.parse(text)


def test_more_than_the_whole_run():
    with pytest.raises(ValueError, match=r"'120%' is more than 100%.*0% to 100%"):
        RefinementSchedule.parse("50%, 120%")


def test_step_beyond_the_run():
    with pytest.raises(ValueError, match=r"step 31 lies beyond this run of 30 steps; use a step from 0 to 30"):
        RefinementSchedule.parse("31").steps(30)
    assert RefinementSchedule.parse("30").steps(30) == (30,)


@pytest.mark.parametrize("value", [None, 2.5, True, [2.5], {"a": None}.values(), b"20%"])
def test_wrong_type(value):
    with pytest.raises(TypeError, match="text or step numbers"):
        RefinementSchedule.parse(value)


def test_made_by_hand_is_checked_too():
    assert RefinementSchedule(("20%", "end")) == RefinementSchedule.parse("20%, end")
    with pytest.raises(ValueError, match="cannot read 'bogus'"):
        RefinementSchedule(("bogus",))
    with pytest.raises(TypeError, match="a tuple of texts"):
        RefinementSchedule("20%")


def test_numpy_integers_are_steps():
    import numpy as np

    assert RefinementSchedule.parse(np.arange(2, 4)).steps(9) == (2, 3)
