import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
import typer.testing
import yaml
from promptloop_training import main as training
from promptloop_training.config import PromptLoopConfig
from promptloop_training.main import main
from promptloop_training.plan import REFUSED, configure, fit_machine, plan
from promptloop_training.record import UNSCORED, Samples
from promptloop_training.rollout import Group, Sample
from safetensors.torch import load_file

from promptloop_pipeline import attach, tiny
from promptloop_pipeline.cli import train as cli
from promptloop_pipeline.refiners.mllm import MLLMRefiner
from promptloop_pipeline.trajectory import load

HERE = f"{__package__}.test_main"
SMALL = {  # what a step of a second needs
    "prompts_per_step": 2, "group_size": 2, "turns": 2, "window": "25%, 80%", "start_turn": True, "num_inference_steps": 4,
    "per_device_train_batch_size": 8, "max_steps": 2, "train_data": "shapes:train:1", "train_prompts": 16, "watch_every": 0,
    "samples_every": 0, "save_steps": 1, "learning_rate": "1e-3", "lr_scheduler_type": "constant", "max_completion_length": 24,
    "gradient_checkpointing": False, "temperature": 2.0, "rewards": f"{HERE}:talkative", "disable_tqdm": True,
}  # fmt: skip


WHOLE = {"max_steps": 3, "samples_every": 2, "group_size": 3, "retained": 1, "rewards": f"{__package__}.test_main:failing"}


def talkative(images, prompts, trajectories, **_):
    """Differs within every group, so that every step has something to learn."""
    return [sum(map(len, (turn.raw for turn in t.turns))) / 100 for t in trajectories]


CALLS = {"n": 0, "raise_at": -1, "what": ValueError}


def failing(images, prompts, **context):
    CALLS["n"] += 1
    if CALLS["n"] == CALLS["raise_at"]:
        raise CALLS["what"]("the judge is on holiday")
    return talkative(images, prompts, **context)


def small(folder, **more):
    """The command line of a small run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in (SMALL | {"output_dir": str(folder / "out")} | more).items() if v is not ...}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    return ["grpo", "--config", str(folder / "recipe.yaml")]


def weights(folder):
    return load_file(next(p for n in ("model", "adapter_model") if (p := folder / f"{n}.safetensors").is_file()))


def same(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[k], two[k]) for k in one)


def log(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    timed = ("seconds", "step_time", "train_runtime", "per_second", "tokens_per", "train_loss", "total_flos")
    return [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in rows]


@pytest.fixture(autouse=True)
def here(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setitem(CALLS, "n", 0)
    monkeypatch.setitem(CALLS, "raise_at", -1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three steps that nothing stopped, and that is recorded."""
    folder = tmp_path_factory.mktemp("whole")
    before = os.getcwd()
    assert main(small(folder, **WHOLE)) == 0
    assert os.getcwd() == before
    return folder / "out"


# --- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_models(monkeypatch):
    """Whoever builds or loads a network fails the test."""

    def never(self, *args, **kwargs):
        raise AssertionError("a model was made")

    monkeypatch.setattr(torch.nn.Module, "__init__", never)


