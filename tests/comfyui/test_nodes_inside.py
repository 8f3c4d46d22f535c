"""Reward nodes within a ComfyUI: pictures of several sizes, videos, latents with sound, cancel."""

from pathlib import Path

import pytest

from ..rewards.models import clip_model


@pytest.fixture(scope="module")
def found(inprocess, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    clip_model(base / "models" / "rewards" / "clip-score")
    return inprocess(Path(__file__).parent / "nodes_inside.py", base)


def test_a_reward_model_is_in_comfyuis_memory(found):
    """Loaded once; on the GPU it is among ComfyUI's models, which may unload it, and with "cpu" it is not."""
    first, again, beside = found["memory"]["scores"]
    assert first == again == beside and len(first) == 2 and all(-1 < s < 1 for s in first)
    assert found["memory"]["held"] == [[True], [True], [False]] and found["memory"]["kept"] == 2


def test_pictures_of_several_sizes_stay_as_they_are(found):
    assert found["sizes"] == {"shapes": [[1, 8, 24, 3], [1, 8, 16, 3]], "scores": [24.0, 16.0], "places": [1, 2]}


def test_prompts_are_one_for_all_or_one_for_each(found):
    assert found["prompts"]["scores"] == [8.0] * 3 and found["prompts"]["passed"] == [[2, 8, 8, 3], [1, 8, 8, 4]]
    assert "4 prompts for 3 pictures; give one for all of them, or one for each" in found["prompts"]["said"]


def test_do_no_harm_takes_videos_and_what_lies_beside_them(found):
    made = found["latents"]
    assert made["first"] and made["second"] and made["third"] and made["mask"] == "kept"
    assert made["image"] == [6, 8, 8, 3]  # three videos of two frames
    assert [line.split()[-4] for line in made["report"]] == ["refined", "untouched", "untouched"]
    if "sound" in made:  # this ComfyUI has such latents
        assert made["sound"] == [1.0, 2.0, 2.0] and made["video"]


def test_a_cancel_stops_the_scoring(found):
    assert found["cancel"] == "interrupted"
