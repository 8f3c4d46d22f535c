"""Rewards by name and put together; every figure was worked out by hand."""

import math
import sys

import pytest

from promptloop_pipeline.dotted import load_object
from promptloop_pipeline.reward import Reward, reward_name
from promptloop_pipeline.rewards import combine
from promptloop_pipeline.rewards.combine import (
    RewardSpec,
    capped,
    filled,
    gain,
    load_reward,
    parse_rewards,
    score_all,
    tagged,
    weighted_sum,
    win_rates,
    z_normalised,
)  # fmt: skip

N = None


def brightness(images, prompts, **context):
    return [sum(image.convert("L").tobytes()) for image in images]


class Constant:
    def __init__(self, value=3.0):
        self.value = value

    def __call__(self, images, prompts, **context):
        return [self.value] * len(images)


def test_parse():
    assert parse_rewards("image-reward:1.0,length:0.2") == [RewardSpec("image-reward"), RewardSpec("length", 0.2)]
    assert parse_rewards(" hpsv2.1 ") == [RewardSpec("hpsv2.1", 1.0)]
    assert parse_rewards("pickscore:0")[0].held_out
    assert parse_rewards("pickscore:-2") == [RewardSpec("pickscore", -2.0)]
    assert parse_rewards("image-reward:1<=2, a.b:c, a.b:d:0.5 <= -1") == [
        RewardSpec("image-reward", 1.0, 2.0), RewardSpec("a.b:c"), RewardSpec("a.b:d", 0.5, -1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "cannot read ''"), ("image-reward,,length", "cannot read ''"), ("imagereward", "unknown reward 'imagereward'; there are"),
        ("image-reward:high", "the weight of image-reward is 'high'"), ("length:nan", "the weight of length"),
        ("image-reward<=x", "cannot read"), ("length, length:2", "'length' is named twice"), (":1", "cannot read"),
        ("image reward", "unknown reward"),
    ],
)  # fmt: skip
def test_parse_says_what_is_wrong(text, match):
    with pytest.raises(ValueError, match=match) as e:
        parse_rewards(text)
    assert "\n" not in str(e.value)


def test_load_by_name_and_by_path():
    here = f"{__name__}:"
    assert load_reward(here + "brightness") is sys.modules[__name__].brightness
    assert load_reward(here + "Constant", value=2.0)([1, 2], ["a", "b"]) == [2.0, 2.0]
    assert isinstance(load_reward("length", least=2), Reward)
    assert reward_name(load_reward("verifier-strict")) == "verifier_strict"
    for name, options, match in (
        ("nothing", {}, "unknown reward 'nothing'; there are image-reward, hpsv2"),
        ("no_such_module:f", {}, "cannot load the reward 'no_such_module:f': No module named"),
        (here + "nothing", {}, "cannot load the reward .*nothing"),
        (here + "N", {}, "is NoneType, and no reward"),
        (here + "brightness", {"device": "cpu"}, "takes no options, and was given device"),
        ("verifier", {"device": "cpu"}, "takes no options"),
        ("length", {"device": "cpu"}, "the reward 'length' has no such option: .*device"),
    ):
        with pytest.raises(ValueError, match=match):
            load_reward(name, **options)


def test_every_name_leads_somewhere():
    for name, (path, _) in combine.NAMED.items():
        assert callable(load_object(path, "reward")), name