JSONL = '{"prompt": "a cat", "tag": "verifier"}\n{"prompt": "a dog", "tag": "vrifier"}\n'
MISTAKES = [
    ({"trns": 3}, "recipe.yaml: there is no key 'trns'; did you mean 'turns'?"),
    ({"zzzzz": 3}, "there is no key 'zzzzz'; --help lists all keys"),
    ({"turns": "three"}, "turns is 'three'; give a whole number"),
    ({"use_peft": "perhaps"}, "use_peft is 'perhaps'; give true or false"),
    ({"learning_rate": "fast"}, "learning_rate is 'fast'; give a number"),
    ({"turns": 4}, "turns is 4, and the window '25%, 80%' of 4 steps has room for 3"),
    ({"per_device_train_batch_size": 3}, "per_device_train_batch_size is 3, and a batch has 8 turns"),
    ({"rewards": "verifer"}, "unknown reward 'verifer'; there are image-reward,"),
    ({"rewards": "nowhere:reward"}, "cannot load the reward 'nowhere:reward'"),
    ({"rewards": "verifier:0"}, "none has a weight"),
    ({"rewards": "image-reward", "reward_models": ["image-reward=/no/file.pt"]}, "there is nothing at /no/file.pt"),
    ({"reward_models": ["clip=/no"]}, "reward"),
    ({"retained": 2}, "retained is 2 of a group of 2"),
    ({"train_data": "missing.jsonl"}, "there is no file of prompts at missing.jsonl"),
    ({"train_data": "FOLDER/empty.txt"}, "empty.txt holds no prompt"),
    ({"train_data": "FOLDER/p.jsonl", "train_prompts": ..., "prompt_column": "text"}, "prompt_column is 'text'"),
    ({"train_data": "FOLDER/other.jsonl", "train_prompts": ...}, 'no column "prompt"; there are text'),
    ({"train_data": "FOLDER/p.jsonl", "train_prompts": ..., "prompts_per_step": 4}, "has 2 prompts to train on"),
    ({"train_data": "FOLDER/p.jsonl", "train_prompts": ..., "watch_every": 1}, "64 of them are to be held out"),
    ({"by_tag": True, "rewards": "verifier"}, 'no column "tag"; add it, naming a reward: verifier'),
    ({"by_tag": True, "rewards": "verifier", "train_data": "FOLDER/p.jsonl", "train_prompts": ...}, "has the tag 'vrifier'"),
    ({"rewards": "geneval"}, "the reward geneval needs the column 'geneval', and shapes:train:1 has none"),
    ({"pipeline": "./nowhere"}, "no pipeline at ./nowhere"),
    ({"refiner": "./nowhere"}, "there is no refiner at ./nowhere"),
    ({"refiner": "FOLDER"}, "expected a folder with config.json or adapter_config.json"),
    ({"template": "rewriet"}, "there is no template 'rewriet'"),
    ({"template": "reprompt"}, "the template 'reprompt' shows no picture; use refine_at"),
    ({"template": "editing"}, "the template 'editing' shows the picture that a run starts from"),
    ({"output_dir": "FOLDER/empty.txt/out"}, "cannot write to the folder"),
    ({"output_dir": "FOLDER"}, "is not empty, and holds no run"),
    ({"num_generations": 4}, "num_generations cannot be given: it follows from"),
    ({"model_name_or_path": "x/y"}, "the policy is named by `refiner`"),
    ({"eval_strategy": "steps"}, "prompts held out are watched instead"),
    ({"lora_r": 8}, "lora_r is given, and use_peft is not true"),
    ({"loss_type": "dappo"}, "loss_type is 'dappo'; use dapo, grpo"),
    ({"watch_blind": "often"}, "watch_blind is 'often'; use never, end or always"),
    ({"dtype": "float8"}, "dtype is 'float8'; use auto"),
    ({"temperature": 0}, "temperature is 0"),
    ({"push_to_hub": True}, "hub_model_id is not given"),
    ({"report_to": "wandb"}, "report_to is wandb, which is not installed"),
    ({"report_to": "wandbb"}, "report_to is 'wandbb'; use none, or some of"),
    ({"rollout_batch": 0}, "rollout_batch is 0; use 1 or more"),
    ({"lr_scheduler_type": "constnt"}, "constnt"),
    ({"env": 3}, "env is 3; give a mapping"),
]  # fmt: skip


