"""The model that is trained: loaded as a refiner, made trainable, and kept so that it loads as a refiner again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl import ModelConfig, get_peft_config, get_quantization_config

from promptloop_pipeline import tiny
from promptloop_pipeline.chat import OPTIONS
from promptloop_pipeline.cli.named import TEMPLATE, holds_model
from promptloop_pipeline.refiners.mllm import MLLMRefiner
from promptloop_pipeline.refiners.template import FOLDER, Template, load_template, names

ALTERED = (
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
)  # in generation, of which the loss knows nothing
LINEAR = r"(?!.*(visual|vision)).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"  # of the language model


def weights_of(refiner: str) -> str:
    """A folder or hub id. Raises FileNotFoundError or ValueError for what cannot be one."""
    if refiner in tiny.REFINERS:
        return str(tiny.WEIGHTS / tiny.REFINERS[refiner])
    path = Path(refiner).expanduser()
    if path.exists():
        if not holds_model(path):
            raise FileNotFoundError(
                f"no language model at {refiner}: expected a folder with config.json or adapter_config.json"
            )
        return str(path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", refiner) or refiner.startswith("."):
        raise FileNotFoundError(f'there is no refiner at {refiner}; give a folder, a hub id such as owner/name, or "tiny"')
    return refiner


def template_file(refiner: str, template: str | None) -> Path:
    """Of the template that is asked for, by name or path ("tiny": the embedded one); else of the one beside the weights; else of
    "rewrite"."""
    beside = Path(refiner).expanduser() / TEMPLATE
    if template is None:
        return tiny.TEMPLATE if refiner in tiny.REFINERS else beside if beside.is_file() else FOLDER / "rewrite.txt"
    if template == "tiny":
        return tiny.TEMPLATE
    load_template(template)  # says what there is
    return FOLDER / f"{template}.txt" if template in names() else Path(template).expanduser()


def load_policy(refiner: str, template: Template, lora: ModelConfig, **options: Any) -> MLLMRefiner:
    """options: of `MLLMRefiner` and its chat model. An adapter is loaded with its base model, and is what is trained. Penalties for
    repetition, which some models bring, are left out: the policy is to be what the loss takes it for."""
    given = {
        "dtype": lora.dtype,
        "attn_implementation": lora.attn_implementation,
        "quantization": get_quantization_config(lora),
        "revision": None if lora.model_revision == "main" else lora.model_revision,
    }
    with tiny.quiet():
        policy = MLLMRefiner.from_pretrained(
            weights_of(refiner), template, **{k: v for k, v in given.items() if v is not None}, **options
        )
    model: Any = policy.chat.model  # type: ignore[attr-defined]
    for name in ALTERED:
        setattr(model.generation_config, name, None)
    if hasattr(model, "peft_config"):
        if lora.use_peft:
            raise ValueError(
                f"use_peft is true, and the refiner {refiner} is an adapter already, which is trained on; leave use_peft out"
            )
        model.set_adapter(next(iter(model.peft_config)))
    return policy


def adapter_config(lora: ModelConfig, model: Any) -> Any:
    """PEFT's, or None where the whole model is trained. Without lora_target_modules: the linear layers of the language model, and
    those of the vision tower are left as they are; all linear layers where they have other names."""
    config: Any = get_peft_config(lora)
    if config is not None and lora.lora_target_modules is None:
        found = any(re.fullmatch(LINEAR, name) for name, _ in model.named_modules())
        config.target_modules = LINEAR if found else "all-linear"
    return config


def keep(trainer: Any, folder: Path, template: Path, tokens: int | None, files: Mapping[str, str] = {}) -> None:
    """The weights (the adapter, where there is one), the processor, the template and what else there is to say, as a whole or not at
    all. tokens: the budget that it was trained with; None: what the template says. All processes come here together: where the model
    is spread over them, all take part."""
    unfinished = folder.with_name(f".{folder.name}")
    main = trainer.accelerator.is_main_process
    if main:
        shutil.rmtree(unfinished, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(unfinished), _internal_call=True)
    if main:
        shutil.rmtree(unfinished / "ref", ignore_errors=True)  # a copy of the adapter that the KL is taken to
        (unfinished / "training_args.bin").unlink(missing_ok=True)  # a pickle; the manifest says the same
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.generation_config.save_pretrained(unfinished)  # an adapter has none of its own
        text = template.read_text(encoding="utf-8-sig")
        (unfinished / TEMPLATE).write_text(text if tokens is None else _told(text, tokens), encoding="utf-8")
        for name, content in files.items():
            (unfinished / name).write_text(content, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.replace(folder)


def _told(text: str, tokens: int) -> str:
    """The template, with the token budget of the training and otherwise greedy, as it was watched."""
    head, bracket, rest = text.partition("\n[")
    lines = [line for line in head.splitlines() if line.partition(":")[0].strip() not in OPTIONS]
    return "\n".join([*lines, f"max_new_tokens: {tokens}"]) + bracket + rest


class EndsInTime:
    """Before a trainer's class: a run that was killed after its last checkpoint, and taken up, is not given a step too many."""

    state: Any
    control: Any

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]


def leave_together() -> None:
    """At the end of a run on several processes: all wait for the last, and close what connects them. A process that exits while its
    neighbour still talks to it is aborted by gloo's threads."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