def test_score_all():
    def odd(images, prompts, **context):
        return context["values"]

    images, prompts = [1, 2, 3], ["a", "b", "c"]
    raw = score_all({"odd": odd, "three": Constant()}, images, prompts, values=[True, None, 2])
    assert raw == {"odd": [1.0, None, 2.0], "three": [3.0, 3.0, 3.0]}
    for values, match in (
        ([1, 2], "odd returned .*for 3 pictures"), (None, "a number, or None, for each"), ("abc", "odd returned 'abc'"),
        (["x", 1, 2], "a number, or None, for each"), ([1, math.nan, 2], "returned .1, nan, 2. for 3 pictures"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=match):
            score_all({"odd": odd}, images, prompts, values=values)


def test_weighted_sum():
    raw = {"a": [1.0, 2.0, N, N], "b": [10.0, N, 30.0, N], "held": [5.0, 5.0, 5.0, 5.0]}
    specs = [RewardSpec("a", 2.0), RewardSpec("b", 0.1), RewardSpec("held", 0.0)]
    assert weighted_sum(raw, specs) == [3.0, 4.0, 3.0, N]
    assert raw["a"] == [1.0, 2.0, N, N]
    assert weighted_sum(raw, [RewardSpec("a", 2.0, cap=1.5)]) == [2.0, 3.0, N, N]
    assert weighted_sum(raw, [RewardSpec("held", 0.0)]) == [N, N, N, N]
    with pytest.raises(ValueError, match="no values of c; there are a, b, held"):
        weighted_sum(raw, [RewardSpec("c")])


def test_capped():
    assert capped([1.0, 3.0, N], 2.0) == [1.0, 2.0, N]
    assert capped([1.0, 3.0, N], None) == [1.0, 3.0, N]


def test_z_normalised():
    root = math.sqrt(1.5)
    assert z_normalised([1.0, 2.0, 3.0, N]) == pytest.approx([-root, 0, root, N])
    assert z_normalised([1.0, 10.0, 3.0, 10.0], ["x", "y", "x", "y"]) == [-1.0, 0.0, 1.0, 0.0]
    assert z_normalised([0.1 + 0.2, 0.3, 0.3]) == [0.0, 0.0, 0.0]  # equal but for rounding
    assert z_normalised([1e9, 1e9 + 1e-6]) == [0.0, 0.0]
    assert z_normalised([N, N]) == [N, N]
    assert z_normalised([7.0, N]) == [0.0, N]
    assert z_normalised([]) == []
    with pytest.raises(ValueError, match="1 groups for 2 values"):
        z_normalised([1.0, 2.0], ["x"])


def test_filled():
    assert filled([1.0, N, 0.0, N], ["x", "x", "x", "y"]) == [1.0, 0.5, 0.0, N]
    assert filled([N, 4.0]) == [4.0, 4.0]


def test_tagged():
    raw = {"ocr": [0.1, 0.2, 0.3], "geneval": [1.0, N, 0.0]}
    assert tagged(raw, ["ocr", "geneval", "geneval"]) == [0.1, N, 0.0]
    with pytest.raises(ValueError, match="no reward is called 'ocrr'; tags may be ocr, geneval"):
        tagged(raw, ["ocrr", "ocr", "ocr"])
    with pytest.raises(ValueError, match="1 tags for 3 values"):
        tagged(raw, ["ocr"])


def test_win_rates():
    assert win_rates([1.0, 3.0, 2.0]) == [0.0, 1.0, 0.5]
    assert win_rates([1.0, 1.0, 2.0]) == [0.25, 0.25, 1.0]
    assert win_rates([1.0, N, 2.0, 5.0], ["x", "x", "x", "y"]) == [0.0, N, 1.0, N]
    assert win_rates([1.0, 1.05, 2.0], margin=0.1) == [0.25, 0.25, 1.0]
    assert win_rates([]) == []


def test_win_rates_of_a_judge():
    verdicts = {(0, 1): 1, (1, 0): 0, (0, 2): 0.5, (2, 0): 0.5, (1, 2): None, (2, 1): None}
    assert win_rates([0.0, 0.0, 0.0], beats=lambda i, j: verdicts[i, j]) == [0.75, 0.0, 0.5]
    assert win_rates([0.0, 0.0], beats=lambda i, j: None) == [N, N]


def test_gain():
    values, untouched = [1.0, 3.0, 5.0, N, 2.0], [True, True, False, False, False]
    assert gain(values, untouched, ["x", "x", "x", "x", "y"]) == [-1.0, 1.0, 3.0, N, N]
    assert gain([1.0, 3.0], [True, False]) == [0.0, 2.0]
    assert gain([N, 3.0], [True, False]) == [N, N]
    with pytest.raises(ValueError, match="1 untouched for 2 values"):
        gain([1.0, 2.0], [True])
