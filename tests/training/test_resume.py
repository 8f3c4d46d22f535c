"""A run that was killed and resumed equals one that never was: the same weights to the bit, the same log."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from promptloop_training.grpo import last_checkpoint
from safetensors.torch import load_file
from transformers import TrainerCallback

from .test_grpo import build

STEPS, TIMES = 6, ("seconds/", "step_time", "train_")


def trainer(folder, adapter=True, **changes):
    """Shuffled data, accumulated gradients, dropout, an epoch that ends midway: whatever draws from some random state."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.2) if adapter else None
    common = {
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "prompts_per_step": 1, "per_device_train_batch_size": 2,
        "max_completion_length": 8, "shuffle_dataset": True, "learning_rate": 1e-2, "lr_scheduler_type": "cosine",
        "rewards": f"{__package__}.test_rollout:wordy",
    }  # fmt: skip
    return build(folder, peft_config=lora, **common | changes)


def result(folder, steps=STEPS):
    """(weights, optimizer's state, log without times) of a finished run."""
    last = Path(folder) / f"checkpoint-{steps}"
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    log = [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in log]
    assert [row["step"] for row in log] == list(range(1, steps + 1))
    (weights,) = last.glob("*model.safetensors")
    return weights.read_bytes(), {k: v["exp_avg"].tolist() for k, v in optimizer.items()}, log


def same(folder, other, steps=STEPS):
    one, two = result(folder, steps), result(other, steps)
    assert one[2] == two[2] and one[1] == two[1] and one[0] == two[0]
    assert len({row["grad_norm"] for row in one[2]}) == steps


# --- killed -----------------------------------------------------------------------------------------------------------------


class Die(TrainerCallback):
    """At a moment that is not left to chance: the first checkpoint is due, and not begun."""

    def on_log(self, args, state, control, **kwargs):
        if state.global_step % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def work(folder, begun, where):
    """In a process of its own: goes on with the run in the folder."""
    torch.set_num_threads(1)
    last = last_checkpoint(folder)
    it = trainer(folder)
    if where == "before saving":
        it.add_callback(Die())
    if where == "while saving":
        it._save_scaler = lambda out: os.kill(os.getpid(), signal.SIGKILL)  # between the optimizer and the rest
    begun.set()
    it.train(resume_from_checkpoint=last)


def run(folder, seconds=None, where=None):
    """Runs, killed after some seconds of training; returns (exit code, seconds of training)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.test_resume"])  # all imports once; what is killed is a fork of that
    begun = context.Event()
    process = context.Process(target=work, args=(str(folder), begun, where))
    process.start()
    assert begun.wait(120)
    clock = time.monotonic()
    process.join(seconds if seconds is not None else 120)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode, time.monotonic() - clock


@pytest.mark.slow
def test_killed_at_any_point(tmp_path):
    code, seconds = run(tmp_path / "whole")
    assert code == 0 and last_checkpoint(tmp_path / "whole").endswith(f"checkpoint-{STEPS}")
    rng, folder, found = random.Random(time.time()), tmp_path / "killed", []
    for where in (None, "while saving", "before saving", None, None):
        after = rng.uniform(0.05, 0.5) * seconds
        code, took = run(folder, None if where else after, where)
        found.append((where, round(took, 2), code, sorted(p.name for p in folder.glob("checkpoint-*"))))
        if where == "while saving":
            half = [p for p in folder.glob("checkpoint-*") if not (p / "trainer_state.json").is_file()]
            assert code and half and str(half[-1]) != last_checkpoint(folder)
    assert run(folder)[0] == 0, found
    assert sum(code == -signal.SIGKILL for _, _, code, _ in found) >= 3, found
    same(tmp_path / "whole", folder)


# --- stopped ----------------------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize(
    ("steps", "stop", "changes"),
    [
        (4, 3, {"num_iterations": 2, "save_steps": 2, "adapter": False}),  # a batch is used twice
        (6, 5, {"save_steps": 1, "group_size": 3, "retained": 1, "loss_type": "grpo"}),  # within the second epoch
        (4, 2, {"save_steps": 1, "start_turn": True, "credit": "turn", "rewards": f"{__package__}.test_rollout:mixed"}),
    ],
)
def test_stopped_after_a_checkpoint(tmp_path, steps, stop, changes):
    trainer(tmp_path / "whole", **changes, max_steps=steps).train()
    first = trainer(tmp_path / "stopped", **changes, max_steps=steps)
    first.add_callback(Stop(stop))
    first.train()
    torch.manual_seed(12345)  # another process has another random state
    random.seed(7)
    second = trainer(tmp_path / "stopped", **changes, max_steps=steps)
    last = last_checkpoint(tmp_path / "stopped")
    assert last.endswith(f"checkpoint-{stop // changes['save_steps'] * changes['save_steps']}")
    second.train(resume_from_checkpoint=last)
    same(tmp_path / "whole", tmp_path / "stopped", steps)


def test_killed_after_its_last_checkpoint(tmp_path):
    """What is left to do is nothing: no step too many."""
    trainer(tmp_path, max_steps=2).train()
    first = result(tmp_path, 2)
    again = trainer(tmp_path, max_steps=2)
    again.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert again.state.global_step == 2
    assert last_checkpoint(tmp_path).endswith("checkpoint-2") and result(tmp_path, 2) == first
    kept = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    held = get_peft_model_state_dict(again.model)
    assert kept.keys() == held.keys() and all(torch.equal(kept[k], held[k]) for k in kept)


def test_an_older_run_in_the_same_folder_is_not_taken_for_whole(tmp_path):
    """A checkpoint that is written over another one is not whole until it is the new one."""
    first = trainer(tmp_path, max_steps=2)
    first.train()
    assert last_checkpoint(tmp_path).endswith("checkpoint-2")
    second = trainer(tmp_path, max_steps=2, seed=1)

    def interrupted(folder):
        raise KeyboardInterrupt

    second._save_scaler = interrupted
    with pytest.raises(KeyboardInterrupt):
        second.train()
    assert last_checkpoint(tmp_path) is None
