"""`promptloop train {grpo,sft}`: one YAML, and what is said on the command line over it. Also under accelerate:

accelerate launch -m promptloop_training.main grpo --config recipe.yaml --learning_rate 1e-5

Whatever can be wrong is found before any model is loaded. A run that was stopped, by whatever, goes on with the same command from its
last whole checkpoint; while it is at work, the same command is refused.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptloop_pipeline.cli.named import load_model, load_named_reward
from promptloop_pipeline.cli.output import quiet_libraries
from promptloop_pipeline.tiny import quiet

if TYPE_CHECKING:
    from .plan import Plan

METHODS = {
    "grpo": "reinforcement learning on rewards of finished pictures: PromptLoop, and single-turn with refine_at: start",
    "sft": "warm-up on trajectories of a teacher, or on the best of its own",
}
LISTS = " `promptloop train grpo --help` lists all keys."
USAGE = f"""promptloop train {{grpo,sft}} --config FILE.yaml [--key value ...]

FILE.yaml has lines of the form `key: value`; what is given on the command line wins.{LISTS}
Under accelerate: accelerate launch -m promptloop_training.main grpo --config FILE.yaml"""
FINAL, DONE = "final", "trained.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status. Raises ValueError, OSError or RuntimeError with one clear line."""
    method, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if method in ("-h", "--help"):
        from .arguments import recipes

        methods = "\n".join(f"  {name:6}{what}" for name, what in METHODS.items())
        print(f"{USAGE}\n\n{methods}\n\nRecipes, whose names --config takes too: {', '.join(recipes())}")
        return 0
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}; use {' or '.join(METHODS)}")
    quiet_libraries()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # between it and TRL
    logging.getLogger("promptloop").addFilter(_not_a_turn)
    run = {"grpo": grpo, "sft": sft}[method]
    try:
        return run(rest, helped="--help" in rest or "-h" in rest)
    except KeyboardInterrupt:
        print("stopped, before training began", file=sys.stderr)
        return 130


def _not_a_turn(record: logging.LogRecord) -> bool:
    """Turns that failed are counted in the log of the run; there are thousands."""
    return "the prompt is kept" not in str(record.msg)


# --- GRPO ---------------------------------------------------------------------------------------------------------------


def grpo(argv: Sequence[str], helped: bool = False) -> int:
    if helped:
        print(_help_grpo())
        return 0
    from .plan import plan
    from .record import alone

    it = plan(argv)
    main = it.config.process_index == 0
    with alone(it.folder, main):
        checkpoint, status = claim_folder(it), 0
        if (done := _done(it)) is not None:
            print(f"this run is done: {done}")
        else:
            if it.train.left_out and main:
                print(
                    f"rewards are not told of {', '.join(it.train.left_out)}: the trainer has another use for columns of such names"
                )
            status = train(it, load(it), checkpoint)
        if it.push and main and not status:  # after the other processes have left, who would not wait so long
            _push(it)
    return status


def claim_folder(it: Plan) -> str | None:
    """Makes `output_dir` this run's, for all processes; returns the checkpoint to go on from. Raises ValueError where it holds another
    run."""
    from accelerate import PartialState

    from .grpo import last_checkpoint
    from .record import claim

    checkpoint = last_checkpoint(it.folder)
    PartialState().wait_for_everyone()
    if it.config.process_index == 0:
        claim(it.folder, it.manifest(), it.config.resume, checkpoint)
    PartialState().wait_for_everyone()
    return checkpoint


def _done(it: Plan) -> Path | None:
    file = it.folder / FINAL / DONE
    if not file.is_file():
        return None
    was, config = json.loads(file.read_text(encoding="utf-8")), it.config
    enough = config.max_steps <= was["step"] if config.max_steps > 0 else config.num_train_epochs <= was["num_train_epochs"]
    return it.folder / FINAL if enough else None


def load(it: Plan) -> Any:
    """The trainer, with all models: rewards first, which are small and fail often."""
    from .data import to_dataset
    from .grpo import PromptLoopGRPOTrainer
    from .policy import adapter_config, load_policy
    from .record import Samples
    from .rollout import Rollout

    config, device = it.config, str(it.config.device)
    rewards = {
        name: load_named_reward(name, options, device=device, batch_size=config.reward_batch)
        for name, options in it.rewards.items()
    }
    with quiet():
        pipe = load_model(config.pipeline, device, config.pipeline_dtype)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if hasattr(part, "requires_grad_"):
            part.requires_grad_(False)
    policy = load_policy(
        config.refiner, it.template, it.lora, device=device, logprobs=True, trust_remote_code=config.trust_remote_code,
        template_kwargs=config.chat_template_kwargs, max_pixels=config.max_pixels, temperature=config.temperature, top_p=config.top_p,
        max_new_tokens=config.max_completion_length, num_beams=1,
    )  # fmt: skip
    rollout = Rollout(
        pipe, policy, rewards, config.specs, size=config.group_size, retained=config.retained, batch=config.rollout_batch,
        share_noise=config.share_noise, by_tag=config.by_tag, **config.call,
    )  # fmt: skip
    samples = Samples(
        it.folder, config.samples_every if config.process_index == 0 else 0, config.retained, iterations=config.num_iterations,
        pixelated=config.pipeline == "tiny",
    )  # fmt: skip
    chat: Any = policy.chat
    return PromptLoopGRPOTrainer(
        model=chat.model, processing_class=chat.processor, args=config, rollout=rollout, on_groups=samples,
        train_dataset=to_dataset(it.train, conversational="continue" not in it.template.sections),
        peft_config=adapter_config(it.lora, chat.model),
    )  # fmt: skip


