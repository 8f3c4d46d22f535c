"""Watching: at fixed steps the policy as it is, greedy and at equally spaced turns as at test (PromptLoop), on prompts that it is
not trained on, always from the same noise; and the same policy shown grey pictures, for what its eyes are worth."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

from promptloop_pipeline.evaluation.arms import GreyRefiner
from promptloop_pipeline.evaluation.run import run_arm
from promptloop_pipeline.evaluation.statistics import mean
from promptloop_pipeline.refiner import Refiner
from promptloop_pipeline.refiners.mllm import MLLMRefiner

from .data import Prompts
from .grpo import PromptLoopGRPOTrainer
from .policy import keep
from .rollout import Group, Sample, _greedy, _quiet

BEST, WATCHED = "best", "watched.json"
SEEDS = 1_000_000  # the noise of the first watched prompt; the others count up
WHEN = ("never", "end", "always")


class Watch(TrainerCallback):
    """prompts: held out. every: steps between two looks; there is one before the first step and one after the last, too. blind: when
    the policy is also watched with grey pictures: "never", "end" or "always". folder: of the run; where the mean of what is trained on
    rises above all before it (that before the first step included), the model is kept in `best`, with its template.

    Figures are logged as watch/NAME/{mean,low,high} with 95% intervals, NAME being a reward or "total", what is trained on; blind
    ones as watch-blind/. The random states of the training are left as they were.
    """

    def __init__(self, prompts: Prompts, every: int, blind: str, folder: Path, template: Path) -> None:
        self.prompts, self.every, self.blind, self.folder, self.template = prompts, every, blind, folder, template
        self.trainer: PromptLoopGRPOTrainer | None = None  # given once there is one
        self.steps: list[int] = []
        self.seen: dict[str, int] = {}  # the last step that each arm was watched at
        self.best = -float("inf")

    def watch(self, trainer: PromptLoopGRPOTrainer) -> None:
        self.trainer, self.steps = trainer, trainer.loop.even_steps()
        if not any(self.steps):
            self.blind = "never"  # there are no pictures to be without
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen = {n: row["step"] for row in state.log_history for n in ("watch", "watch-blind") if f"{n}/n" in row}
        file = self.folder / BEST / WATCHED
        if not state.global_step:
            shutil.rmtree(self.folder / BEST, ignore_errors=True)
            self._look(0, self.blind == "always")
            return
        means = (row.get("watch/total/mean") for row in state.log_history)
        self.best = max((m for m in means if m is not None), default=self.best)
        if file.is_file() and json.loads(file.read_text(encoding="utf-8"))["step"] > state.global_step:
            shutil.rmtree(self.folder / BEST)  # it will come again

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._look(state.global_step, self.blind == "always")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state.global_step, self.blind != "never")

    def _look(self, step: int, blind: bool) -> None:
        """What of it was not done at this step."""
        if self.seen.get("watch") != step:
            self.seen["watch"] = step
            total = self._figures("watch", self._policy())
            if step and total > self.best:
                files = {WATCHED: json.dumps({"step": step, "total": total}) + "\n"}
                keep(self.trainer, self.folder / BEST, self.template, self._policy().sampling.max_new_tokens, files)
            self.best = max(self.best, total)
        if blind and self.seen.get("watch-blind") != step:
            self.seen["watch-blind"] = step
            self._figures("watch-blind", GreyRefiner(self._policy()))

    def _policy(self) -> MLLMRefiner:
        assert self.trainer is not None
        policy = self.trainer.rollout.refiner
        greedy = _greedy(policy)
        greedy.chat = getattr(policy.chat, "plain", policy.chat)  # what vLLM draws is not greedy
        return greedy

    def _figures(self, name: str, refiner: Refiner) -> float:
        """Logs them, and returns the mean total."""
        trainer = self.trainer
        assert trainer is not None
        process, of = trainer.accelerator.process_index, trainer.accelerator.num_processes
        with undisturbed(), _quiet(), trainer._policy():
            groups = self._groups(refiner, range(process, len(self.prompts), of))
        rows = sorted(gather_object([self._row(g) for g in groups]), key=lambda row: row["row"])
        scores = {key: [row["scores"][key] for row in rows] for key in rows[0]["scores"]}
        turns = sum(row["turns"] for row in rows)
        logs: dict[str, Any] = {}
        for key, values in scores.items():
            figure = mean(values)
            logs |= {f"{name}/{key}/{part}": figure[part] for part in ("mean", "low", "high")}
        logs |= {f"{name}/n": len(rows), f"{name}/changes": sum(row["changed"] for row in rows) / len(rows)}
        logs[f"{name}/failed"] = sum(row["failed"] for row in rows) / max(turns, 1)
        due = trainer.control.should_log  # is taken as done by whoever logs
        Trainer.log(trainer, logs)  # TRL's own would mix them with those of the step
        trainer.control.should_log = due
        total = logs[f"{name}/total/mean"]
        return -float("inf") if total is None else total

    def _groups(self, refiner: Refiner, rows: Sequence[int]) -> list[Group]:
        """One trajectory each, scored as in training."""
        assert self.trainer is not None
        rollout, config = self.trainer.rollout, self.trainer.loop
        batch = rollout.batch or config.prompts_per_step * config.group_size
        found = run_arm(
            rollout.pipe, [self.prompts.requests[i] for i in rows], [SEEDS + i for i in rows], refiner,
            ", ".join(map(str, self.steps)), batch=batch, preview=rollout.preview, output_type="pil", **rollout.call,
        )  # fmt: skip
        groups: list[Group] = []
        for i, t in zip(rows, found, strict=True):
            told = self.prompts.told(i)
            tag = told.pop("tag", None)
            t.meta["row"] = i
            groups.append(Group(Sample(self.prompts.requests[i], SEEDS + i, tag, told), [t], [[]]))
        if groups:
            rollout._score(groups)
        return groups

    def _row(self, group: Group) -> dict[str, Any]:
        (t,), (total,) = group.trajectories, group.rewards
        turns = {"turns": len(t.turns), "changed": sum(turn.changed for turn in t.turns), "failed": len(t.failures)}
        return {"row": t.meta["row"], "scores": t.scores | {"total": total}} | turns


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whoever draws from a global random state in here, somebody's reward for example, leaves it as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


__all__ = ["BEST", "SEEDS", "WATCHED", "WHEN", "Watch", "undisturbed"]
