"""`promptloop eval` on prompts, models and rewards of one's own: what is read, rendered, scored, and asked again."""

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from promptloop_pipeline import tiny
from promptloop_pipeline.cli import named
from promptloop_pipeline.evaluation import benchmarks
from promptloop_pipeline.evaluation.arms import take_up
from promptloop_pipeline.evaluation.figures import by_tag, gains
from promptloop_pipeline.evaluation.measures import image_diversity
from promptloop_pipeline.evaluation.scoring import SCORES, failed, read_scores
from promptloop_pipeline.evaluation.statistics import by_prompt, mean
from promptloop_pipeline.reward import Judgement
from promptloop_pipeline.trajectory import Trajectory, load, save

from ..chat.server import Server
from .test_eval import call, contents

MINE = """
from pathlib import Path
LOG = Path(__file__).with_name("log.txt")

def redness(images, prompts, **context):
    with open(LOG, "a") as f:
        print(len(images), *sorted(context), file=f)
    return [sum(i.convert("RGB").resize((1, 1)).getpixel((0, 0))[:1]) / 255 for i in images]

def broken(images, prompts, **context):
    raise RuntimeError("the server is away")

class Told:
    name = "told"
    def judge(self, images, prompts, **context):
        from promptloop_pipeline.reward import Judgement
        return [Judgement(None if w is None else float(w), {"told": w}) for w in context["worth"]]
    def __call__(self, images, prompts, **context):
        return [j.score for j in self.judge(images, prompts, **context)]
"""


