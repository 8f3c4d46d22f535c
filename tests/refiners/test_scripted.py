"""Refiners without a model."""

import json

import pytest

from promptloop_pipeline import View
from promptloop_pipeline.refiners.scripted import ScheduleRefiner


def test_steps_that_json_made_text_of_are_refused():
    """None of them would ever be due."""
    schedule = {0: "a red cube", 6: "two red cubes"}
    for given in (json.loads(json.dumps(schedule)), [schedule, {6.0: "a red cube"}]):
        with pytest.raises(
            TypeError, match=r"^ScheduleRefiner has the step ('0'|6\.0); use whole numbers, as in \{6: 'a red cube'\}$"
        ):
            ScheduleRefiner(given)
    refiner = ScheduleRefiner(schedule)
    assert [refiner.refine([View("a", "a", step, 9)])[0].prompt for step in (0, 3, 6)] == ["a red cube", None, "two red cubes"]
    assert refiner.refine_at == "start, 6"
