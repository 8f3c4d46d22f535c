"""GRPO over the turns of a refiner (PromptLoop, arXiv 2510.00430), on TRL's trainer; with the schedule "start" it is the
single-turn GRPO of RePrompt (2505.17540) and PromptEnhancer (2509.04545).

A row of TRL's batch is a turn; the rows of a trajectory share its advantage, and the rows of a group lie in one process. TRL
repeats each prompt for all rows of its group, asks `_generate` for them, and takes the loss; what is ours is the rollout in
between and the advantages (`objectives.group_advantages`). Everything else that `GRPOConfig` offers is TRL's.

All chance derives from the seed, the step and the row of the data set, in whatever process that row is: so a run that was
stopped and resumed equals one that never was, and two processes equal one with twice the prompts.

Where this departs from the papers: they say nothing on how tokens of several turns are weighed; loss_type "dapo" (TRL's default)
weighs all tokens alike, "grpo" all turns alike. With beta > 0, TRL's default use_bias_correction_kl changes the gradient of their
k3 estimate of the KL divergence, though not its value; false gives theirs.
"""

from __future__ import annotations

import ast
import inspect
import json
import logging
import random
import textwrap
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate.utils import gather_object
from jinja2 import TemplateError
from safetensors import safe_open
from torch.utils.data import Sampler
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from promptloop_pipeline.chat import Completion, Conversation, Sampling
from promptloop_pipeline.chat.local import _without_system
from promptloop_pipeline.rewards.combine import win_rates

from .config import PromptLoopConfig
from .objectives import Rewards, deviation, group_advantages, is_flat, turn_rewards
from .policy import EndsInTime
from .rollout import Group, Rollout, Row, Sample, _seed

RESULTS = 8  # what `_generate` returns, in TRL 1.16
logger = logging.getLogger("promptloop")


class TrainingError(RuntimeError):
    """A run that cannot go on: the step, counted from 1, and the reason. What is on disk is as it was before that step."""


def check_trl(trainer: type = GRPOTrainer) -> None:
    """Raises RuntimeError when this TRL asks its trainer's private `_generate` for something else than we give."""
    import trl

    taken = list(inspect.signature(trainer._generate).parameters)  # type: ignore[attr-defined]
    source = ast.parse(textwrap.dedent(inspect.getsource(trainer._generate_and_score_completions)))  # type: ignore[attr-defined]
    calls = [
        (len(node.value.args), len(getattr(node.targets[0], "elts", [node.targets[0]])))
        for node in ast.walk(source)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "self._generate"
    ]
    if taken != ["self", "prompts"] or calls != [(1, RESULTS)]:
        raise RuntimeError(
            f"TRL {trl.__version__} calls its trainer in another way than the one that PromptLoop was built on: "
            f"_generate({', '.join(taken)}), {calls} instead of [(1, {RESULTS})]; install trl>=1.16,<1.17"
        )


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint of a run, to resume from; None where there is none. One that was being written when its
    process died is passed over, with a warning."""
    found = {int(p.name.rpartition("-")[2]): p for p in Path(output_dir).glob("checkpoint-*") if p.name[11:].isdigit()}
    for _, folder in sorted(found.items(), reverse=True):
        missing = _missing(folder)
        if missing is None:
            return str(folder)
        logger.warning("%s is not whole (%s): it is passed over", folder, missing)
    return None


def _missing(folder: Path) -> str | None:
    """What a checkpoint lacks; None where it is whole. trainer_state.json is written last."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "no readable trainer_state.json"
    if any((folder / name).is_dir() for name in ("pytorch_model_fsdp_0", "optimizer_0")) or (folder / "latest").is_file():
        return None  # FSDP's and DeepSpeed's own form
    for pattern in ("*.safetensors", "optimizer.*", "scheduler.pt", "rng_state*.pth"):
        files = sorted(folder.glob(pattern))
        if not files:
            return f"no {pattern}"
        for file in files:
            try:
                if file.suffix == ".safetensors":
                    with safe_open(file, "pt"):
                        pass
                elif not zipfile.is_zipfile(file):
                    return f"{file.name} is cut short"
            except Exception:  # safetensors' own
                return f"{file.name} is cut short"
    return None