@pytest.fixture
def run(capsys):
    return lambda *args: call(*args, capsys=capsys)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With a module of rewards, a file of prompts, and the current folder there."""
    (tmp_path / "mine.py").write_text(MINE)
    rows = [
        {"prompt": "a red circle", "tag": "one", "worth": 1},
        {"prompt": "a blue square", "tag": "one", "worth": 2},
        {"prompt": "a red circle and a blue square", "tag": "two", "worth": None},
        {"prompt": "a green star", "tag": "one", "worth": 4},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("mine", None)
    return tmp_path


COMMON = ("--benchmark", "mine.jsonl", "--model", "tiny", "--arms", "raw", "--steps", "2", "--batch", "3", "--report", "out")


def results(folder):
    return json.loads((folder / "out" / "results.json").read_text())


# --- prompts ------------------------------------------------------------------------------------------------------------


def test_the_shipped_benchmarks():
    geneval, ocr, draw = (benchmarks.BENCHMARKS[name](None) for name in ("geneval", "ocr", "drawbench"))
    assert [len(b.requests) for b in (geneval, ocr, draw)] == [553, 200, 200]
    assert len(set(geneval.requests)) == 553 and len(set(geneval.context["tag"])) == 6
    for request, line in zip(geneval.requests, geneval.context["geneval"], strict=True):
        assert line["prompt"] == request and line["include"] and line["tag"] in geneval.context["tag"]
    assert all(request.count('"') >= 2 for request in ocr.requests)
    few = benchmarks.geneval(60)
    counts = {tag: few.context["tag"].count(tag) for tag in set(few.context["tag"])}
    assert len(few.requests) == 60 and len(counts) == 6 and min(counts.values()) >= 8  # spread over all kinds


def test_splits_of_shapes():
    by_split = {split: benchmarks.shapes(20, split=split).requests for split in ("test", "train", "any")}
    assert by_split["test"] == tiny.requests(20) and len({tuple(r) for r in by_split.values()}) == 3
    with pytest.raises(ValueError, match="--split dev: the shapes benchmark has test"):
        benchmarks.shapes(3, split="dev")


def test_a_text_file(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffa cat\n\n  two dogs \r\n", encoding="utf-8")
    assert benchmarks.from_file(tmp_path / "p.txt").requests == ["a cat", "two dogs"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{', "a.jsonl, line 2: no JSON"),
        ("a.jsonl", '{"text": "x"}', 'line 1: expected an object with "prompt"'),
        ("a.jsonl", '{"prompt": " "}', "line 1: expected an object"),
        ("a.jsonl", '["x"]', "line 1: expected an object"),
        ("a.jsonl", "\n \n", "holds no prompt"),
        ("a.jsonl", '{"prompt": "x", "source": "no.png"}', "line 1: there is no picture at"),
        ("a.jsonl", '{"prompt": "x", "refined": "y"}', "the key 'refined' is taken"),
        ("a.jsonl", '{"prompt": "x", "tag": 1}', "line 1: the tag is 1; give a text"),
        ("a.jsonl", '{"prompt": "x", "tag": "arm"}', "line 1: the tag is 'arm'"),
        ("a.jsonl", '{"prompt": "x", "images": 1}', "the key 'images' is taken"),
        ("a.jsonl", '{"prompt": "x \\ud800"}', "line 1: the prompt is not UTF-8"),
        (
            "a.jsonl",
            '{"prompt": "x", "include": [{"class": "cat"}]}',
            "line 1: the GenEval metadata of the prompt 'x': the count",
        ),
        ("a.txt", b"\xff\xfe\x00", "not a text file in UTF-8"),
    ],
)
def test_bad_files_name_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        benchmarks.from_file(tmp_path / name)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--benchmark", "no.jsonl"), "there is no file of prompts at no.jsonl"),
        (("--benchmark", "ocr"), "the benchmark ocr has no model of its own; give --model, a folder or hub id"),
        (("--benchmark", "ocr", "--model", "tiny"), "the benchmark ocr has no refiner of its own; give --refiner"),
        (("--benchmark", "mine.jsonl", "--model", "tiny", "--arms", "raw"), "the benchmark mine has no reward of its own"),
        (("--benchmark", "ocr", "--n", "201"), "--n 201: ocr.txt has 200 prompts"),
        (("--benchmark", "drawbench", "--model", "./nothing"), "no pipeline at ./nothing"),
        ((*COMMON, "--reward", "beauty"), "unknown reward 'beauty'"),
        ((*COMMON, "--reward", "mine:nothing"), "cannot load the reward 'mine:nothing'"),
        ((*COMMON, "--reward", "win-rate"), "win-rate compares the pictures of one prompt"),
        ((*COMMON, "--arms", "single", "--reward", "verifier", "--refiner", "http://x:1"), "give --server-model too"),
        ((*COMMON, "--reward", "length", "--reward-model", "length=x"), "the reward length has no model"),
        ((*COMMON, "--reward", "length", "--reward-model", "ocr=x"), "is for a reward that is not asked for"),
        ((*COMMON, "--reward", "verifier", "--size", "64"), "--size '64': give WIDTHxHEIGHT"),
        ((*COMMON, "--reward", "verifier", "--dtype", "int8"), "--dtype int8: use float32"),
        ((*COMMON, "--reward", "verifier", "--per-prompt", "0"), "--per-prompt 0: give a number from 1 up"),
    ],
)
def test_what_is_missing_is_said_before_anything_loads(run, folder, args, message, monkeypatch):
    monkeypatch.setattr(named, "load_model", None)
    code, out, err = run(*args)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert not (folder / "out").exists()


# --- scores -------------------------------------------------------------------------------------------------------------


def test_rewards_of_ones_own(run, folder):
    code, out, err = run(*COMMON, "--reward", "mine:redness, mine:Told:0", "--per-prompt", "2")
    assert code == 0, err
    found = results(folder)
    assert found["metrics"] == ["mine:redness", "mine:Told"] and len(found["requests"]) == 8
    assert found["requests"][:3] == ["a red circle", "a red circle", "a blue square"] and found["seeds"] == list(range(8))
    scores = found["scores"]["raw"]
    assert scores["mine:Told"] == [1, 1, 2, 2, None, None, 4, 4]
    row = found["arms"][0]
    assert row["n"] == 8 and row["unscored"] == {"mine:redness": 0, "mine:Told": 2}
    assert row["mine:redness"]["n"] == 4  # prompts: two pictures of one are no two samples
    assert row["mine:redness"]["mean"] == pytest.approx(np.mean(by_prompt(scores["mine:redness"], found["requests"])))
    assert found["tags"]["raw"]["one"]["n"] == 3 and found["tags"]["raw"]["two"]["n"] == 1
    pictures = [t.image for t in load(folder / "out" / "raw")]
    apart = [image_diversity(pictures[k : k + 2]) for k in range(0, 8, 2)]
    assert row["measures"]["diversity"]["pictures"]["mean"] == pytest.approx(np.mean(apart)) and min(apart) > 0
    assert row["measures"]["drift"]["recall"]["mean"] == row["measures"]["drift"]["embedding"]["mean"] == pytest.approx(1)
    assert "by tag" in out and "4 requests, 8 pictures" in out and "no score" in out


def test_a_reward_is_added_without_rendering(run, folder, monkeypatch):
    assert run(*COMMON, "--reward", "mine:redness")[0] == 0
    before = {p: p.stat().st_mtime_ns for p in (folder / "out" / "raw").rglob("*") if p.is_file() and p.name != SCORES}
    monkeypatch.setattr(named, "load_model", None)
    code, _, err = run(*COMMON, "--reward", "mine:redness, mine:Told")
    assert code == 0, err
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (folder / "log.txt").read_text().split()[0:1] == ["4"] and len((folder / "log.txt").read_text().splitlines()) == 1
    found = results(folder)
    assert found["metrics"] == ["total", "mine:redness", "mine:Told"]
    one, two, both = (found["scores"]["raw"][m] for m in ("mine:redness", "mine:Told", "total"))
    assert both == pytest.approx([a + (b or 0) for a, b in zip(one, two)])


def test_an_arm_is_added_to_a_run(run, folder):
    assert run(*COMMON, "--reward", "mine:redness")[0] == 0
    first = results(folder)["scores"]["raw"]
    more = [a if a != "raw" else "raw,single" for a in COMMON]
    code, _, err = run(*more, "--reward", "mine:redness", "--refiner", "none")
    assert code == 0, err
    both = results(folder)
    assert both["scores"]["raw"] == first == both["scores"]["single"]  # the refiner does nothing
    assert (folder / "log.txt").read_text().splitlines()[0][0] == "4" and len(
        (folder / "log.txt").read_text().splitlines()
    ) == 2
    assert "refiner is none there and tiny now" in run(*more, "--reward", "mine:redness", "--refiner", "tiny")[2]
    assert run(*COMMON, "--reward", "mine:redness")[0] == 0  # and fewer arms again
    assert list(results(folder)["scores"]) == ["raw"]


def test_a_reward_that_fails_costs_no_picture_and_is_asked_again(run, folder, caplog):
    code, out, err = run(*COMMON, "--reward", "mine:redness, mine:broken:0")
    assert code == 0, err
    assert "the reward mine:broken failed on all 4 pictures: RuntimeError: the server is away" in caplog.text
    said = read_scores(folder / "out" / "raw")
    assert all(failed(j) and "server is away" in j.details["error"] for j in said["mine:broken"].values())
    assert results(folder)["arms"][0]["unscored"] == {"mine:redness": 0, "mine:broken": 4} and "mine:broken 4" in out
    (folder / "mine.py").write_text(MINE.replace('raise RuntimeError("the server is away")', "return [0.5] * len(images)"))
    sys.modules.pop("mine")
    code, _, err = run(*COMMON, "--reward", "mine:redness, mine:broken:0")
    assert code == 0, err
    assert results(folder)["scores"]["raw"]["mine:broken"] == [0.5] * 4


def test_an_edited_reward_is_another_one(run, folder):
    assert run(*COMMON, "--reward", "mine:redness, mine:Told")[0] == 0
    before = results(folder)["scores"]["raw"]
    (folder / "mine.py").write_text(MINE.replace("/ 255 for i in images", "/ 255 + 7 for i in images"))
    sys.modules.pop("mine")
    assert run(*COMMON, "--reward", "mine:redness, mine:Told")[0] == 0
    assert results(folder)["scores"]["raw"]["mine:redness"] == pytest.approx([v + 7 for v in before["mine:redness"]])


def test_what_rewards_are_told_is_part_of_the_score(run, folder):
    assert run(*COMMON, "--reward", "mine:Told")[0] == 0
    pictures = contents(folder / "out" / "raw" / "images")
    text = (folder / "mine.jsonl").read_text()
    (folder / "mine.jsonl").write_text(text.replace('"worth": 4', '"worth": 9'))
    code, _, err = run(*COMMON, "--reward", "mine:Told")
    assert code == 0, err
    assert results(folder)["scores"]["raw"]["mine:Told"] == [1, 2, None, 9]
    assert contents(folder / "out" / "raw" / "images") == pictures
    (folder / "mine.jsonl").write_text(text.replace("green star", "green ring"))  # other pictures
    assert "the files differ: requests is" in run(*COMMON, "--reward", "mine:Told")[2]


def test_a_reward_without_weights_can_be_given_them(run, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = run(*COMMON, "--reward", "mine:redness, artifact:0")
    assert code == 2 and "artifact" in err  # after the pictures were made
    pictures = contents(folder / "out" / "raw" / "images")
    code, _, err = run(*COMMON, "--reward", "mine:redness, artifact:0", "--reward-model", "artifact=nowhere")
    assert code == 2 and "differ" not in err and "nowhere" in err
    assert run(*COMMON, "--reward", "mine:redness")[0] == 0
    assert contents(folder / "out" / "raw" / "images") == pictures


def test_one_bad_picture_costs_only_itself(run, folder, caplog):
    picky = """
