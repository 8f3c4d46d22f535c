"""`promptloop score`, as a user runs it."""

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from promptloop_pipeline import cli
from promptloop_pipeline.cli import score as command
from promptloop_pipeline.rewards import load_reward
from promptloop_pipeline.tiny.language import system_caption
from promptloop_pipeline.tiny.scenes import Spec, random_scene, render

from . import models


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two pictures of the embedded world, and what is in them."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(3)
    scenes = [random_scene(rng) for _ in range(2)]
    paths = [folder / f"{k}.png" for k in range(2)]
    for scene, path in zip(scenes, paths):
        Image.fromarray(render(scene, rng)).save(path)
    return [str(p) for p in paths], [system_caption(Spec(s.objects, (), s.background)) for s in scenes]


def run(*args):
    """What the command prints."""
    result = CliRunner().invoke(cli.app, ["score", *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_table_json_and_csv(world):
    paths, prompts = world
    args = (*paths, "--prompt", prompts[0], "--reward", "verifier:2,verifier-strict:0")
    table = run(*args).splitlines()
    assert table[0].split() == ["image", "verifier", "verifier-strict", "total"]
    assert table[1].split() == [paths[0], "1.0000", "1.0000", "2.0000"]

    found = json.loads(run(*args, "--json"))
    assert found["rewards"][1] == {"name": "verifier-strict", "weight": 0.0, "cap": None}
    assert found["images"][0] == {"image": paths[0], "scores": {"verifier": 1.0, "verifier-strict": 1.0}, "total": 2.0}
    second = found["images"][1]
    assert second["total"] == 2 * second["scores"]["verifier"] < 2

    rows = list(csv.DictReader(run(*args, "--csv").splitlines()))
    assert [r["image"] for r in rows] == paths
    assert float(rows[1]["total"]) == second["total"]


def test_a_prompt_for_each_picture(world):
    paths, prompts = world
    out = run(*paths, "--prompt", prompts[0], "--prompt", prompts[1], "--reward", "verifier")
    assert [line.split()[1] for line in out.splitlines()] == ["verifier", "1.0000", "1.0000"]  # no total of one reward


def test_none_is_shown_as_such(world):
    paths, _ = world
    args = (paths[0], "--prompt", "an oil painting", "--reward", "verifier")
    assert run(*args).splitlines()[1].split()[1] == "-"
    assert json.loads(run(*args, "--json"))["images"][0] == {"image": paths[0], "scores": {"verifier": None}, "total": None}
    assert run(*args, "--csv").splitlines()[1] == f"{paths[0]},"


def test_model_of_ones_own_length_and_own_function(world, tmp_path, monkeypatch):
    paths, prompts = world
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text("def width(images, prompts, **context):\n    return [i.width for i in images]\n")
    folder = models.clip_model(tmp_path / "clip")
    rewards = "clip-score:1, my_rewards:width:0.5<=10, length:0"
    out = run(
        *paths, "--prompt", prompts[0], "--reward", rewards, "--model", f"clip-score={folder}", "--model",
        f"clip-score:tokenizer={folder}", "--refined", "word " * 20,
        "--device", "cpu", "--json",
    )  # fmt: skip
    scores = [row["scores"] for row in json.loads(out)["images"]]
    images = [Image.open(p).convert("RGB") for p in paths]
    wanted = load_reward("clip-score", model=folder, device="cpu")(images, prompts[:1] * 2)
    assert [s["clip-score"] for s in scores] == pytest.approx(wanted, abs=1e-5)
    assert [s["my_rewards:width"] for s in scores] == [i.width for i in images]
    assert [s["length"] for s in scores] == [1.0, 1.0]
    assert [row["total"] for row in json.loads(out)["images"]] == pytest.approx([w + 5 for w in wanted], abs=1e-5)


def test_many_pictures(world, monkeypatch):
    paths, prompts = world
    monkeypatch.setattr(command, "CHUNK", 3)
    rows = json.loads(run(*paths * 4, "--prompt", prompts[0], "--reward", "verifier", "--json"))["images"]
    assert [r["image"] for r in rows] == paths * 4
    assert [r["total"] for r in rows] == [r["total"] for r in rows[:2]] * 4


def test_bad_input_is_one_line_and_loads_no_model(world, tmp_path, monkeypatch):
    paths, prompts = world
    monkeypatch.setattr(command, "load_named_reward", lambda *a, **k: pytest.fail("a model was loaded"))
    (tmp_path / "bad.png").write_text("no picture")
    ask = ("--prompt", prompts[0])
    for args, match in (
        ([tmp_path / "none.png", *ask], "there is no picture at .*none.png"),
        ([*paths, tmp_path / "bad.png", *ask], "cannot read the picture .*bad.png"),
        ([tmp_path, *ask], "is a folder"),
        ([paths[0], "--prompt", " "], "the prompt is empty"),
        ([*paths, paths[0], "--prompt", "a", "--prompt", "b"], "--prompt is given 2 times for 3 pictures"),
        ([*paths, *ask, "--reward", "nothing"], "unknown reward 'nothing'"),
        ([*paths, *ask, "--reward", "format"], "format judges a refiner's answer"),
        ([*paths, *ask, "--reward", "length"], "length needs --refined"),
        ([*paths, *ask, "--reward", "length", *["--refined", "a"] * 3], "--refined is given 3 times for 2 pictures"),
        ([*paths, *ask, "--model", "x"], "cannot read --model 'x'; write NAME=WEIGHTS"),
        ([*paths, *ask, "--model", "image-reward:head=x"], "the reward image-reward has no part 'head'; it has tokenizer"),
        ([*paths, *ask, "--model", "x=y"], "unknown reward 'x'"),
        ([*paths, *ask, "--model", "hpsv2=y"], "for a reward that is not asked for; there are image-reward"),
        ([*paths, *ask, "--reward", "verifier", "--model", "verifier=y"], "the reward verifier has no model"),
        ([*paths, *ask, "--dtype", "int8"], "--dtype int8: use float32, float16, bfloat16"),
        ([*paths, *ask, "--batch", "0"], "--batch 0: give a number from 1 up"),
        ([*paths, *ask, "--json", "--csv"], "exclude each other"),
    ):
        with pytest.raises((ValueError, OSError), match=match):
            run(*args)


def promptloop(*args, **env):
    command = [Path(sys.executable).with_name("promptloop"), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | env)
    return done.returncode, done.stdout, done.stderr


def test_the_real_command(world):
    paths, prompts = world
    code, out, err = promptloop("score", *paths, "--prompt", prompts[0], "--reward", "verifier")
    assert (code, err) == (0, "") and out.count("\n") == 3
    code, out, err = promptloop("score", *paths, "--prompt", prompts[0], HF_HUB_OFFLINE="1")
    assert (code, out) == (2, "")
    assert err.startswith("promptloop: cannot get the weights of image-reward (ImageReward.pt of zai-org/ImageReward)")
    assert err.count("\n") == 1


@pytest.mark.parametrize("module", ["rewards", "rewards.combine", "rewards.images", "rewards.simple", "cli.score"])
def test_imports_are_light(module):
    code = (
        f"import sys, promptloop_pipeline.{module}; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist():
    from promptloop_pipeline import rewards

    assert all(getattr(rewards, name) is not None for name in rewards.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rewards.nothing
