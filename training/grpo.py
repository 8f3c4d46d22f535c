"""GRPO over the turns of a refiner (PromptLoop, arXiv 2510.00430), on TRL's trainer; with the schedule "start" it is the
single-turn GRPO of RePrompt (2505.17540) and PromptEnhancer (2509.04545).

A row of TRL's batch is a turn; the rows of a trajectory share its advantage, and the rows of a group lie in one process. TRL
repeats each prompt for all rows of its group, asks `_generate` for them, and takes the loss; what is ours is the rollout in
between and the advantages (`objectives.group_advantages`). Everything else that `GRPOConfig` offers is TRL's.

Where this departs from the paper: it says nothing on how tokens of several turns are weighed; loss_type "dapo" (TRL's default)
weighs all tokens alike, "grpo" all turns alike.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from promptloop_pipeline.chat import Completion, Conversation, Sampling

from .config import PromptLoopConfig
from .objectives import deviation, group_advantages, is_flat
from .rollout import Group, Rollout, Row, Sample, _seed

RESULTS = 8  # what `_generate` returns, in TRL 1.16


def check_trl() -> None:
    """Raises RuntimeError when this TRL asks its trainer's private `_generate` for something else than we give."""
    import trl

    taken = list(inspect.signature(GRPOTrainer._generate).parameters)
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    wanted = source.partition("= self._generate(prompts)")[0].rpartition("(\n")[2].count(",")
    if taken != ["self", "prompts"] or wanted != RESULTS:
        raise RuntimeError(
            f"TRL {trl.__version__} calls its trainer in another way than the one that PromptLoop was built on; install trl>=1.16,<1.17"
        )


