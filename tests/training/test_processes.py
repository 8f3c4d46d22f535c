"""Two processes equal one with twice the prompts. This file is also what the processes run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from promptloop_pipeline import tiny

COMMON = {
    "max_steps": 2, "save_strategy": "no", "optim": "sgd", "learning_rate": 0.05, "max_completion_length": 12, "group_size": 3,
    "retained": 1, "per_device_train_batch_size": 2, "scale_rewards": "batch", "shuffle_dataset": True,
}  # fmt: skip


def told(group):
    return [group.sample.request, group.sample.seed, group.rewards, [t.prompt for t in group.trajectories]]


def work(folder, prompts):
    """Trains two steps; writes what this process had."""
    from accelerate.utils import broadcast
    from promptloop_training.policy import leave_together

    from .test_grpo import build

    torch.set_num_threads(1)
    trainer = build(folder, prompts_per_step=prompts, **COMMON)
    trainer.train()
    rank, weights = trainer.accelerator.process_index, trainer.accelerator.unwrap_model(trainer.model).state_dict()
    agree = all(torch.equal(broadcast(w.clone()), w) for w in weights.values())
    found = {
        "agree": agree,
        "processes": trainer.accelerator.num_processes,
        "groups": [[told(group) for group in batch] for batch in trainer.kept],
        "advantages": [batch["advantages"].tolist() for batch in trainer.batches],
        "log": trainer.state.log_history[:2],
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    if rank == 0:
        torch.save(weights, Path(folder, "weights.pt"))
    leave_together()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    root = Path(__file__).parents[__name__.count(".")]  # where this package can be imported from by its name
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]  # --cpu would run one
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", f"{__package__}.test_processes", str(two)]
    process = subprocess.Popen(
        command, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    work(one, 2)
    output, _ = process.communicate(timeout=170)
    assert process.returncode == 0, output[-3000:]
    whole, ranks = json.loads((one / "0.json").read_text()), [json.loads((two / f"{k}.json").read_text()) for k in (0, 1)]
    assert whole["processes"] == 1 and [r["processes"] for r in ranks] == [2, 2] and all(r["agree"] for r in ranks)
    for step in range(2):
        assert [len(r["groups"][step]) for r in ranks] == [1, 1]  # whole groups, all of their rows, on one rank
        parts = [group for r in ranks for group in r["groups"][step]]
        for (request, seed, rewards, prompts), group in zip(parts, whole["groups"][step], strict=True):
            assert [request, seed, prompts] == [group[0], group[1], group[3]]
            assert rewards == pytest.approx(group[2], abs=1e-6)
        advantages = [a for r in ranks for a in r["advantages"][step]]
        assert advantages == pytest.approx(whole["advantages"][step], abs=1e-5)  # "batch": over all processes
        for key in ("loss", "grad_norm", "num_tokens", "group/deviation", "turn/tokens", "learning_rate"):
            assert ranks[0]["log"][step][key] == pytest.approx(whole["log"][step][key], abs=1e-5, rel=1e-4), key
    a, b = (torch.load(folder / "weights.pt", weights_only=True) for folder in (one, two))
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-6
    start = tiny.load_refiner().chat.model.state_dict()
    assert max((a[name] - start[name]).abs().max().item() for name in start) > 1e-4  # or nothing was tested


if __name__ == "__main__":
    work(sys.argv[1], 1)
