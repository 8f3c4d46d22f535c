from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image

from promptloop_pipeline.evaluation.measures import (
    arm_measures,
    cost,
    embedding_similarity,
    figure,
    image_diversity,
    lexical_recall,
    over_turns,
    peak_memory,
    text_encoder_of,
    token_recall,
)
from promptloop_pipeline.evaluation.words import words
from promptloop_pipeline.trajectory import Trajectory, Turn, load, save

from ..pipelines.factories import MAKERS

# --- figures --------------------------------------------------------------------------------------------------------------


def test_figure() -> None:
    assert figure([]) == figure([None, math.nan]) == {"mean": None, "low": None, "high": None, "n": 0}
    assert figure([2.0]) == figure([1.0, 3.0], ["a", "a"]) | {"n": 1} == {"mean": 2.0, "low": None, "high": None, "n": 1}
    assert figure([1.0, None, 3.0])["mean"] == 2 and figure([1.0, None, 3.0])["n"] == 2
    assert figure([4.0] * 5) == {"mean": 4.0, "low": 4.0, "high": 4.0, "n": 5}
    uneven = figure([1.0, 1.0, 4.0], ["a", "a", "b"])
    assert uneven == {"mean": 2.0, "low": 1.0, "high": 4.0, "n": 3}, "a mean of values, not of groups; groups are drawn whole"


