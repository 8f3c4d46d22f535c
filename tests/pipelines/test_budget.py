"""What the encoders cannot hold is cut at a clause, and never much shorter than it has to be."""

import pytest

from promptloop_pipeline import FunctionRefiner, GuardedRefiner, attach
from promptloop_pipeline.pipelines.budget import KEPT, fit_to

from .factories import sd

LIMIT = 77 - 2  # every character of these tokenizers is a token


@pytest.fixture(scope="module")
def fit():
    return fit_to(sd(), {})


def length(text):
    return len(text.replace(" ", ""))


@pytest.mark.parametrize(
    "prompt",
    ["Photo, " + "word " * 40, "a dog " + "and a dog " * 20, "x" * 200, "a, " * 60, "one, two. " + "three " * 30 + ", four"],
)
def test_a_cut_keeps_most_of_what_fits(fit, prompt):
    cut = fit(prompt)
    assert prompt.startswith(cut) and cut == cut.rstrip()
    assert KEPT * LIMIT - 8 <= length(cut) <= LIMIT
    assert fit(cut) == cut


def test_what_must_be_kept_is_not_cut_off():
    pipe = sd()
    pipe.set_progress_bar_config(disable=True)
    refiner = GuardedRefiner(FunctionRefiner(lambda v: "a long word or two, " * 12 + "three cats"), must_keep=["three"])
    out = attach(pipe)("three cats", refiner=refiner, refine_at="1", num_inference_steps=2, height=32, width=32)
    (turn,) = out.trajectories[0].turns
    assert turn.after.startswith("three, a long word") and len(turn.notes) == 2
    assert length(turn.after) <= LIMIT


def test_a_clause_is_cut_off_whole_where_little_is_lost(fit):
    clause = "a red barn by the lake with boats and a pier in the evening light today"  # 56 characters
    assert fit(f"{clause}, then something long that cannot fit") == clause
    assert fit("short") == "short"
    assert fit("a, " + "word " * 40) != "a"
