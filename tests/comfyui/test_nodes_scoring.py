"""Pictures scored for nodes, without ComfyUI: what fails is told, what was paid for is kept."""

import http.server
import math
import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from comfy_nodes import scoring
from promptloop_pipeline.rewards.combine import NAMED, RewardSpec
from promptloop_pipeline.tiny.reward import verifier_score

from ..rewards.models import clip_model

SIZES = [Image.new("RGB", (8 * k, 8), (k, 0, 0)) for k in range(1, 7)]


def width(images, prompts, **context):
    return [float(i.width) for i in images]


def only_wide(images, prompts, **context):
    return [float(i.width) if i.width > 16 else None for i in images]


def picky(images, prompts, **context):
    if any(i.width == 24 for i in images):
        raise RuntimeError("no such width")
    return width(images, prompts)


def broken(images, prompts, **context):
    raise RuntimeError("the model is broken")


REWARDS = {"width": width, "only_wide": only_wide, "picky": picky, "broken": broken}


def scored(*specs, images=SIZES, prompts=None, **options):
    return scoring.score(list(specs), REWARDS.__getitem__, images, prompts or ["a"] * len(images), **options)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "no reward is named; give one or more of image-reward"), ("imagereward", "unknown reward"), ("verifier:0", "weight 0"),
        ("os:system", "code of your own"), ("length", "needs to know the prompt"), ("geneval", "needs to know what should be there"),
        ("verifier, verifier", "named twice"), ("verifier:x", "the weight of verifier"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(text, said):
    with pytest.raises(ValueError, match=said):
        scoring.read_rewards(text)


def test_every_other_reward_can_be_asked_for():
    assert {s.name for s in scoring.read_rewards(", ".join(scoring.NAMES))} == set(scoring.NAMES) < set(NAMED)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_prompts_go_to_their_pictures(batches):
    n = sum(batches)
    assert scoring.for_each(["a"], batches) == ["a"] * n
    each = [str(k) for k in range(n)]
    assert scoring.for_each(each, batches) == each
    if len(batches) not in (1, n):
        found = scoring.for_each([str(k) for k in range(len(batches))], batches)
        assert [found.count(str(k)) for k in range(len(batches))] == batches and found == sorted(found)
    with pytest.raises(ValueError, match=f"{n + 1} prompts for {n} pictures"):
        scoring.for_each(["a"] * (n + 1), batches)


def test_an_empty_prompt_is_refused_where_it_is_read():
    scoring.check_prompts([""], [RewardSpec("aesthetic")])
    with pytest.raises(ValueError, match="the prompt is empty, and verifier scores pictures against it"):
        scoring.check_prompts(["a", " "], [RewardSpec("aesthetic"), RewardSpec("verifier")])


def test_totals_are_the_weighted_sum():
    found = scored(RewardSpec("width", 2.0), RewardSpec("only_wide", 0.0))
    assert found.totals == [2.0 * i.width for i in SIZES] and not found.broken
    assert found.raw["only_wide"][:2] == [None, None]  # shown, and not in the total


def test_where_a_reward_does_not_apply_it_counts_as_the_mean_of_its_group():
    found = scored(RewardSpec("width"), RewardSpec("only_wide"))
    mean = sum(i.width for i in SIZES[2:]) / 4
    assert found.totals == [i.width + (mean if i.width <= 16 else i.width) for i in SIZES]


def test_a_reward_that_fails_on_a_picture_leaves_that_one_without_a_total():
    found = scored(RewardSpec("width"), RewardSpec("picky"))
    assert [t is None for t in found.totals] == [i.width == 24 for i in SIZES]
    assert "no such width" in scoring.table(found).splitlines()[-1] and "picture 2" in scoring.table(found)
    assert scoring.best(found.totals, 6) == [5, 4, 3, 1, 0, 2]


def test_a_reward_that_fails_on_all_pictures_is_left_out_and_told():
    found = scored(RewardSpec("width"), RewardSpec("broken", 5.0))
    assert found.totals == [float(i.width) for i in SIZES] and "the model is broken" in found.broken["broken"]
    assert "WARNING: broken gave no score and is left out" in scoring.table(found)
    alone = scored(RewardSpec("broken"))
    assert alone.totals == [None] * 6 and scoring.best(alone.totals, 2) == [0, 1]


@pytest.mark.parametrize(
    "error", [OSError("not there"), ValueError("bad"), ImportError("pip install it"), RuntimeError("no memory")]
)
def test_a_reward_that_cannot_be_loaded_is_told(error):
    def get(name):
        raise error

    found = scoring.score([RewardSpec("x")], get, SIZES, ["a"] * 6)
    assert found.broken == {"x": str(error)} and found.totals == [None] * 6


def test_a_cancel_gets_through_between_pictures():
    class Cancel(Exception):
        pass

    seen = []

    def cancel(done):
        seen.append(done)
        if done >= 4:
            raise Cancel

    with pytest.raises(Cancel):
        scored(RewardSpec("width"), on_picture=cancel)
    assert seen == [0, 4]  # of 6 pictures


@given(st.lists(st.none() | st.floats(-10, 10), max_size=8), st.integers(1, 10))
def test_the_best_come_first_and_none_is_lost(totals, count):
    found = scoring.best(totals, count)
    assert len(found) == min(count, len(totals)) == len(set(found))
    values = [totals[k] for k in found]
    assert values == sorted(values, key=lambda v: (v is None, -(v or 0)))
    left = [totals[k] for k in range(len(totals)) if k not in found and totals[k] is not None]
    assert not left or (None not in values and min(values) >= max(left))


def test_a_float_for_comfyui():
    assert math.isnan(scoring.plain(None)) and scoring.plain(0.0) == 0.0


# --- the gate -----------------------------------------------------------------------------------------------------------


def gated(pairs, *specs):
    """pairs: (width of the refined picture, of the untouched one) for each sample."""
    images = [Image.new("RGB", (pair[arm], 8)) for arm in (0, 1) for pair in pairs]
    shown = [(arm, k) for arm in (0, 1) for k in range(len(pairs))]
    found = scored(*specs, images=images, groups=[k for _, k in shown])
    return scoring.gate(found, shown, len(pairs))


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=6))
def test_only_what_scores_higher_is_kept(pairs):
    keep, lines = gated(pairs, RewardSpec("width"))
    assert keep == [new > old for new, old in pairs] and len(lines) == len(pairs)


