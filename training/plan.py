"""What a GRPO run is to be, read and checked: whatever can be wrong is found here, before any model is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token
from huggingface_hub.utils import validate_repo_id
from trl import ModelConfig

from promptloop_pipeline.cli.evaluate import _check_sum
from promptloop_pipeline.cli.named import check_model, reward_options
from promptloop_pipeline.cli.output import checked_folder
from promptloop_pipeline.dotted import load_object
from promptloop_pipeline.refiners.template import Template, load_template
from promptloop_pipeline.rewards.combine import NAMED

from .arguments import read
from .config import DERIVED, PromptLoopConfig
from .data import SHAPES, Prompts, hold_out, load_prompts
from .policy import template_file, weights_of
from .record import VERSION, check_trackers, git_commit, versions
from .watch import SEEDS, WHEN

LOOP = {"refined", "format_ok", "trajectories", "name"}  # what the loop tells rewards
_WATCHED = "prompts held out are watched instead; see watch_every"
REFUSED = {
    **dict.fromkeys(DERIVED, "it follows from prompts_per_step, group_size, retained and turns"),
    **dict.fromkeys(("eval_strategy", "eval_steps", "do_eval", "eval_on_start"), _WATCHED),
    "model_name_or_path": "the policy is named by `refiner`",
    "model_init_kwargs": "use dtype, attn_implementation, load_in_4bit and model_revision",
    "reward_weights": "weights are part of `rewards`, as in image-reward:1.0",
    "resume_from_checkpoint": "a run goes on by itself from its own folder; see `resume`",
    "remove_unused_columns": "what rewards are told of a prompt must not be lost",
    "load_best_model_at_end": "the best model by watching is kept in `best`; see watch_every",
}
ALLOWED = {
    "watch_blind": WHEN,
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "loss_type": ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
}


@dataclass(frozen=True)
class Plan:
    """A run that was checked, and of which nothing is loaded. rewards: the options of each, by name. watched: None where it is not.
    push: whether the result goes to the hub; token: for it, if one was given."""

    config: PromptLoopConfig
    lora: ModelConfig
    template: Template
    template_file: Path
    rewards: dict[str, dict[str, str]]
    train: Prompts
    watched: Prompts | None
    folder: Path
    command: list[str]
    push: bool = False
    token: str | None = field(default=None, repr=False)

    def manifest(self) -> dict[str, Any]:
        prompts = {"train": self.train} | ({"watched": self.watched} if self.watched else {})
        files = {"template": _check_sum(self.template_file)}
        for what, place in (("refiner", self.config.refiner), ("pipeline", self.config.pipeline)):
            if Path(place).expanduser().exists():
                files[what] = _check_sum(Path(place).expanduser())
        found = {
            "version": VERSION, "command": self.command, "config": self.config.to_dict() | asdict(self.lora), "files": files,
            "data": {what: {"name": p.name, "n": len(p), "digest": p.digest} for what, p in prompts.items()},
            "processes": self.config.world_size, "seeds": {"training": self.config.seed, "watched": SEEDS},
            "versions": versions(), "git": git_commit(),
        }  # fmt: skip
        return json.loads(json.dumps(found, default=str))


def plan(argv: Sequence[str]) -> Plan:
    """argv: as of `arguments.read`. Raises ValueError, OSError or ImportError naming the key."""
    config, lora = configure(argv)
    folder = checked_folder(Path(str(config.output_dir)), "output_dir")
    config.output_dir = str(folder)
    check_model(config.pipeline)
    weights_of(config.refiner)
    place = template_file(config.refiner, config.template)
    template = load_template(place)
    if "{source}" in str(template.sections):
        raise ValueError(f"the template {template.name!r} shows the picture that a run starts from, and these start from none")
    if not template.looks and any(config.even_steps()):
        raise ValueError(f'the template {template.name!r} shows no picture; use refine_at "start" with it, or another template')
    rewards = _rewards(config)
    train, watched = _prompts(config)
    for prompts in (train, watched) if watched else (train,):
        _check_told(prompts, list(rewards))
    push, config.push_to_hub = config.push_to_hub, False  # the result is pushed, by us, and not every checkpoint
    token, config.hub_token = config.hub_token, None  # checkpoints would hold it
    return Plan(config, lora, template, place, rewards, train, watched, folder, ["grpo", *_unsecret(argv)], push, token)


def _unsecret(argv: Sequence[str]) -> list[str]:
    """The command as it can be shown to everybody."""
    found: list[str] = []
    for word in argv:
        key, equals, _ = word.partition("=")
        secret = key.replace("-", "_") == "__hub_token" and equals
        found.append(f"{key}=..." if secret else "..." if found and found[-1] in ("--hub_token", "--hub-token") else word)
    return found


def configure(argv: Sequence[str]) -> tuple[PromptLoopConfig, ModelConfig]:
    """All that can be told from the keys and values themselves, without looking at any file but the YAML."""
    given = read(argv, (PromptLoopConfig, ModelConfig), REFUSED)
    values = fit_machine(given.values)
    own = sorted(key for key in values if key.startswith(("lora_", "use_rslora", "use_dora")))
    if own and not values.get("use_peft"):
        raise ValueError(
            f"{given.where[own[0]]}: {own[0]} is given, and use_peft is not true; add use_peft: true, or leave it out"
        )
    config, lora = PromptLoopConfig(**given.of(PromptLoopConfig)), ModelConfig(**given.of(ModelConfig))
    for name, allowed in ALLOWED.items():
        value = getattr(config, name) if hasattr(config, name) else getattr(lora, name)
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; use {', '.join(allowed[:-1])} or {allowed[-1]}")
    check_trackers(config.report_to)
    if config.push_to_hub:
        _check_hub(config)
    return config, lora


def _check_hub(config: PromptLoopConfig) -> None:
    if "/" not in (config.hub_model_id or ""):
        raise ValueError(
            f"push_to_hub is true, and hub_model_id is {config.hub_model_id or 'not given'}; say where, such as you/my-refiner"
        )
    validate_repo_id(config.hub_model_id)
    if not (config.hub_token or get_token()):
        raise ValueError("push_to_hub is true, and nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN")


def fit_machine(values: dict[str, Any]) -> dict[str, Any]:
    """With other defaults where those of TRL and transformers are for GPUs, or for a log without a bar."""
    values.setdefault("disable_tqdm", False)
    if not torch.cuda.is_available():
        values.setdefault("dataloader_pin_memory", False)
        if not {"bf16", "fp16"} & set(values):
            values["bf16"] = False
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        values.setdefault("use_cpu", True)  # or each process takes itself for the only one
    return values


def _rewards(config: PromptLoopConfig) -> dict[str, dict[str, str]]:
    found = reward_options(config.reward_models, config.specs, "reward_models")
    for name, options in found.items():
        if name not in NAMED:
            load_object(name, "reward")  # imports it, as is cheap
        for value in options.values():
            if value.startswith((".", "/", "~")) and not Path(value).expanduser().exists():
                raise FileNotFoundError(f"reward_models: there is nothing at {value}, where {name} should be")
    return found


def _prompts(config: PromptLoopConfig) -> tuple[Prompts, Prompts | None]:
    """(to train on, to watch)"""
    train, watched = load_prompts(config.train_data, config.prompt_column, config.train_prompts), None
    if config.watch_every:
        source, (kind, _, rest) = config.watch_data, config.train_data.partition(":")
        if source is None and kind == SHAPES:
            objects = rest.partition(":")[2]
            source = f"{SHAPES}:any" + (f":{objects}" if objects else "")  # other pairs than in training, too
        if source is None:
            train, watched = hold_out(train, config.watch_prompts)
        else:
            watched = load_prompts(source, config.prompt_column, config.watch_prompts, seed=1)
            train = train.without(set(watched.requests))
    if config.by_tag:
        for key, prompts in (("train_data", train), ("watch_data", watched)):
            if prompts is not None:
                _check_tags(key, prompts, [s.name for s in config.specs])
    if len(train) < (needed := config.prompts_per_step * config.world_size):
        raise ValueError(
            f"train_data has {len(train)} prompts to train on, and a step takes {needed}; use more prompts, or fewer prompts_per_step"
        )
    return train, watched


def _check_told(prompts: Prompts, names: Sequence[str]) -> None:
    """Whether rewards will be told what they need; what the loop itself tells is always there."""
    for name in names:
        found = load_object(NAMED[name][0] if name in NAMED else name, "reward")
        needs = getattr(found, "needs", getattr(getattr(found, "__self__", None), "needs", ()))
        if missing := set(needs) - LOOP - set(prompts.columns):
            raise ValueError(
                f"the reward {name} needs the column {sorted(missing)[0]!r}, and {prompts.name} has "
                f"{', '.join(prompts.columns) or 'none'}"
            )


def _check_tags(key: str, prompts: Prompts, names: Sequence[str]) -> None:
    if "tag" not in prompts.columns:
        raise ValueError(
            f'by_tag is true, and {key} ({prompts.name}) has no column "tag"; add it, naming a reward: {", ".join(names)}'
        )
    if unknown := sorted(prompts.tags() - set(names)):
        raise ValueError(f"{key} ({prompts.name}) has the tag {unknown[0]!r}, which is none of the rewards {', '.join(names)}")
