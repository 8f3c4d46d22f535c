import numpy as np
import pytest

from promptloop_pipeline import NoOpRefiner, Trajectory, tiny
from promptloop_pipeline.evaluation.report import Arm
from promptloop_pipeline.evaluation.run import run_arm
from promptloop_pipeline.evaluation.sheet import FAILED, PASSED, contact_sheet
from promptloop_pipeline.evaluation.statistics import paired_difference


def test_paired_difference_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        b = rng.normal(0, 1, 80)
        d = paired_difference(b + rng.normal(0.3, 1, 80), b, resamples=500)
        covered += d.low <= 0.3 <= d.high
    assert 180 <= covered <= 199  # 95% of 200, give or take; never always


def test_paired_difference_counts():
    d = paired_difference([1, 1, 0, 1], [0, 1, 1, 0])
    assert (d.mean, d.better, d.worse, d.n) == (0.25, 2, 1, 4)
    assert str(d).startswith("+0.250 [") and "2 better, 1 worse" in str(d)
    assert d == paired_difference([1, 1, 0, 1], [0, 1, 1, 0])


def test_an_arm_does_not_depend_on_its_batches():
    pipe = tiny.load_pipeline("sd")
    asked = tiny.requests(3)
    arms = [
        run_arm(pipe, asked, [5, 6, 7], NoOpRefiner(), "none", score=lambda t: {"x": 1.0}, batch=batch, num_inference_steps=3)
        for batch in (1, 2, 3)
    ]
    for arm in arms:
        assert [t.request for t in arm] == asked
        assert [t.meta["seed"] for t in arm] == [5, 6, 7]
        assert [t.scores for t in arm] == [{"x": 1.0}] * 3
        for a, b in zip(arm, arms[0]):
            assert np.abs(np.asarray(a.image, int) - np.asarray(b.image, int)).max() <= 1


@pytest.mark.parametrize("passed", [True, False])
def test_contact_sheet(passed):
    from PIL import Image

    t = Trajectory("p", image=Image.new("RGB", (32, 32), "blue"), scores={"strict": float(passed)})
    sheet = contact_sheet([Arm("one", "", [t] * 3), Arm("two", "", [t] * 3)], columns=2)
    colors = {c for _, c in sheet.getcolors(1 << 20)}
    assert (PASSED if passed else FAILED) in colors
    assert (FAILED if passed else PASSED) not in colors
    assert (0, 0, 255) in colors