def test_where_a_reward_fails_the_untouched_one_is_kept():
    keep, lines = gated([(40, 8), (24, 8), (40, 24)], RewardSpec("picky"))
    assert keep == [True, False, False] and "a reward failed" in lines[1]
    assert gated([(40, 8)], RewardSpec("width"), RewardSpec("broken"))[0] == [False]
    assert gated([(40, 8)], RewardSpec("width"), RewardSpec("broken", 0.0))[0] == [True]  # held out


def test_where_no_reward_applies_to_both_the_untouched_one_is_kept():
    assert gated([(16, 8), (40, 8), (8, 40)], RewardSpec("only_wide"))[0] == [False, False, False]
    assert gated([(40, 8), (30, 20)], RewardSpec("only_wide"), RewardSpec("width"))[0] == [True, True]


def test_frames_of_a_video_count_as_their_mean():
    images = [Image.new("RGB", (w, 8)) for w in (10, 50, 29, 29)]
    shown = [(0, 0), (0, 0), (1, 0), (1, 0)]
    found = scored(RewardSpec("width"), images=images, groups=[0] * 4)
    assert scoring.gate(found, shown, 1)[0] == [True]


# --- weights ------------------------------------------------------------------------------------------------------------


def test_weights_are_found_by_name_and_by_the_publishers_name(tmp_path):
    clip = clip_model(tmp_path / "rewards" / "clip-vit-large-patch14")
    specs = scoring.read_rewards("clip-score, aesthetic, verifier")
    found = scoring.weights_of("", specs, [tmp_path / "none", tmp_path / "rewards"])
    assert found == {"clip-score": {"model": str(clip)}, "aesthetic": {"clip": str(clip)}, "verifier": {}}
    own = clip_model(tmp_path / "rewards" / "clip-score")
    assert scoring.weights_of("", specs, [tmp_path / "rewards"])["clip-score"] == {"model": str(own)}
    text = f"clip-score=clip-vit-large-patch14\n\n aesthetic:clip={own} "
    assert scoring.weights_of(text, specs, [tmp_path / "rewards"])["clip-score"] == {"model": str(clip)}
    assert scoring.weights_of(text, specs, [tmp_path / "rewards"])["aesthetic"] == {"clip": str(own)}
    with pytest.raises(ValueError, match="weights 'x=y' is for a reward that is not asked for|unknown reward"):
        scoring.weights_of("x=y", specs, [])


def test_a_model_from_a_folder_scores_and_its_modules_are_found(tmp_path):
    import torch

    reward = scoring.load("clip-score", {"model": str(clip_model(tmp_path / "clip"))}, "cpu", False)
    scores = reward(SIZES[:2], ["a red circle"] * 2)
    assert all(-1 <= s <= 1 for s in scores)
    (module,) = scoring.modules_of(reward)
    assert isinstance(module, torch.nn.Module) and sum(p.numel() for p in module.parameters()) > 10_000
    assert scoring.modules_of(verifier_score) == []


def test_missing_weights_say_where_they_are_looked_for():
    with pytest.raises(OSError, match="put aesthetic/ or aesthetic-model.pth under models/rewards, .* or allow the download"):
        scoring.load("aesthetic", {}, "cpu", False)


DOWNLOAD = """
import sys
from comfy_nodes import scoring
try:
    scoring.load("aesthetic", {}, "cpu", sys.argv[1] == "True")
except OSError as e:
    print(e)
from huggingface_hub import constants
assert not constants.HF_HUB_OFFLINE
"""


@pytest.mark.parametrize("allowed", [False, True])
def test_nothing_is_asked_of_the_hub_unless_it_is_allowed(tmp_path, allowed):
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", DOWNLOAD, str(allowed)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert bool(asked) == allowed, asked
    assert ("allow the download" in done.stdout) != allowed and "aesthetic" in done.stdout