def picky(images, prompts, **c):
    if any('square' in p for p in prompts):
        raise KeyError('square')
    return [1.0] * len(images)
"""
    (folder / "picky.py").write_text(picky)
    assert run(*COMMON, "--reward", "picky:picky")[0] == 0
    assert results(folder)["scores"]["raw"]["picky:picky"] == [1.0, None, None, 1.0]
    assert "failed on 2 of 4 pictures: KeyError: 'square'" in caplog.text


def test_half_a_total_is_none(run, folder):
    half = "def half(images, prompts, **c):\n    return [float('inf') if 'star' in p else 1.0 for p in prompts]\n"
    (folder / "half.py").write_text(half)
    assert run(*COMMON, "--reward", "mine:redness, half:half")[0] == 0
    scores, row = results(folder)["scores"]["raw"], results(folder)["arms"][0]
    assert scores["half:half"] == [1, 1, 1, None] and row["unscored"] == {"total": 1, "mine:redness": 0, "half:half": 1}
    assert scores["total"] == pytest.approx([a + 1 for a in scores["mine:redness"][:3]] + [None])


def test_differences_are_of_pairs():
    def arm(values):
        return [Trajectory("p", scores={"x": v}) for v in values]

    arms = {"raw": arm([1.0, 0.0]), "loop": arm([1.0, None])}
    assert gains(arms, "raw", ["x"])["x"]["mean"] == 0
    assert gains(arms, "loop", ["x"]) is None and gains({"raw": arms["raw"], "gold": arms["raw"]}, "raw", ["x"])["x"]["n"] == 1
    one = mean([0.3])
    assert (one["low"], one["high"]) == (None, None)


def test_repeated_prompts_are_one_sample(run, folder):
    lines = (folder / "mine.jsonl").read_text()
    (folder / "mine.jsonl").write_text(lines * 3)
    assert run(*COMMON, "--reward", "mine:redness")[0] == 0
    row = results(folder)["arms"][0]
    assert row["n"] == 12 and row["mine:redness"]["n"] == 4


def test_a_folder_of_other_requests_is_refused(tmp_path):
    save([Trajectory("a cat", id="00000", meta={"seed": 0})], tmp_path)
    assert list(take_up(tmp_path, ["a cat"], [0])) == [0]
    for requests, seeds in ((["a dog"], [0]), (["a cat"], [1]), (["a dog", "a cat"], [1, 0])):
        with pytest.raises(ValueError, match="holds pictures of other requests or seeds"):
            take_up(tmp_path, requests, seeds)


def test_torn_scores_are_asked_again(run, folder):
    assert run(*COMMON, "--reward", "mine:redness")[0] == 0
    whole, file = results(folder), folder / "out" / "raw" / SCORES
    lines = file.read_bytes().splitlines(keepends=True)
    torn = [line for line in lines if b"drift" in line] + [line for line in lines if b"redness" in line][:2]
    file.write_bytes(b"".join(torn)[:-9])
    assert run(*COMMON, "--reward", "mine:redness")[0] == 0
    assert results(folder)["scores"] == whole["scores"]
    assert (folder / "log.txt").read_text().splitlines()[-1].startswith("3 ")  # one was whole
    file.write_text("{}\n")
    assert f"{SCORES}, line 1: no score" in run(*COMMON, "--reward", "mine:redness")[2]


def test_scores_are_asked_again_only_where_they_may_come():
    assert failed(None) and failed(Judgement(None, {"error": "x"}))
    assert not failed(Judgement(None)) and not failed(Judgement(0.0, {"error": "x"}))


def test_tags_count_the_same_in_their_mean():
    arm = [Trajectory(str(k), scores={"x": v}) for k, v in enumerate([1.0, 1.0, 1.0, 0.0])]
    found = by_tag({"raw": arm}, ["a", "a", "a", "b"], "x")
    assert found["raw"]["mean of tags"]["mean"] == 0.5 and found["raw"]["a"]["n"] == 3
    assert by_tag({"raw": arm}, ["a"] * 4, "x") == {} == by_tag({"raw": arm}, [], "x")


def test_by_prompt():
    assert by_prompt([1.0, 3.0, None, 2.0, None, None], "aabbcc") == [2.0, 2.0, None]
    assert by_prompt([1.0, None, None, 3.0, 2.0, None], "abcabc") == [2.0, 2.0, None]


# --- models -------------------------------------------------------------------------------------------------------------


def test_pictures_to_start_from(run, folder):
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline(**tiny.load_pipeline("sd").components, requires_safety_checker=False)
    pipe.save_pretrained(folder / "model")
    for name in ("red", "blue"):
        Image.new("RGB", (32, 32), name).save(folder / f"{name}.png")
    rows = [{"prompt": "a red circle", "source": f"{name}.png"} for name in ("red", "blue")]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [a if a != "tiny" else "./model" for a in COMMON]
    options[options.index("--steps") + 1] = "4"
    code, _, err = run(*options, "--reward", "mine:redness")
    assert code == 0, err
    red, blue = results(folder)["scores"]["raw"]["mine:redness"]
    assert [t.image.size for t in load(folder / "out" / "raw")] == [(32, 32), (32, 32)]
    assert red > blue  # what they started from is still there
    assert "source" in (folder / "log.txt").read_text().split()
    Image.new("RGB", (64, 32), "green").save(folder / "red.png")
    assert "the files differ: source pictures is" in run(*options, "--reward", "mine:redness")[2]
    wide = [a if a != "out" else "wide" for a in options]
    assert run(*wide, "--reward", "mine:redness")[0] == 0  # each keeps its own shape
    assert [t.image.size for t in load(folder / "wide" / "raw")] == [(64, 32), (32, 32)]
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    (folder / "model" / "unet" / "config.json").write_text("{}")
    assert "the files differ: model files is" in run(*options, "--reward", "mine:redness")[2]


# --- the rewards of the benchmarks ---------------------------------------------------------------------------------------


def test_geneval_by_a_tiny_detector(run, folder):
    import torch

    from ..rewards.models import clip_model
    from ..rewards.test_geneval import rt_detr

    with torch.random.fork_rng():
        torch.manual_seed(0)
        rt_detr(folder / "detector")
    clip_model(folder / "clip")
    weights = [f"geneval-strict={folder / 'detector'}", f"geneval-strict:clip={folder / 'clip'}"]
    options = ("--benchmark", "geneval", "--model", "tiny", "--arms", "raw", "--n", "6", "--per-prompt", "2", "--steps", "2",
               "--report", "out")  # fmt: skip
    code, out, err = run(*options, *(x for w in weights for x in ("--reward-model", w)))
    assert code == 0, err
    found = results(folder)
    assert len(found["seeds"]) == 12 and len(found["tags"]["raw"]) >= 4 and "mean of tags" in out
    assert set(found["scores"]["raw"]["geneval-strict"]) <= {0.0, 1.0}
    details = read_scores(folder / "out" / "raw")["geneval-strict"]
    assert all(j.details["clauses"] for j in details.values())
    assert "is none there and" not in out
    assert len((folder / "out" / "raw" / SCORES).read_text().splitlines()) == 24  # drift too
    clip_model(folder / "other")  # another tower is another judge: what the first one said does not count
    weights[1] = f"geneval-strict:clip={folder / 'other'}"
    code, _, err = run(*options, *(x for w in weights for x in ("--reward-model", w)))
    assert code == 0, err
    assert len((folder / "out" / "raw" / SCORES).read_text().splitlines()) == 36


def test_ocr_reads_what_was_drawn(run, folder):
    pytest.importorskip("rapidocr")
    code, _, err = run("--benchmark", "ocr", "--model", "tiny", "--arms", "raw", "--n", "2", "--steps", "2", "--report", "out")
    assert code == 0, err
    assert results(folder)["scores"]["raw"]["ocr"] == [0.0, 0.0]  # the shapes world has no letters
    details = read_scores(folder / "out" / "raw")["ocr"]
    assert all(j.details["wanted"] for j in details.values())


def test_a_judge_behind_a_server(run, folder):
    def answer(body):
        asked = json.dumps(body["messages"])
        if "image_url" not in asked:
            return "1. Is there a circle?\n2. Is it red?"
        return "<score>7</score>" if "circle?" not in asked and "red?" not in asked else "<answer>yes</answer>"

    with Server("well", answer=answer) as server:
        judges = [x for name in ("vlm-judge", "key-points") for x in ("--reward-model", f"{name}={server.url}")]
        code, _, err = run(*COMMON, "--reward", "vlm-judge, key-points:0", *judges)
        assert code == 0, err
        before = len(server.requests)
        assert run(*COMMON, "--reward", "vlm-judge, key-points:0", *judges)[0] == 0
        assert len(server.requests) == before  # what was said is on disk
    scores = results(folder)["scores"]["raw"]
    assert scores["vlm-judge"] == [7.0] * 4 and scores["key-points"] == [1.0] * 4
    checks = read_scores(folder / "out" / "raw")["key-points"]["00000"].details["checks"]
    assert [c["question"] for c in checks] == ["Is there a circle?", "Is it red?"]


def test_a_judge_that_is_away_is_asked_again(run, folder):
    with Server("500", answer="<score>7</score>") as server:
        judge = ("--reward", "vlm-judge", "--reward-model", f"vlm-judge={server.url}")
        code, out, _ = run(*COMMON, *judge)
        assert code == 0 and results(folder)["scores"]["raw"]["vlm-judge"] == [None] * 4 and "vlm-judge 4" in out
        server.behaviours = ["well"]
        assert run(*COMMON, *judge)[0] == 0
    assert results(folder)["scores"]["raw"]["vlm-judge"] == [7.0] * 4