@pytest.mark.parametrize("wrong, message", MISTAKES, ids=[m.replace("/", "-")[:40] for _, m in MISTAKES])
def test_mistakes_are_told_before_any_model_is_made(wrong, message, tmp_path, no_models):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "p.jsonl").write_text(JSONL)
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    wrong = {k: v.replace("FOLDER", str(tmp_path)) if isinstance(v, str) else v for k, v in wrong.items()}
    if wrong.get("report_to") == "wandb" and "wandb" in sys.modules:
        pytest.skip("wandb is there")
    with pytest.raises((ValueError, OSError, ImportError)) as e:
        main(small(tmp_path, **wrong))
    assert message in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, message", [("a: [1", "is no YAML"), ("- a\n- b", "holds list"), ("a: \t1: 2", "is no YAML")])
def test_a_file_that_is_none(text, message, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as e:
        configure(["--config", str(tmp_path / "x.yaml")])
    assert "\n" not in str(e.value)
    with pytest.raises(FileNotFoundError, match="no config file"):
        configure(["--config", str(tmp_path / "y.yaml")])
    for argv, message in (
        (["x"], "cannot read 'x' on the command line"),
        (["--turns"], "the command line: turns is not given; give a whole number"),
        (["--turns", "1", "2"], r"the command line: turns is \['1', '2'\]; give a whole number"),
        (["--config", "a", "b"], "--config takes one file"),
    ):
        with pytest.raises(ValueError, match=message):
            configure(argv)


def test_nobody_has_to_say_that_there_is_no_gpu(tmp_path, monkeypatch):
    config = plan(small(tmp_path)[1:]).config
    assert config.bf16 == torch.cuda.is_available() and config.learning_rate == 1e-3
    assert "use_cpu" not in fit_machine({})
    monkeypatch.setenv("WORLD_SIZE", "2")  # of these, each would take itself for the only one
    assert fit_machine({}).get("use_cpu", False) == (not torch.accelerator.is_available())
    assert fit_machine({"use_cpu": False})["use_cpu"] is False


# --- runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_log_samples_and_a_manifest(whole):
    rows = log(whole)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert all(np.isfinite(row["reward"]) and row["grad_norm"] > 0 for row in rows if "loss" in row)
    assert sorted(p.name for p in (whole / "samples").iterdir()) == ["step-000000", "step-000002"]
    samples = load(whole / "samples" / "step-000002")
    assert len(samples) == 6 and len({t.request for t in samples}) == 2 and all(t.image for t in samples)
    assert {t.meta["trajectory"] for t in samples} == {0, 1, 2}
    assert all(bool(t.turns) != t.meta["retained"] for t in samples)
    page = (whole / "samples" / "step-000002" / "index.html").read_text()
    assert "Training step 2" in page and "trajectory 2" in page and "retained 1" in page and samples[0].request in page
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["config"]["turns"] == 2 and manifest["config"]["lora_r"] == 16 and manifest["data"]["train"]["n"] == 16
    assert manifest["versions"]["trl"] and manifest["seeds"]["training"] == 42 and manifest["command"][0] == "grpo"
    assert not [p for p in whole.rglob("*") if p.name.startswith(".")]


def test_the_result_loads_and_refines(whole):
    final = whole / "final"
    assert same(weights(final), weights(whole / "checkpoint-3"))
    assert not same(weights(final), weights(whole / "checkpoint-1"))
    assert not list(final.glob("*.bin"))
    refiner = MLLMRefiner.from_pretrained(final, final / "template.txt", device="cpu")
    assert refiner.sampling.max_new_tokens == 24 and refiner.looks
    out = attach(tiny.load_pipeline())(
        "a red circle, nothing else", refiner=refiner, refine_at="start, 2", num_inference_steps=4
    )
    assert [turn.step for turn in out.trajectories[0].turns] == [0, 2] and out.trajectories[0].turns[1].raw
    assert plan(["--refiner", str(final)]).template.sections == tiny.load_refiner().template.sections  # its own is the default


def test_the_card_says_what_was_done(whole, monkeypatch):
    card = (whole / "final" / "README.md").read_text()
    assert "2510.00430" in card and f"{HERE}:failing" in card and "shapes:train:1, 16 prompts" in card and "3 steps" in card
    assert "library_name: transformers" in card and "learning_rate: 0.001" in card and "not watched" in card
    head = yaml.safe_load(card.split("---")[1])
    assert "promptloop" in head["tags"] and "base_model" not in head
    code = card.split("```python\n")[1].split("```")[0]
    assert "pipe = tiny.load_pipeline()" in code and 'refine_at="start, ' in code
    scope = {}
    monkeypatch.chdir(whole)
    exec(code.replace('"..."', '"a red circle"'), scope)
    assert len(scope["out"].images) == 1 and scope["out"].trajectories[0].turns


def test_a_run_that_is_done_is_not_done_again(whole, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != "manifest.json" and p.is_file()}
    argv = ["grpo", "--config", str(whole.parent / "recipe.yaml")]
    assert main(argv) == 0
    assert "this run is done" in capsys.readouterr().out
    for more, message in (
        (["--window", "20%, 80%"], "window is '25%, 80%' there and '20%, 80%' now"),
        (["--lora_r", "4", "--use_peft", "true"], "use_peft is False there and True now"),
        (["--train_prompts", "15"], "train_prompts is 16 there and 15 now"),
        (["--resume", "false"], "holds a run already"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*argv, *more])
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CALLS, "raise_at", 2)
    monkeypatch.setitem(CALLS, "what", KeyboardInterrupt)
    assert main(small(tmp_path, rewards=f"{HERE}:failing")) == 130
    said = capsys.readouterr().err
    assert "stopped after step 1 of 2: the last whole checkpoint is" in said and "the same command goes on from it" in said
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"checkpoint-1", "log.jsonl", "manifest.json"}


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(CALLS, "raise_at", 3)
    argv = small(tmp_path, **WHOLE)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError) as e:
        main(argv)
    reason = f"the reward '{HERE}:failing' failed: ValueError: the judge is on holiday"
    again = f"the last whole checkpoint is {out / 'checkpoint-2'}, and the same command goes on from it"
    assert str(e.value) == f"stopped at step 3: {reason}; {again}"
    assert not (out / "final").exists()
    (out / "checkpoint-2" / "optimizer.pt").write_bytes(b"")  # as if it had been killed while that was written
    with open(out / "log.jsonl", "a") as f:
        f.write('{"step": 2, "lo')
    assert main(argv) == 0
    assert same(weights(out / "final"), weights(whole / "final"))
    assert log(out) == log(whole)
    for step in ("step-000000", "step-000002"):
        one, two = (load(folder / "samples" / step) for folder in (out, whole))
        assert [[turn.raw for turn in t.turns] for t in one] == [[turn.raw for turn in t.turns] for t in two]


