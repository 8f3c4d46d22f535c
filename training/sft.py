"""Warm-up of a refiner: supervised fine-tuning on trajectories, on TRL's trainer.

The policy learns the form of its answers and the habit of small repairs from what a teacher did (an oracle, a large model behind an
endpoint), or from the best of what it did itself (rejection sampling, expert iteration). RePrompt (arXiv 2505.17540) and
PromptEnhancer (2509.04545) start their reinforcement learning from such a policy.

An example is one turn. What the model reads here is what it reads in use: the same template, the preview in the same size, encoded
by the same chat model. The answer and the token that ends it carry the loss, and nothing else does.
"""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback
from trl import ModelConfig, SFTConfig, SFTTrainer

from promptloop_pipeline import tiny
from promptloop_pipeline.cli.named import check_model, load_model, load_named_reward, load_refiner, reward_options
from promptloop_pipeline.cli.output import checked_folder, write_json
from promptloop_pipeline.evaluation.arms import RAW, ArmSpec, render, take_up
from promptloop_pipeline.evaluation.scoring import score_arm
from promptloop_pipeline.refiner import Refinement, View
from promptloop_pipeline.refiners.mllm import MLLMRefiner
from promptloop_pipeline.refiners.parsing import parse_answer
from promptloop_pipeline.refiners.template import load_template
from promptloop_pipeline.rewards.combine import RewardSpec, parse_rewards
from promptloop_pipeline.schedule import RefinementSchedule
from promptloop_pipeline.tiny import glossary

from .batches import Collator, to_dataset, trainable
from .data import load_prompts
from .examples import Example, Selection, Tally, check_folder, gather, hashed, told
from .grpo import last_checkpoint
from .policy import EndsInTime, adapter_config, keep, load_policy, template_file, weights_of
from .record import VERSION, Log, alone, check_trackers, claim, git_commit, same_logs, versions

REPORT, LESSONS, TEACHER, FINAL = "examples.json", "lessons", "teacher", "final"
NO_PLACE = {
    **dict.fromkeys(("packing", "padding_free", "assistant_only_loss"), "a row is one example, and loss is on its answer"),
    **dict.fromkeys(("chat_template_path", "eos_token"), "examples are encoded as the model reads them in use"),
    "model_init_kwargs": "use dtype, attn_implementation, load_in_4bit and model_revision",
    "resume_from_checkpoint": "a run goes on by itself from its own folder; see `resume`",
    "dataloader_num_workers": "examples are encoded where the model is",
    "push_to_hub": f"checkpoints and lessons would go with it; upload the folder {FINAL!r} when it is there",
}