class PromptLoopGRPOTrainer(EndsInTime, GRPOTrainer):
    """rollout: makes the groups; its refiner is the policy, and is given this trainer's model, and the temperature, top_p and
    token budget of `args`, which the loss takes the log-probabilities with. on_groups: told of each batch of groups.

    The dataset has a column "prompt" (messages, or text) that TRL wants, and "request", "row", and whatever rewards are told.

    `train` raises TrainingError for a loss or gradients that are no numbers, a reward that fails, a policy that fails on every
    turn, and a checkpoint that cannot be written. Raises ValueError for a rollout whose groups are not those of `args`.
    """

    def __init__(
        self,
        model: Any,
        args: PromptLoopConfig,
        *,
        rollout: Rollout,
        on_groups: Callable[[int, Sequence[Group]], None] = lambda step, groups: None,
        **kwargs: Any,
    ) -> None:
        check_trl()
        for name, given, wanted in (("size", rollout.size, args.group_size), ("retained", rollout.retained, args.retained)):
            if given != wanted:
                raise ValueError(f"the rollout's {name} is {given}, and the config's {wanted}; give both the same")
        plain = kwargs.get("peft_config") is None and not hasattr(model, "peft_config")
        if args.beta and plain and not getattr(model.config, "_name_or_path", None):
            raise ValueError(
                f"beta is {args.beta}, and the model was not loaded from a folder or hub id, from which its reference could be loaded "
                "too; save it first, train an adapter (peft_config), or use beta 0"
            )
        self.rollout, self.on_groups = rollout, on_groups
        self._rows: list[dict[str, Any]] = []
        self._advantages = torch.zeros(0)
        self._knows_system: bool | None = None  # the chat template; found out when there is a system message
        super().__init__(model, args=args, reward_funcs=_trajectory_reward, **kwargs)
        self.loop: PromptLoopConfig = self.args
        policy = rollout.refiner
        policy.sampling = replace(policy.sampling, temperature=self.args.temperature, top_p=self.args.top_p, num_beams=1)
        if self.args.max_completion_length is not None:
            policy.sampling = replace(policy.sampling, max_new_tokens=self.args.max_completion_length)
        chat: Any = policy.chat
        self.chat_template_kwargs: Any = chat.template_kwargs | cast(Any, self.chat_template_kwargs)
        chat.template_kwargs = self.chat_template_kwargs  # the loss is to see what the policy saw
        if self.use_vllm or self.use_transformers_continuous_batching:
            policy.chat = _TRLChat(self, policy.chat)
        for trained in (self.model, self.ref_model):
            base: Any = trained.get_base_model() if trained is not None and hasattr(trained, "get_base_model") else trained
            if not self._is_vlm and base is not None and "position_ids" in inspect.signature(base.forward).parameters:
                base.register_forward_pre_hook(_positions, with_kwargs=True)

    # --- generation -------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        return _Order(sampler, lambda: _seed(self.args.seed, "order", int(self.state.epoch or 0)))

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """As TRL's, with draws of the step's own, whoever else draws from the global random state."""
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._draw("tokens")
            return super()._prepare_inputs(generation_batch)

    def _draw(self, what: str) -> None:
        torch.manual_seed(_seed(self.args.seed, self.state.global_step, what, self.accelerator.process_index))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = self._rows = [dict(row) for row in inputs]
        output = super()._generate_and_score_completions(inputs)
        output["advantages"] = self._advantages.to(output["advantages"])
        self._draw("order")  # of rows in the parts of a batch, which comes next
        return output

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        turns = self.loop.turns_trained
        refined = self.rollout.size - self.rollout.retained
        samples = [self._sample(row) for row in self._rows[:: turns * refined]]
        steps = [self.loop.draw_steps(random.Random(_seed(s.seed, "steps"))) for s in samples]
        try:
            with self._policy():
                groups = self.rollout(samples, steps)
            columns = self._columns(groups)
        except Exception as e:  # a rollout's own errors say all that there is to say
            self._stop(str(e) if type(e) is RuntimeError else f"{type(e).__name__}: {e}", e)
        self.on_groups(self.state.global_step, groups)
        advantages, heard = self._credited(columns)
        rows = [row for group in groups for of in group.rows for row in _padded(of, turns)]
        filler = next(row for row in rows if row is not None)
        eos = self._tokenizer.eos_token_id
        prompts[:] = [self._messages((row or filler).conversation) for row in rows]  # the caller renders pixels from them
        prompt_ids, images, _ = self._tokenize_prompts(prompts)
        completion_ids = [list(row.token_ids) if row else [eos] for row in rows]
        learnt = [row is not None and h for row, h in zip(rows, heard, strict=True)]
        mask = [[int(h)] * len(ids) for h, ids in zip(learnt, completion_ids)]
        logprobs = [list(row.logprobs) if row and row.logprobs else [0.0] * len(ids) for row, ids in zip(rows, completion_ids)]
        self._advantages = torch.tensor([a if h else 0.0 for a, h in zip(advantages, learnt)])
        rewards = [r for group in groups for r in group.rewards[:refined] for _ in range(turns)]
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        completions = texts if isinstance(prompts[0], str) else [[{"role": "assistant", "content": text}] for text in texts]
        self._log(groups, prompt_ids, completion_ids)
        recorded = logprobs if all(row is None or row.logprobs for row in rows) else None
        return prompt_ids, completion_ids, mask, completions, recorded, {"trajectory_reward": rewards}, images, []

    def _sample(self, row: dict[str, Any]) -> Sample:
        context = {k: v for k, v in row.items() if k not in ("prompt", "request", "row", "tag")}
        seed = _seed(self.args.seed, self.state.global_step, row["row"])
        return Sample(row["request"], seed, row.get("tag"), context)

    @contextmanager
    def _policy(self) -> Any:
        """The model as it is now, ready to generate, in the rollout's refiner."""
        chat: Any = self.rollout.refiner.chat
        chat = chat.plain if isinstance(chat, _TRLChat) else chat
        with (
            unwrap_model_for_generation(
                self.model_wrapped, self.accelerator, gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):  # fmt: skip
            training = model.training
            chat.model = model.eval()
            try:
                yield
            finally:
                model.train(training)

    def _messages(self, conversation: Conversation) -> Any:
        """As the model got it: without special tokens in what users wrote, nor a system message where its template knows none."""
        chat: Any = self.rollout.refiner.chat
        chat = chat.plain if isinstance(chat, _TRLChat) else chat
        if isinstance(conversation, str):
            return chat._plain(conversation)
        messages = chat._messages(conversation)
        if messages[0]["role"] != "system":
            return messages
        if self._knows_system is None:
            try:
                self.processing_class.apply_chat_template([messages], tokenize=False, **self.chat_template_kwargs)
                self._knows_system = True
            except TemplateError:
                self._knows_system = False
        return messages if self._knows_system else _without_system(messages)

    # --- credit -----------------------------------------------------------------------------------------------------------

    def _columns(self, groups: Sequence[Group]) -> list[list[Rewards]]:
        """For each turn that carries loss, for each group: what its trajectories are compared by."""
        turns = self.loop.turns_trained
        if self.loop.credit == "trajectory":
            return [[win_rates(g.rewards) if self.loop.win_rate else g.rewards for g in groups]] * turns
        brought = [
            [_padded(turn_rewards(looks, final), turns) for looks, final in zip(of, group.rewards, strict=True)]
            for group, of in zip(groups, self.rollout.looks(groups), strict=True)
        ]
        return [[[of[k] for of in group] for group in brought] for k in range(turns)]

    def _credited(self, columns: Sequence[Sequence[Rewards]]) -> tuple[list[float], list[bool]]:
        """(advantage, whether it takes part in the loss) of each row of this process, in the order of rows."""
        flat = [[r for group in column for r in group] for column in columns]
        stds = [deviation([r for part in k for r in part]) for k in zip(*gather_object([flat]), strict=True)]
        found = [group_advantages(column, self.scale_rewards, std) for column, std in zip(columns, stds)]
        refined = self.rollout.size - self.rollout.retained
        order = [(k, g, j) for g in range(len(columns[0])) for j in range(refined) for k in range(len(columns))]
        heard = [not (self.loop.skip_flat_groups and is_flat(columns[k][g])) for k, g, _ in order]
        return [found[k][g][j] for k, g, j in order], heard

    # --- what stops a run, and what it goes on from --------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss).all():
            self._stop(f"the loss is {loss.item()}; a smaller learning_rate or max_grad_norm, or float32, may help")
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and self.accelerator.scaler is None and not torch.isfinite(torch.as_tensor(norm)):
            self._stop(f"the norm of the gradients is {float(norm)}; a smaller learning_rate, or float32, may help")
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        try:
            if self.args.should_save:  # that of an earlier run; the checkpoint is not whole until there is a new one
                (folder / "trainer_state.json").unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
        except Exception as e:
            self._stop(f"{folder} cannot be written: {type(e).__name__}: {e}", e)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json, which follows, says that all is there

    def _stop(self, reason: str, cause: BaseException | None = None) -> NoReturn:
        raise TrainingError(f"step {self.state.global_step + 1}: {reason}") from cause

    # --- the log ----------------------------------------------------------------------------------------------------------

    def _log(self, groups: Sequence[Group], prompt_ids: Sequence[Any], completion_ids: Sequence[Sequence[int]]) -> None:
        """Means over all processes, of what the trajectories say; TRL logs them with its own."""
        refined = self.rollout.size - self.rollout.retained
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self.state.num_input_tokens_seen += sum(gather_object([sum(map(len, prompt_ids)) + sum(map(len, completion_ids))]))
        self._metrics[mode]["num_tokens"] = [self.state.num_input_tokens_seen]
        for name in groups[0].raw:
            for what, part in (("", slice(refined)), ("retained/", slice(refined, None))):
                values = [v for g in groups for v in g.raw[name][part] if v is not None]
                if what == "" or self.rollout.retained:
                    self._note(f"reward/{what}{name}", values)
        turns = [turn for g in groups for t in g.trajectories[:refined] for turn in t.turns]
        self._note("group/flat", [is_flat(g.rewards) for g in groups])
        self._note("group/deviation", [deviation(g.rewards) for g in groups])
        self._note("turn/changed", [turn.changed for turn in turns])
        self._note("turn/failed", [turn.error is not None for turn in turns])
        self._note("turn/format", [turn.format_ok for turn in turns if turn.format_ok is not None])
        self._note("turn/tokens", [len(ids) for ids in completion_ids])
        self._note("prompt/words", [len(t.prompt.split()) for g in groups for t in g.trajectories[:refined]])
        for name, seconds in self.rollout.seconds.items():
            self._note(f"seconds/{name}", [seconds])

    def _note(self, name: str, values: Sequence[float]) -> None:
        """For TRL's mean of all values, over all processes; nothing is logged of what has none."""
        if values:
            self._pending_metrics[name].extend(float(v) for v in values)


class _Order(Sampler[int]):
    """TRL's sampler, each of whose epochs is shuffled from a seed of its own, wherever a run was resumed."""

    def __init__(self, sampler: Any, seed: Callable[[], int]) -> None:
        self.sampler, self.seed = sampler, seed

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.seed())
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class _TRLChat:
    """TRL's own generation (vLLM, continuous batching) as a chat model. It draws from random states of its own; what is to be
    greedy is left to `plain`."""

    def __init__(self, trainer: PromptLoopGRPOTrainer, plain: Any) -> None:
        self.trainer, self.plain, self.sees = trainer, plain, plain.sees
        self.on_token: Callable[[], None] | None = None

    def generate(self, conversations: Sequence[Conversation], sampling: Sampling) -> list[Completion]:
        if sampling.temperature == 0:
            return self.plain.generate(conversations, sampling)
        prompts = [self.trainer._messages(c) for c in conversations]
        ids, images, fields = self.trainer._tokenize_prompts(prompts)
        self.plain.model.eval()  # TRL leaves it in training mode
        said, logprobs = self.trainer._generate_single_turn(ids, images, fields, 1)
        ends = set(self.trainer.eos_token_ids)
        texts = [self.plain.tokenizer.decode([i for i in row if i not in ends], skip_special_tokens=True) for row in said]
        every = logprobs or [None] * len(said)
        return [
            Completion(text, tuple(row), None if logp is None else tuple(logp), len(row))
            for text, row, logp in zip(texts, said, every, strict=True)
        ]


def _positions(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positions that do not count the padding on the left, as in generation: for GPT-2 and others that learnt theirs."""
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and kwargs.get("position_ids") is None and kwargs.get("past_key_values") is None:
        kwargs = kwargs | {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}
    return args, kwargs


def _padded(values: Sequence[Any], length: int) -> list[Any]:
    """With None for turns that a trajectory of fewer does not have."""
    return [*values, *[None] * (length - len(values))]


def _trajectory_reward(prompts: Any, completions: Any, trajectory_reward: list[float | None], **_: Any) -> list[float | None]:
    """What TRL logs as the reward; advantages are ours."""
    return trajectory_reward


__all__ = ["PromptLoopGRPOTrainer", "Row", "TrainingError", "check_trl", "last_checkpoint"]