class PromptLoopGRPOTrainer(GRPOTrainer):
    """rollout: makes the groups; its refiner is the policy, and is given this trainer's model. on_groups: told of each batch of
    groups.

    The dataset has a column "prompt" (messages, or text) that TRL wants, and "request", "row", and whatever rewards are told.
    """

    def __init__(
        self,
        *args: Any,
        rollout: Rollout,
        on_groups: Callable[[int, Sequence[Group]], None] = lambda step, groups: None,
        **kwargs: Any,
    ) -> None:
        check_trl()
        self.rollout, self.on_groups = rollout, on_groups
        self._rows: list[dict[str, Any]] = []
        self._advantages = torch.zeros(0)
        super().__init__(*args, reward_funcs=_trajectory_reward, **kwargs)
        self.loop: PromptLoopConfig = self.args
        if self.use_vllm or self.use_transformers_continuous_batching:
            self.rollout.refiner.chat = _TRLChat(self, self.rollout.refiner.chat)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        output = super()._generate_and_score_completions(inputs)
        output["advantages"] = self._advantages.to(output["advantages"])
        return output

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        turns = self.loop.turns_trained
        refined = self.rollout.size - self.rollout.retained
        samples = [self._sample(row) for row in self._rows[:: turns * refined]]
        steps = [self.loop.draw_steps(random.Random(_seed(s.seed, "steps"))) for s in samples]
        with self._policy():
            groups = self.rollout(samples, steps)
        self.on_groups(self.state.global_step, groups)
        advantages = self._group_advantages(groups)
        rows = [row for group in groups for of in group.rows for row in of]
        filler = next(row for row in rows if row is not None)
        eos = self._tokenizer.eos_token_id
        asked = [(row or filler).conversation for row in rows]
        prompts[:] = [self._messages(c) for c in asked]  # the caller renders pixels and token types from them
        prompt_ids, images, _ = self._tokenize_prompts(prompts)
        completion_ids = [list(row.token_ids) if row else [eos] for row in rows]
        heard = [row is not None and not (self.loop.skip_flat_groups and is_flat(group.rewards))
                 for group in groups for of in group.rows for row in of]  # fmt: skip
        mask = [[int(h)] * len(ids) for h, ids in zip(heard, completion_ids, strict=True)]
        logprobs = [list(row.logprobs) if row and row.logprobs else [0.0] * len(ids) for row, ids in zip(rows, completion_ids)]
        self._advantages = torch.tensor(
            [a for group, of in zip(groups, advantages) for a in of[:refined] for _ in range(turns)]
        )
        rewards = [r for group in groups for r in group.rewards[:refined] for _ in range(turns)]
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        completions = texts if isinstance(prompts[0], str) else [[{"role": "assistant", "content": text}] for text in texts]
        self._log(groups, completion_ids)
        recorded = logprobs if all(row is None or row.logprobs for row in rows) else None
        return prompt_ids, completion_ids, mask, completions, recorded, {"trajectory_reward": rewards}, images, []

    def _sample(self, row: dict[str, Any]) -> Sample:
        context = {k: v for k, v in row.items() if k not in ("prompt", "request", "row", "tag")}
        seed = _seed(self.args.seed, self.state.global_step, row["row"])
        return Sample(row["request"], seed, row.get("tag"), context)

    @contextmanager
    def _policy(self) -> Any:
        """The model as it is now, ready to generate, in the rollout's refiner."""
        chat = self.rollout.refiner.chat
        if isinstance(chat, _TRLChat):
            yield
            return
        with (
            unwrap_model_for_generation(
                self.model_wrapped, self.accelerator, gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
        ):  # fmt: skip
            training = model.training
            chat.model = model.eval()
            try:
                yield
            finally:
                model.train(training)

    def _messages(self, conversation: Conversation) -> Any:
        """As the model got it: without special tokens in what users wrote."""
        chat = self.rollout.refiner.chat
        chat = chat.plain if isinstance(chat, _TRLChat) else chat
        return chat._plain(conversation) if isinstance(conversation, str) else chat._messages(conversation)

    def _group_advantages(self, groups: Sequence[Group]) -> list[list[float]]:
        rewards = [group.rewards for group in groups]
        everything = gather_object([r for of in rewards for r in of])
        return group_advantages(rewards, self.scale_rewards, deviation(everything))

    def _log(self, groups: Sequence[Group], completion_ids: Sequence[Sequence[int]]) -> None:
        """Means over all processes, of what the trajectories say; TRL logs them with its own."""
        refined = self.rollout.size - self.rollout.retained
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["num_tokens"] = [self.state.num_input_tokens_seen]
        for name in groups[0].raw:
            for what, part in (("", slice(refined)), ("retained/", slice(refined, None))):
                values = [v for g in groups for v in g.raw[name][part] if v is not None]
                if what == "" or self.rollout.retained:
                    self._log_metric(f"reward/{what}{name}", _mean(values))
        turns = [turn for g in groups for t in g.trajectories[:refined] for turn in t.turns]
        self._log_metric("group/flat", _mean([is_flat(g.rewards) for g in groups]))
        self._log_metric("group/deviation", _mean([deviation(g.rewards) for g in groups]))
        self._log_metric("turn/changed", _mean([turn.changed for turn in turns]))
        self._log_metric("turn/failed", _mean([turn.error is not None for turn in turns]))
        self._log_metric("turn/format", _mean([turn.format_ok for turn in turns if turn.format_ok is not None]))
        self._log_metric("turn/tokens", _mean([len(ids) for ids in completion_ids]))
        self._log_metric("prompt/words", _mean([len(t.prompt.split()) for g in groups for t in g.trajectories[:refined]]))
        for name, seconds in self.rollout.seconds.items():
            self._log_metric(f"seconds/{name}", seconds)


class _TRLChat:
    """TRL's own generation (vLLM, continuous batching) as a chat model. It draws from random states of its own."""

    def __init__(self, trainer: PromptLoopGRPOTrainer, plain: Any) -> None:
        self.trainer, self.plain, self.sees = trainer, plain, plain.sees
        self.on_token: Callable[[], None] | None = None

    def generate(self, conversations: Sequence[Conversation], sampling: Sampling) -> list[Completion]:
        prompts = [self.trainer._messages(c) for c in conversations]
        ids, images, fields = self.trainer._tokenize_prompts(prompts)
        said, logprobs = self.trainer._generate_single_turn(ids, images, fields, 1)
        texts = self.trainer.processing_class.batch_decode(said, skip_special_tokens=True)
        every = logprobs or [None] * len(said)
        return [
            Completion(text, tuple(row), None if logp is None else tuple(logp), len(row))
            for text, row, logp in zip(texts, said, every, strict=True)
        ]


def _trajectory_reward(prompts: Any, completions: Any, trajectory_reward: list[float | None], **_: Any) -> list[float | None]:
    """What TRL logs as the reward; advantages are ours."""
    return trajectory_reward


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


__all__ = ["PromptLoopGRPOTrainer", "Row", "check_trl"]