@dataclass
class SFTLoopConfig(SFTConfig):
    """TRL's `SFTConfig` and where examples come from, checked before any model is loaded."""

    output_dir: str | None = field(default="promptloop-sft", metadata={"help": "Checkpoints, lessons, log, and the result."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens; longer examples are left out, never cut."})
    resume: bool = field(default=True, metadata={"help": "Go on with the run that output_dir holds; false: refuse to."})
    # the policy
    refiner: str = field(default="tiny", metadata={"help": '"tiny" (embedded), or a folder or hub id of a language model.'})
    template: str | None = field(default=None, metadata={"help": 'What the policy is told; default "rewrite" (tiny: its own).'})
    max_pixels: int = field(default=448 * 448, metadata={"help": "Previews are scaled down to this many pixels."})
    # the examples
    trajectories: list[str] = field(
        default_factory=list, metadata={"help": "Folders of trajectories: of `promptloop generate`, an arm of eval, samples."}
    )
    rewards: str | None = field(
        default=None, metadata={"help": "NAME[:WEIGHT][<=CAP], ...: what min_score, min_gain and best_of_request go by."}
    )
    min_score: float | None = field(default=None, metadata={"help": "Only trajectories whose total is at least this."})
    min_gain: float | None = field(
        default=None, metadata={"help": "Only those that beat the untouched picture of the same request and seed by this."}
    )
    best_of_request: int | None = field(default=None, metadata={"help": "Only so many of each request, the best."})
    keep_share: float = field(default=0.5, metadata={"help": "The largest share of examples that keep the prompt, 0 to 1."})
    eval_share: float = field(default=0.0, metadata={"help": "Share of the requests held out for eval_strategy, below 1."})
    # a teacher that makes examples first
    teacher: str | None = field(
        default=None, metadata={"help": '"oracle", a folder, hub id, server URL or "module:object"; none: no teacher.'}
    )
    teacher_template: str | None = field(default=None, metadata={"help": 'What a teacher is told; default "repair".'})
    teacher_model: str | None = field(default=None, metadata={"help": "The teacher's name on a server that has several."})
    teacher_temperature: float = field(default=0.0, metadata={"help": "Of a language model; above 0 for its own best of many."})
    teach_prompts: int | None = field(default=None, metadata={"help": "How many requests; default: all (shapes: 4096)."})
    teach_per_prompt: int = field(default=1, metadata={"help": "Pictures of each request."})
    teach_data: str = field(
        default="shapes:train", metadata={"help": '"shapes:train", a .jsonl or .txt file, or a hub dataset.'}
    )
    teach_at: str = field(default="start, 20%, 50%, 80%", metadata={"help": "The teacher's turns."})
    teach_batch: int = field(default=32, metadata={"help": "Pictures at a time."})
    reward_models: list[str] = field(default_factory=list, metadata={"help": "NAME[:PART]=WEIGHTS of the rewards."})
    pipeline: str = field(default="tiny", metadata={"help": '"tiny" (embedded), or a folder or hub id of a pipeline.'})
    pipeline_dtype: str | None = field(default=None, metadata={"help": "float32, float16 or bfloat16; default: what fits."})
    num_inference_steps: int = field(default=20, metadata={"help": "Sampling steps."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Default: the pipeline's own (tiny: 3)."})

    def __post_init__(self) -> None:
        for name, low, high in (
            ("keep_share", 0, 1), ("eval_share", 0, 0.99), ("max_pixels", 1, None), ("teach_per_prompt", 1, None),
            ("teach_batch", 1, None), ("num_inference_steps", 1, None), ("best_of_request", 1, None), ("teach_prompts", 1, None),
            ("teacher_temperature", 0, None),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (low <= value and (high is None or value <= high)):
                raise ValueError(f"{name} is {value}; use {low} {'or more' if high is None else f'to {high}'}")
        if not self.trajectories and self.teacher is None:
            raise ValueError("there is nothing to learn from: name folders of `trajectories`, or a `teacher` that makes them")
        if self.eval_strategy not in ("no", None) and not self.eval_share:
            raise ValueError(
                f'eval_strategy is {self.eval_strategy!r}, and eval_share is 0; use such as 0.05, or eval_strategy "no"'
            )
        if self.save_strategy == "steps" == self.logging_strategy and self.save_steps % self.logging_steps:
            raise ValueError(
                f"save_steps is {self.save_steps:g}, and logging_steps {self.logging_steps:g}: the means since a log would be lost "
                f"on resuming; use a multiple of {self.logging_steps:g}"
            )
        for name, why in NO_PLACE.items():
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)!r}, which has no place here: {why}")
        self.specs: list[RewardSpec] = parse_rewards(self.rewards) if self.rewards else []
        self.selection = Selection(self.specs, self.min_score, self.min_gain, self.best_of_request, self.keep_share, self.seed)
        if self.selection.scores and all(s.held_out for s in self.specs):
            raise ValueError(
                "min_score, min_gain and best_of_request go by `rewards`: name one with a weight, such as verifier"
            )
        self.reward_options = reward_options(self.reward_models, self.specs, "reward_models")
        weights_of(self.refiner)
        self.template_file = template_file(self.refiner, self.template)
        self.policy_template = load_template(self.template_file)
        if "{source}" in str(self.policy_template.sections):
            raise ValueError(
                f"the template {self.policy_template.name!r} shows the picture that a run starts from, which trajectories do not hold; "
                "use one that does not"
            )
        if self.teacher is not None:
            RefinementSchedule.parse(self.teach_at)
            check_model(self.pipeline)
            self.lessons()
        for folder in self.trajectories:
            check_folder(Path(folder))
        self.remove_unused_columns, self.dataset_kwargs = False, {"skip_prepare_dataset": True}
        super().__post_init__()

    def lessons(self) -> tuple[list[str], dict[str, list[Any]]]:
        """(requests for the teacher, what rewards are told of each)"""
        prompts = load_prompts(self.teach_data, n=self.teach_prompts, seed=self.seed)
        rows = [i for i in range(len(prompts)) for _ in range(self.teach_per_prompt)]
        known = [prompts.told(i) for i in rows]
        return [prompts.requests[i] for i in rows], {name: [of[name] for of in known] for name in prompts.columns}


# --- a teacher ----------------------------------------------------------------------------------------------------------


class WordedOracle:
    """The oracle of the embedded world, in the words of the embedded refiner, which knows no others."""

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        return [self._look(v) for v in views]

    def _look(self, v: View) -> Refinement:
        if v.image is None:
            raw = glossary.rewriting(v.request)
        else:
            cells = glossary.to_forbid(v.request, v.prompt, glossary.amounts_of(v.request, v.image))
            raw = glossary.repair(v.request, v.prompt, cells)
        said = parse_answer(raw)
        return Refinement(said.prompt, said.reasoning, raw, format_ok=True)


def teach(
    pipe: Any, teacher: Any, requests: Sequence[str], folder: str | Path, *, refine_at: str, seed: int = 0, batch: int = 32,
    untouched: bool = False, progress: Callable[[int], Any] = lambda n: None, **call: Any,
) -> Path:  # fmt: skip
    """One picture for each request with a teacher, any refiner, in the loop. Its trajectories lie in `folder`/teacher, which is
    returned.

    Seeds count up from `seed`. untouched: also the same requests and seeds as they are, in `folder`/raw. call: of the pipeline:
    num_inference_steps, guidance_scale, ... Given again, it is taken up where it stopped.
    """
    folder, seeds = Path(folder), range(seed, seed + len(requests))
    arm = ArmSpec(TEACHER, "the teacher in the loop", lambda refiner: refiner)
    for spec in (arm, RAW) if untouched else (arm,):
        done = take_up(folder / spec.name, requests, seeds)
        progress(len(done))
        render(
            pipe, spec, teacher, refine_at, requests, seeds, done, folder / spec.name, batch=batch, progress=progress, **call
        )  # fmt: skip
    return folder / TEACHER


def _taught(config: SFTLoopConfig) -> None:
    """Makes the lessons of the config's teacher and scores them. Raises ValueError where others lie in their place."""
    folder, (asked, context) = Path(str(config.output_dir), LESSONS), config.lessons()
    said = ["teacher", "teacher_template", "teacher_model", "teacher_temperature", "teach_at", "seed"]
    said += ["pipeline", "num_inference_steps", "guidance_scale"]
    settings = {name: getattr(config, name) for name in said} | {"requests": hashed(asked)}
    _check_same(folder / "settings.json", settings, "lessons of other settings; delete them, or choose another output_dir")
    folder.mkdir(exist_ok=True)
    write_json(folder / "settings.json", settings)
    arms, seeds = (TEACHER, RAW.name)[: 1 + (config.min_gain is not None)], range(config.seed, config.seed + len(asked))
    if any(len(take_up(folder / arm, asked, seeds)) < len(asked) for arm in arms):
        _make_lessons(config, asked, folder, len(arms))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the generator's, before rewards come, and the policy
    for s in config.specs:
        reward = load_named_reward(s.name, config.reward_options[s.name])
        for arm in arms:
            score_arm(folder / arm, s.name, reward, context, batch=config.teach_batch)


def _make_lessons(config: SFTLoopConfig, asked: Sequence[str], folder: Path, arms: int) -> None:
    embedded = load_template(template_file("tiny", None))
    if config.teacher == "oracle" and config.policy_template.sections == embedded.sections:
        teacher: Any = WordedOracle()
    else:
        own = config.template_file if config.teacher == config.refiner not in tiny.REFINERS else None  # its own best ones
        teacher = load_refiner(str(config.teacher), config.teacher_template or own, config.teacher_model)
    if isinstance(teacher, MLLMRefiner):
        teacher.sampling = replace(teacher.sampling, temperature=config.teacher_temperature, seed=config.seed)
    pipe = load_model(config.pipeline, str(config.device), config.pipeline_dtype)
    pipe.set_progress_bar_config(disable=True)
    scale = 3.0 if config.pipeline == "tiny" and config.guidance_scale is None else config.guidance_scale
    call = {"num_inference_steps": config.num_inference_steps} | ({} if scale is None else {"guidance_scale": scale})
    with tiny.quiet(), tqdm(total=len(asked) * arms, desc="lessons", unit="picture", disable=config.disable_tqdm) as bar:
        teach(
            pipe, teacher, asked, folder, refine_at=config.teach_at, seed=config.seed, batch=config.teach_batch,
            untouched=arms > 1, progress=bar.update, **call,
        )  # fmt: skip


def _check_same(file: Path, content: Mapping[str, Any], otherwise: str) -> None:
    """Raises ValueError where the file is there with another content."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else content
    if key := next((k for k in content if before.get(k) != content[k]), None):
        raise ValueError(f"{file.parent} holds {otherwise} ({key} is {before.get(key)!r} there, and {content[key]!r} now)")


# --- all of it ----------------------------------------------------------------------------------------------------------


class _Trainer(EndsInTime, SFTTrainer):
    pass


class Finite(TrainerCallback):
    """Stops at a gradient that is no number, before the weights take it. Raises FloatingPointError."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if grads and not torch.stack([g.isfinite().all() for g in grads]).all():
            raise FloatingPointError(
                f"the gradient of step {state.global_step + 1} is not finite, and the weights did not take it; a smaller "
                f"learning_rate or max_grad_norm may help. The last whole checkpoint is {last_checkpoint(args.output_dir)}"
            )


def train(config: SFTLoopConfig, model_config: ModelConfig) -> Path:
    """Teaches, gathers, trains. Returns the folder of the result, with its template beside the weights. Run again, it goes on from its
    last checkpoint, and ends as if it had never stopped.

    Raises ValueError where no example is left, saying why, before the policy is loaded; and for a folder that holds another run, or
    this one on other examples. Raises RuntimeError where another process is at the same run.
    """
    if model_config.model_name_or_path not in (None, config.refiner):
        raise ValueError(
            f"model_name_or_path is {model_config.model_name_or_path!r}; name the model to be trained as `refiner`"
        )
    check_trackers(config.report_to)
    out = checked_folder(Path(str(config.output_dir)), "output_dir")
    config.output_dir = str(out)
    with alone(out, config.process_index == 0):
        return _train(config, model_config, out)


def _train(config: SFTLoopConfig, model_config: ModelConfig, out: Path) -> Path:
    main, checkpoint = config.process_index == 0, last_checkpoint(out)
    folders = config.trajectories + [str(out / LESSONS / TEACHER)] * (config.teacher is not None)
    with config.main_process_first():
        if main:
            claim(out, _manifest(config, model_config), config.resume, checkpoint)
        if main and config.teacher is not None:
            _taught(config)
    examples, tally = gather(folders, config.policy_template, config.selection, config.max_pixels)
    _check_some(examples, tally)
    refiner = load_policy(
        config.refiner, config.policy_template, model_config, device=str(config.device), max_pixels=config.max_pixels,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    chat: Any = refiner.chat
    collator = Collator(chat)
    examples = trainable(examples, collator, tally, config.max_length)
    _check_some(examples, tally)
    asked = sorted({e.request for e in examples})
    hold = min(max(round(config.eval_share * len(asked)), config.eval_share > 0), len(asked) - 1)
    held = set(random.Random(config.seed).sample(asked, hold))
    learnt, watched = [e for e in examples if e.request not in held], [e for e in examples if e.request in held]
    if main:
        kept = sum(e.kept for e in learnt)
        content = {"learnt": len(learnt), "kept": kept, "held_out": len(watched), "hash": hashed(e.key() for e in learnt)}
        print(
            f"{told(tally)}\n{len(learnt)} to learn from, {kept} of which keep the prompt; {len(watched)} held out", flush=True
        )
        if checkpoint is not None:
            _check_same(out / REPORT, content, "a run on other examples, which cannot go on with these")
        write_json(out / REPORT, content | {"folders": tally})
    trainer = _Trainer(
        model=chat.model, args=config, train_dataset=to_dataset(learnt), eval_dataset=to_dataset(watched) if watched else None,
        data_collator=collator, processing_class=chat.processor, peft_config=adapter_config(model_config, chat.model),
        callbacks=[Log(out), Finite()],
    )  # fmt: skip
    del examples, learnt, watched  # their pictures lie in the datasets, compressed
    if checkpoint is not None:  # TRL counts tokens anew
        rows = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        trainer._total_train_tokens = next((int(row["num_tokens"]) for row in reversed(rows) if "num_tokens" in row), 0)
    same_logs(trainer, out, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    keep(trainer, out / FINAL, config.template_file, None)
    return out / FINAL


def _manifest(config: SFTLoopConfig, model_config: ModelConfig) -> dict[str, Any]:
    found = {
        "version": VERSION, "command": ["sft"], "config": config.to_dict() | asdict(model_config), "data": {}, "files": {},
        "processes": config.world_size, "versions": versions(), "git": git_commit(),
    }  # fmt: skip
    return json.loads(json.dumps(found, default=str))


def _check_some(examples: Sequence[Example], tally: Tally) -> None:
    if not examples:
        raise ValueError(f"no examples are left to learn from:\n{told(tally)}")
