import json
import random

import numpy as np
import pytest
import torch
from promptloop_training import main as training
from promptloop_training.data import load_prompts
from promptloop_training.main import main
from promptloop_training.plan import plan
from promptloop_training.watch import SEEDS, undisturbed
from transformers import TrainerCallback

from promptloop_pipeline import tiny
from promptloop_pipeline.evaluation.arms import GreyRefiner
from promptloop_pipeline.evaluation.run import run_arm
from promptloop_pipeline.evaluation.statistics import mean

from .test_main import here, log, same, small, talkative, weights  # noqa: F401

HERE = f"{__package__}.test_watch"
WATCHED = {"watch_every": 2, "watch_prompts": 3, "max_steps": 3, "watch_blind": "end", "save_total_limit": 1}
SCORES: list[float] = []


def restless(images, prompts, **context):
    """Draws from every random state that there is, and goes by it."""
    drawn = random.random() + float(np.random.rand()) + float(torch.rand(1))
    return [value * drawn for value in talkative(images, prompts, **context)]


def scripted(images, prompts, trajectories, **_):
    """While watched, which is one picture a prompt at once: the scores of `SCORES`, one a look."""
    if len(images) == WATCHED["watch_prompts"]:
        return [SCORES.pop(0)] * len(images)
    return talkative(images, prompts, trajectories)


@pytest.fixture(scope="module")
def watched(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(request.config.rootpath)
        assert main(small(folder, **WATCHED, rewards=f"{HERE}:restless, verifier:0")) == 0
    return folder / "out"


def test_watching_changes_nothing(watched, tmp_path):
    argv = small(tmp_path, max_steps=3, rewards=f"{HERE}:restless, verifier:0")
    assert main(argv) == 0
    assert same(weights(tmp_path / "out" / "final"), weights(watched / "final"))
    assert log(tmp_path / "out") == [row for row in log(watched) if not any(key.startswith("watch") for key in row)]


def test_it_looks_before_the_first_step_in_between_and_at_the_end(watched):
    rows = log(watched)
    assert [row["step"] for row in rows if "watch/n" in row] == [0, 2, 3]
    assert [row["step"] for row in rows if "watch-blind/n" in row] == [3]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    card = (watched / "final" / "README.md").read_text()
    first = next(row for row in rows if "watch/n" in row)
    figure = "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**{k: first[f"watch/verifier/{k}"] for k in ("mean", "low", "high")})
    assert "| 0 | " in card and figure in card and "on 3 prompts" in card and "flat grey picture" in card


def test_its_figures_are_those_of_an_evaluation(watched):
    """The first ones: of the refiner as it was, greedy, equally spaced, from the same noise."""
    prompts = load_prompts("shapes:any:1", n=3, seed=1)
    pipe = tiny.load_pipeline()
    refiner = tiny.load_refiner(max_new_tokens=24)
    found = run_arm(
        pipe, prompts.requests, [SEEDS + i for i in range(3)], refiner, "start, 1, 3", num_inference_steps=4, guidance_scale=3.0,
        score=lambda t: {"verifier": tiny.verify(t.image, t.request).score},
    )  # fmt: skip
    first = log(watched)[0]
    figures = mean([t.scores["verifier"] for t in found])
    assert {part: first[f"watch/verifier/{part}"] for part in ("mean", "low", "high")} == {
        part: pytest.approx(figures[part]) for part in ("mean", "low", "high")
    }
    assert first["watch/changes"] == sum(turn.changed for t in found for turn in t.turns) / 3


def test_blind_it_sees_grey(tmp_path):
    """With a policy that is as it was, both figures of the last look are those of an evaluation."""
    assert (
        main(small(tmp_path, **WATCHED | {"max_steps": 1, "learning_rate": 0.0}, rewards=f"{HERE}:talkative, verifier:0")) == 0
    )
    prompts = load_prompts("shapes:any:1", n=3, seed=1)
    found = run_arm(
        tiny.load_pipeline(), prompts.requests, [SEEDS + i for i in range(3)], GreyRefiner(tiny.load_refiner(max_new_tokens=24)),
        "start, 1, 3", num_inference_steps=4, guidance_scale=3.0,
    )  # fmt: skip
    rows = [row for row in log(tmp_path / "out") if "watch-blind/n" in row]
    said = [sum(len(turn.raw) for turn in t.turns) / 100 for t in found]
    assert rows[0][f"watch-blind/{HERE}:talkative/mean"] == pytest.approx(sum(said) / 3)


@pytest.mark.slow
def test_the_best_is_kept_whatever_comes_after(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{HERE}.SCORES", [0.5, 0.4, 0.9, 0.6, 0.9])  # steps 0 to 4
    argv = small(tmp_path, **WATCHED | {"watch_every": 1, "max_steps": 4, "watch_blind": "never"}, rewards=f"{HERE}:scripted")
    ends = {}
    it = plan(argv[1:])
    training.claim_folder(it)
    trainer = training.load(it)

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            ends[state.global_step] = {k: v.clone() for k, v in model.state_dict().items()}

    trainer.add_callback(Note())
    assert training.train(it, trainer, None) == 0
    best = it.folder / "best"
    assert json.loads((best / "watched.json").read_text()) == {"step": 2, "total": 0.9}
    found = weights(best)
    assert found and all(torch.equal(v, ends[2][k]) for k, v in found.items()) and not same(found, weights(it.folder / "final"))
    assert [p.name for p in it.folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert "the best is that of step 2" in (it.folder / "final" / "README.md").read_text()


@pytest.mark.slow
def test_resumed_it_has_seen_the_same(watched, tmp_path):
    argv = small(tmp_path, **WATCHED, rewards=f"{HERE}:restless, verifier:0")
    assert main([*argv, "--max_steps", "2"]) == 0
    assert main(argv) == 0
    rows = log(tmp_path / "out")
    assert [row for row in rows if "watch/n" in row] == [row for row in log(watched) if "watch/n" in row]
    assert same(weights(tmp_path / "out" / "final"), weights(watched / "final"))
    assert (watched / "best").exists() == (tmp_path / "out" / "best").exists()


def test_random_states_are_left_as_they_were():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    wanted = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with undisturbed():
        assert draw() == wanted
    assert draw() == wanted