@pytest.mark.slow
def test_killed_before_its_result_was_kept(whole, tmp_path):
    """Nothing is trained, watched or logged twice."""
    out = tmp_path / "out"
    argv = small(tmp_path, **WHOLE | {"max_steps": 2})
    assert main(argv) == 0
    once, result = log(out), weights(out / "final")
    shutil.rmtree(out / "final")
    assert main(argv) == 0
    assert log(out) == once and same(weights(out / "final"), result)


@pytest.mark.slow
def test_a_run_can_be_made_longer(whole, tmp_path):
    argv = small(tmp_path, **WHOLE | {"max_steps": 2, "samples_every": 0})
    assert main(argv) == 0
    shutil.copytree(tmp_path / "out" / "final", tmp_path / "then")
    assert main([*argv, "--max_steps", "3"]) == 0
    assert same(weights(tmp_path / "out" / "final"), weights(whole / "final"))
    assert not same(weights(tmp_path / "out" / "final"), weights(tmp_path / "then"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["config"]["max_steps"] == 3 and "--max_steps" not in manifest["command"]
    assert manifest["resumed"][0]["from"] == "checkpoint-2" and "--max_steps" in manifest["resumed"][0]["command"]


def test_what_cannot_be_written_stops_the_run_with_one_line(tmp_path):
    it = plan(small(tmp_path)[1:])
    training.claim_folder(it)
    trainer = training.load(it)
    (it.folder / "checkpoint-1").write_text("in the way")
    with pytest.raises(
        RuntimeError, match="checkpoint-1 cannot be written: .*there is no checkpoint yet, and the same command"
    ) as e:
        training.train(it, trainer, None)
    assert "\n" not in str(e.value)


def test_a_judge_that_is_gone_stops_the_run(tmp_path):
    def batch(*rewards):
        return [Group(Sample("a cat", 0), [], [], rewards=list(rewards))]

    told = Samples(tmp_path, 0, 0)
    for step in range(UNSCORED - 1):
        told(step, batch(None, None))
    told(UNSCORED, batch(None, 0.5))  # a prompt that no reward applies to is nothing wrong
    with pytest.raises(RuntimeError, match="no picture of the last 5 steps had a reward"):
        for step in range(UNSCORED):
            told(step, batch(None, None))
    assert step == UNSCORED - 1


def test_a_run_without_a_step_does_not_hold_its_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(CALLS, "raise_at", 1)
    with pytest.raises(RuntimeError, match="there is no checkpoint yet"):
        main(small(tmp_path, rewards=f"{HERE}:failing", max_steps=1, samples_every=1))
    assert main(small(tmp_path, rewards=f"{HERE}:failing", max_steps=1, learning_rate=1e-4)) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["config"]["learning_rate"] == 1e-4 and "resumed" not in manifest


@pytest.mark.slow
def test_an_adapter_is_trained_kept_and_trained_on(tmp_path, capsys):
    argv = small(tmp_path, max_steps=1, use_peft=True, lora_r=4, lora_dropout=0.0, beta=0.01)
    assert main(argv) == 0
    final = tmp_path / "out" / "final"
    adapter = json.loads((final / "adapter_config.json").read_text())
    found = weights(final)
    assert adapter["r"] == 4 and not list(final.glob("model*")) and not (final / "ref").exists()
    assert found and all("text_model" in k and "vision" not in k for k in found)  # the vision tower is left as it is
    assert "library_name: peft" in (final / "README.md").read_text()
    refiner = MLLMRefiner.from_pretrained(final, final / "template.txt", device="cpu")
    base = load_file(tiny.WEIGHTS / "refiner" / "model.safetensors")
    loaded = {
        k.replace("base_model.model.", "").replace(".base_layer", ""): v for k, v in refiner.chat.model.state_dict().items()
    }
    assert all(torch.equal(loaded[k], v.float()) for k, v in base.items() if k in loaded)
    on = tmp_path / "on"
    assert main(small(on, max_steps=1, refiner=str(final), beta=0.01)) == 0
    further = weights(on / "out" / "final")
    assert further.keys() == found.keys() and not same(further, found)
    with pytest.raises(ValueError, match="is an adapter already"):
        main(small(tmp_path / "twice", refiner=str(final), use_peft=True))


# --- the command --------------------------------------------------------------------------------------------------------


def test_help_lists_all_keys(capsys):
    assert main(["--help"]) == 0 and main([]) == 0
    assert "sft" in capsys.readouterr().out
    assert main(["grpo", "--help"]) == 0
    said = capsys.readouterr().out
    places = [said.index(f"\n  {key}  (") for key in ("refiner", "turns", "watch_every", "resume", "use_peft", "lora_r")]
    assert places == sorted(places)
    missing = [f.name for f in fields(PromptLoopConfig) if f"{f.name} (" not in said and f"{f.name}  (" not in said]
    assert set(missing) == set(REFUSED) - {"model_name_or_path"}
    with pytest.raises(ValueError, match="no method 'gropo'; use grpo or sft"):
        main(["gropo"])


def test_the_command_hands_on_what_it_is_given(tmp_path):
    app = typer.Typer()
    app.command("train", context_settings=cli.CONTEXT, add_help_option=False)(cli.train)
    app.command("other")(lambda: None)
    run = typer.testing.CliRunner().invoke
    assert run(app, ["train"]).exit_code == 0
    assert "lora_r" in run(app, ["train", "grpo", "--help"]).output
    error = run(app, ["train", "grpo", "--config", str(tmp_path / "x.yaml"), "--turns", "3"]).exception
    assert isinstance(error, FileNotFoundError)


def test_without_trl_the_command_says_what_to_install():
    code = """import sys, typer
sys.modules['trl'] = None
from promptloop_pipeline.cli import train
app = typer.Typer(pretty_exceptions_enable=False)
app.command('train', context_settings=train.CONTEXT, add_help_option=False)(train.train)
app(['grpo', '--config', 'x'])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode and done.stderr.strip().endswith(
        'training needs packages that are not there (trl): pip install "promptloop[train]"'
    )