def test_interval_covers_as_often_as_it_says() -> None:
    """Means of 40 groups of 4 that share their group's part: 95% over groups, and far less if groups were not looked at."""
    rng = np.random.default_rng(5)
    hits = {"by group": 0, "naive": 0}
    for _ in range(150):
        x = (rng.normal(size=(40, 1)) + 0.2 * rng.normal(size=(40, 4))).ravel().tolist()
        for name, groups in (("by group", [k // 4 for k in range(160)]), ("naive", None)):
            f = figure(x, groups)
            hits[name] += f["low"] <= 0 <= f["high"]  # type: ignore[operator]
    assert 0.88 <= hits["by group"] / 150 <= 1 and hits["naive"] / 150 < 0.8


def trajectory(request: str, *after: str, **kwargs: object) -> Trajectory:
    t = Trajectory(request, **kwargs)  # type: ignore[arg-type]
    for k, prompt in enumerate(after):
        t.turns.append(Turn(k, 9, t.prompt, prompt))
    return t


def test_over_turns() -> None:
    both = [trajectory("red cube", "red cube", "red ball"), trajectory("blue cat", "blue dog")]
    rows = over_turns(both, lambda t, prompt: lexical_recall(t.request, prompt))
    assert [(r["turn"], r["reached"], r["mean"], r["n"]) for r in rows] == [(0, 2, 1.0, 2), (1, 2, 0.75, 2), (2, 1, 0.5, 2)]
    assert over_turns([trajectory("x y z")], lambda t, prompt: len(words(prompt)))[0]["mean"] == 3
    assert [r["n"] for r in over_turns([], lambda t, prompt: 1)] == [0]


# --- embeddings -----------------------------------------------------------------------------------------------------------

PLANE = {
    "right": [2.0, 0.0],
    "up": [0.0, 1.0],
    "both": [3.0, 3.0],
    "left": [-1.0, 0.0],
    "nowhere": [0.0, 0.0],
    "odd": [math.nan, 1.0],
}


def on_plane(texts: list[str]) -> list[list[float]]:
    assert len(set(texts)) == len(texts), "each text is encoded once"
    return [PLANE[t] for t in texts]


def test_embedding_similarity() -> None:
    requests = ["right", "right", "right", "right", "right", "odd", " "]
    found = embedding_similarity(requests, ["up", "right", "left", "both", "nowhere", "up", "up"], on_plane)
    assert found == [0, pytest.approx(1), pytest.approx(-1), pytest.approx(2**-0.5), None, None, None]
    assert embedding_similarity([], [], on_plane) == embedding_similarity([""], [""], on_plane)[:0] == []
    with pytest.raises(ValueError, match="2 requests and 1 prompts"):
        embedding_similarity(["up", "up"], ["up"], on_plane)
    with pytest.raises(ValueError, match=r"shape \(3,\) for 2 items; it must give \(2, width\)"):
        embedding_similarity(["a"], ["b"], lambda texts: [1, 2, 3])


def test_token_recall() -> None:
    states = {"two": [[1.0, 0.0], [0.0, 5.0]], "one": [[2.0, 0.0]], "none": np.zeros((0, 2)), "diagonal": [[1.0, 1.0]]}

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.array(states[t]) for t in texts]

    requests, prompts = ["two", "one", "two", "one", "none", ""], ["one", "two", "two", "diagonal", "one", "one"]
    found = token_recall(requests, prompts, encode)
    assert found == [0.5, 1, 1, pytest.approx(2**-0.5), None, None]


@pytest.mark.parametrize("family", MAKERS)
@torch.no_grad()
def test_text_encoder_is_the_pipelines_own(family: str) -> None:
    """The very embeddings that the pipelines are fed, where they are fed a pooled one."""
    pipe = MAKERS[family]()
    encoder = text_encoder_of(pipe)
    assert encoder is not None and encoder.window == 77
    texts = ["a red cat", "a blue dog on a mat", "x"]
    found = encoder(texts)
    if family == "sd":
        assert encoder.model is pipe.text_encoder
        expected = pipe.encode_prompt(texts, "cpu", 1, False)[0]
        for states, own, text in zip(encoder.tokens(texts), expected, texts, strict=True):
            torch.testing.assert_close(states, own[1 : 1 + len(states)], rtol=1e-4, atol=1e-5)
            assert len(states) == len(text.replace(" ", ""))  # a token a letter
    elif family == "sdxl":
        assert encoder.model is pipe.text_encoder_2
        torch.testing.assert_close(found, pipe.encode_prompt(texts, device="cpu")[2], rtol=1e-4, atol=1e-5)
    elif family == "sd3":
        assert encoder.model is pipe.text_encoder
        torch.testing.assert_close(found, pipe.encode_prompt(texts, texts, texts)[2][:, :32], rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(found, pipe.encode_prompt(texts, texts)[1], rtol=1e-4, atol=1e-5)


def test_text_encoder() -> None:
    encoder = text_encoder_of(MAKERS["sdxl"](), batch_size=2)
    assert encoder is not None
    texts = ["red", "a much longer text about a red cat", "x", "red", ""]
    whole, singles = encoder(texts), torch.cat([encoder([t]) for t in texts])
    assert whole.shape == (5, 32) and whole.dtype == torch.float32 and not whole.requires_grad
    torch.testing.assert_close(whole, singles, rtol=1e-4, atol=1e-5)
    for states, t in zip(encoder.tokens(texts), texts, strict=True):
        torch.testing.assert_close(states, encoder.tokens([t])[0], rtol=1e-4, atol=1e-5)
    assert encoder([]).shape == (0, 32) and encoder.tokens([]) == []
    assert embedding_similarity(texts[:3], texts[:3], encoder) == pytest.approx([1, 1, 1])
    # tokens look to the left only: what is added behind leaves those before as they were
    assert token_recall(["a red"], ["a red cat"], encoder.tokens) == [pytest.approx(1, abs=1e-5)]
    assert token_recall(["a red cat"], ["dog"], encoder.tokens)[0] < 0.99  # type: ignore[operator]


def test_what_is_beyond_the_window_does_not_count() -> None:
    encoder = text_encoder_of(MAKERS["sd"]())
    assert encoder is not None
    fits, longer = "x" * 75, "x" * 75 + " and nothing else"
    assert (encoder.cut(fits), encoder.cut(longer)) == (False, True)
    torch.testing.assert_close(encoder([fits]), encoder([longer]), rtol=1e-4, atol=1e-5)
    assert len(encoder.tokens([longer])[0]) == 75
    of = arm_measures([trajectory("x", longer), trajectory("y", "z")], encoder=encoder)["drift"]
    assert of["cut"] == {"requests": 0, "prompts": 1} and of["embedding"]["n"] == of["tokens"]["n"] == 2


def test_pipelines_without_a_clip_text_encoder() -> None:
    pipe = MAKERS["sd3"]()
    pipe.text_encoder = pipe.text_encoder_2 = None
    assert pipe.text_encoder_3 is not None and text_encoder_of(pipe) is None
    assert text_encoder_of(SimpleNamespace()) is None


def test_offloaded_encoder() -> None:
    pipe = MAKERS["sd"]()
    expected = text_encoder_of(pipe)(["a red cat"])  # type: ignore[misc]
    accelerate.cpu_offload(pipe.text_encoder, torch.device("cpu"))
    assert pipe.text_encoder.device.type == "meta"
    torch.testing.assert_close(text_encoder_of(pipe)(["a red cat"]), expected)  # type: ignore[misc]


# --- diversity ------------------------------------------------------------------------------------------------------------


def plain(color: str, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", size, color).convert(mode)


def test_image_diversity() -> None:
    assert image_diversity([]) is image_diversity([plain("red")]) is image_diversity([plain("red"), None]) is None
    assert image_diversity([plain("black"), plain("white")]) == 1
    assert image_diversity([plain("red"), plain("black", (100, 20), "L")]) == pytest.approx(3**-0.5)
    assert image_diversity([plain("red"), plain("red", (256, 256)), plain("red", mode="RGBA")]) == 0
    assert image_diversity([plain("black"), plain("white"), plain("white")]) == pytest.approx(2 / 3)
    half = plain("black", (64, 64))
    half.paste((255, 255, 255), (0, 0, 32, 64))
    assert image_diversity([half, plain("black")]) == pytest.approx(2**-0.5)
    mixed = image_diversity([plain("red"), half, plain("white")])
    assert image_diversity([half, plain("white"), None, plain("red")]) == pytest.approx(mixed)


def test_image_diversity_by_embeddings() -> None:
    def see(pictures: list[Image.Image]) -> np.ndarray:
        assert all(p.mode == "RGB" for p in pictures)
        return np.array([p.getpixel((0, 0)) for p in pictures], float)

    assert image_diversity([plain("red"), plain("maroon")], see) == pytest.approx(0)
    assert image_diversity([plain("red"), plain("blue", mode="P"), plain("lime")], see) == 1
    assert image_diversity([plain("red"), plain("black")], see) is None, "an embedding of no length has no direction"


# --- cost -----------------------------------------------------------------------------------------------------------------


def test_cost_counts_a_look_of_a_batch_once() -> None:
    look = Turn(3, 10, "a", "a", seconds={"preview": 0.5, "refiner": 2.0}, tokens=30)
    changed = replace(look, after="b", seconds=look.seconds | {"encode": 0.25}, tokens=50)
    late = replace(look, seconds={"preview": 1.5, "refiner": 4.0}, error="TimeoutError", boundary="refiner", tokens=None)
    passed = Turn(5, 10, "a", "a", notes=("left out",))
    found = cost([
        Trajectory("p", [look, passed], meta={"seconds": 8.0}), Trajectory("q", [changed], meta={"seconds": 8.0}),
        Trajectory("r", [late, replace(passed, error="?")], meta={"seconds": 4}), Trajectory("s", [], meta={"seconds": 0}),
    ])  # fmt: skip
    assert found["seconds_per_image"] == 5 and (found["turns"], found["changed"]) == (5, 1)
    assert found["parts"] == {
        "preview": {"per_look": 1.0, "n": 2, "per_image": 0.5, "share": 0.1},
        "refiner": {"per_look": 3.0, "n": 2, "per_image": 1.5, "share": 0.3},
        "encode": {"per_look": 0.25, "n": 1, "per_image": 0.0625, "share": 0.0125},
    }
    assert (found["tokens"]["mean"], found["tokens"]["n"]) == (40, 2) and found["failures"] == {"refiner": 1, "unknown": 1}


def test_cost_by_turn() -> None:
    one = Turn(3, 10, "a", "a", seconds={"preview": 0.5, "refiner": 2.0})
    two = Turn(6, 10, "a", "b", seconds={"preview": 1.5, "refiner": 4.0, "encode": 1.0})
    found = cost([
        Trajectory("p", [one, two], meta={"memory_by_turn": [{"step": 6, "cuda:0": 9}]}),
        Trajectory("q", [replace(one, seconds={"refiner": 4.0})], meta={"memory_by_turn": [{"step": 3, "cuda:0": 7, "process": 1}]}),
        Trajectory("r"),
    ])["by_turn"]  # fmt: skip
    assert found == [
        {"turn": 1, "seconds": {"preview": 0.5, "refiner": 3.0}, "memory": {"cuda:0": 7, "process": 1}},
        {"turn": 2, "seconds": {"preview": 1.5, "refiner": 4.0, "encode": 1.0}, "memory": {"cuda:0": 9}},
    ]


def test_cost_of_runs_that_were_not_timed() -> None:
    turn = Turn(3, 10, "a", "a", seconds={"refiner": 2.0, "scoring": 1.0})
    found = cost([Trajectory("p", [turn], meta={"seconds": 8.0}), Trajectory("q")])
    assert found["seconds_per_image"] is None
    assert {name: part["share"] for name, part in found["parts"].items()} == {"refiner": None, "scoring": None}
    assert cost([])["parts"] == {} and cost([])["seconds_per_image"] is None


# --- memory ---------------------------------------------------------------------------------------------------------------

MB = 2**20


PEAKS = """
import json, threading
import numpy as np
from promptloop_pipeline.evaluation.memory import Meter, peak_memory

def fill(megabytes):
    block = np.ones(megabytes * 2**20, np.uint8)
    threading.Event().wait(0.1)
    assert block[-1]

with peak_memory() as large:
    fill(150)
with peak_memory() as small:
    fill(50)
with peak_memory() as short:
    kept = np.ones(60 * 2**20, np.uint8)
with peak_memory() as nothing:
    pass
with Meter() as meter:
    fill(30)
    first = meter.lap()
    fill(90)
    second = meter.lap()
    third = meter.lap()
print(json.dumps([large, small, short, nothing, first, second, third, meter.found]))
"""


def test_peak_memory() -> None:
    """In a process of its own, where nothing else is freed meanwhile."""
    said = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True).stdout
    large, small, short, nothing, *laps = (row["process"] for row in json.loads(said))
    assert 140 * MB < large["rise"] < 220 * MB and large["peak"] > large["rise"]
    assert 40 * MB < small["rise"] < 100 * MB, "it shows although a larger one was before"
    assert 50 * MB < short["rise"] < 110 * MB, "what is held at the end shows, however short it was"
    assert nothing["rise"] < 10 * MB
    first, second, third, whole = laps
    assert 25 * MB < first["rise"] < 60 * MB and 80 * MB < second["rise"] < 130 * MB and third["rise"] < 10 * MB
    assert whole["peak"] == max(lap["peak"] for lap in laps) and 80 * MB < whole["rise"] < 130 * MB


def test_peak_memory_of_what_fails() -> None:
    with pytest.raises(KeyError), peak_memory() as found:
        raise KeyError
    assert found["process"]["peak"] > 0
    assert not [t for t in threading.enumerate() if t.name == "promptloop-memory"]


# --- all of it ------------------------------------------------------------------------------------------------------------


def test_arm_measures(tmp_path: Path) -> None:
    arm = [
        trajectory("two red cubes", "2 red cubes, soft light", "a red cube", image=plain("black"), meta={"seconds": 1.0}),
        trajectory("two red cubes", "two red cubes, soft light", image=plain("white"), meta={"seconds": 3.0}),
        trajectory("\u4e00\u53ea\u732b", image=plain("red"), meta={"seconds": 2.0}),
        trajectory("", "a failed one", meta={"seconds": 2.0}),
    ]
    found = arm_measures(arm)
    assert found["n"] == 4 and found["drift"]["embedding"] is found["drift"]["tokens"] is found["drift"]["cut"] is None
    assert (found["drift"]["recall"]["mean"], found["drift"]["recall"]["n"]) == (pytest.approx((2 / 3 + 1 + 1) / 3), 3)
    assert [r["n"] for r in found["drift"]["recall_by_turn"]] == [3, 3, 3]
    assert (found["diversity"]["pictures"]["mean"], found["diversity"]["pictures"]["n"], found["diversity"]["by"]) == (
        1,
        1,
        "pixels",
    )
    assert [r["mean"] for r in found["length"]["words"]] == [(3 + 3 + 3 + 0) / 4, (5 + 5 + 3 + 3) / 4, (3 + 5 + 3 + 3) / 4]
    assert found["length"]["tokens"] is None and found["cost"]["seconds_per_image"] == 2
    assert json.loads(json.dumps(found)) == found
    save(arm, tmp_path)
    assert arm_measures(load(tmp_path)) == found, "the record holds all that is measured"


def test_arm_measures_with_models() -> None:
    encoder = text_encoder_of(MAKERS["sd"]())
    arm = [
        trajectory("ab cd", "ab cd", image=plain("red")),
        trajectory("ab cd", "xy", image=plain("blue")),
        trajectory("e", "e"),
    ]
    found = arm_measures(arm, encoder=encoder, see=lambda pictures: [p.getpixel((0, 0)) for p in pictures])
    assert [r["mean"] for r in found["length"]["tokens"]] == [3, pytest.approx(7 / 3)]
    assert found["diversity"]["by"] == "embeddings" and found["diversity"]["pictures"]["mean"] == 1
    assert found["drift"]["embedding"]["n"] == 3 and found["drift"]["embedding"]["mean"] < 1
    assert json.loads(json.dumps(found)) == found


def test_arm_measures_of_nothing() -> None:
    found = arm_measures([])
    assert found["n"] == 0 and found["drift"]["recall"]["mean"] is None and json.loads(json.dumps(found)) == found