def train(it: Plan, trainer: Any, checkpoint: str | None) -> int:
    """Trains, keeps the result in `final`, and returns 0; 130 when it was interrupted. Raises RuntimeError that names the last whole
    checkpoint."""
    from transformers import PrinterCallback, ProgressCallback

    from .grpo import TrainingError, last_checkpoint
    from .policy import leave_together
    from .record import Bar, Log, same_logs
    from .watch import Watch

    trainer.create_model_card = lambda *args, **kwargs: None  # ours is better, and comes at the end
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    same_logs(trainer, it.folder, checkpoint)
    bar = Bar()
    for callback in (Log(it.folder), bar):
        trainer.add_callback(callback)
    if it.watched is not None:
        Watch(it.watched, it.config.watch_every, it.config.watch_blind, it.folder, it.template_file).watch(trainer)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        bar.close()
        _finish(it, trainer)
        leave_together()
    except BaseException as e:
        bar.close()
        last = last_checkpoint(it.folder)
        again = "there is no checkpoint yet, and the same command starts again"
        if last is not None:
            again = f"the last whole checkpoint is {last}, and the same command goes on from it"
        step = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
        if isinstance(e, KeyboardInterrupt):
            print(f"stopped after {step}: {again}", file=sys.stderr)
            return 130
        if not isinstance(e, Exception):
            raise
        before = "stopped at" if isinstance(e, TrainingError) else f"stopped after {step}:"
        raise RuntimeError(f"{before} {' '.join(str(e).split()) or type(e).__name__}; {again}") from e
    return 0


def _finish(it: Plan, trainer: Any) -> None:
    from .card import model_card
    from .policy import keep
    from .record import MANIFEST, read_log
    from .watch import BEST, WATCHED

    step, best, final = trainer.state.global_step, it.folder / BEST / WATCHED, it.folder / FINAL
    files = {DONE: json.dumps({"step": step, "num_train_epochs": it.config.num_train_epochs}) + "\n"}
    if trainer.accelerator.is_main_process:
        manifest = json.loads((it.folder / MANIFEST).read_text(encoding="utf-8"))
        kept = json.loads(best.read_text(encoding="utf-8"))["step"] if best.is_file() else None
        adapter = hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
        files["README.md"] = model_card(manifest, read_log(it.folder), step, it.config.even_steps(), kept, adapter)
    keep(trainer, final, it.template_file, trainer.rollout.refiner.sampling.max_new_tokens, files)
    if trainer.accelerator.is_main_process:
        print(f"trained {step} steps: {final}")
    if hasattr(trainer, "end"):
        trainer.end()


def _push(it: Plan) -> None:
    """Raises RuntimeError that says what to do when the hub does not take it, for whatever reason."""
    from huggingface_hub import HfApi

    final, name, branch = it.folder / FINAL, str(it.config.hub_model_id), it.config.hub_revision
    api = HfApi(token=it.token)
    try:
        api.create_repo(name, private=it.config.hub_private_repo, exist_ok=True)
        if branch:
            api.create_branch(name, branch=branch, exist_ok=True)
        message = "A refiner trained with PromptLoop"
        api.upload_folder(repo_id=name, folder_path=final, revision=branch, commit_message=message)
    except (Exception, KeyboardInterrupt) as e:
        why = " ".join(str(e).split()) or type(e).__name__
        raise RuntimeError(f"{final} is whole, and not pushed to {name}: {why}; the same command pushes it, and no more") from e
    print(f"pushed to {name}")


def _usage(method: str) -> str:
    return USAGE.replace("{grpo,sft}", method).replace("main grpo", f"main {method}").replace(LISTS, "")


def _help_grpo() -> str:
    from transformers import TrainingArguments
    from trl import GRPOConfig, ModelConfig

    from .arguments import help_text
    from .config import PromptLoopConfig
    from .plan import REFUSED

    return help_text(
        _usage("grpo"), {"PromptLoop's keys": PromptLoopConfig, "The policy and its adapter (TRL's ModelConfig)": ModelConfig},
        {"TRL's own (GRPOConfig), by name and default": GRPOConfig, "transformers' own (TrainingArguments)": TrainingArguments},
        REFUSED,
    )  # fmt: skip


# --- SFT ----------------------------------------------------------------------------------------------------------------


def sft(argv: Sequence[str], helped: bool = False) -> int:
    from transformers import TrainingArguments
    from trl import ModelConfig, SFTConfig

    from .arguments import help_text, read
    from .grpo import last_checkpoint
    from .plan import fit_machine
    from .sft import SFTLoopConfig
    from .sft import train as run

    if helped:
        print(help_text(
            _usage("sft"), {"PromptLoop's keys": SFTLoopConfig, "The policy and its adapter (TRL's ModelConfig)": ModelConfig},
            {"TRL's own (SFTConfig), by name and default": SFTConfig, "transformers' own (TrainingArguments)": TrainingArguments},
        ))  # fmt: skip
        return 0
    given = read(argv, (SFTLoopConfig, ModelConfig), {"model_name_or_path": "the policy is named by `refiner`"})
    fit_machine(given.values)
    config = SFTLoopConfig(**given.of(SFTLoopConfig))
    try:
        result = run(config, ModelConfig(**given.of(ModelConfig)))
    except KeyboardInterrupt:
        last = last_checkpoint(str(config.output_dir))
        print(
            f"stopped; {f'the last whole checkpoint is {last}, and ' if last else ''}the same command goes on", file=sys.stderr
        )
        return 130
    if config.process_index == 0:
        print(f"trained: {result}")
    return 0


if __name__ == "__main__":
    from promptloop_pipeline.cli import main as command_line

    sys.argv[1:1] = ["train"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command_line()
